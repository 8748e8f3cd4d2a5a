"""What every test needs."""

from __future__ import annotations

from suite.testbeds.forked import stay_forkable

# Tests compute in this process, and fork ranks from it.
stay_forkable()
