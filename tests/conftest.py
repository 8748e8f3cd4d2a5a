"""What every test needs."""

from __future__ import annotations

import signal

from devices import hide_accelerators

from suite.testbeds.forked import stay_forkable

hide_accelerators()
# Tests compute in this process, and fork ranks from it.
stay_forkable()
# A shell's background job ignores Ctrl-C, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
