"""What every test needs."""

from __future__ import annotations

from devices import hide_accelerators

from suite.testbeds.forked import stay_forkable

hide_accelerators()
# Tests compute in this process, and fork ranks from it.
stay_forkable()
