"""The kinds of device that tests which care for none run on: the CPU, and an accelerator where asked for."""

from __future__ import annotations

import os

WANTED = "SUITE_TEST_ACCELERATOR"
"""Set to 1 it lets tests see the host's accelerators. Otherwise a test means the CPU everywhere: with
fewer devices than ranks most could not run."""


def hide_accelerators() -> None:
    """Before torch looks for them, unless they are wanted."""
    if os.environ.get(WANTED) != "1":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def device_types() -> list[str | None]:
    """As `LocalTestbed` takes them; None is the accelerator."""
    from suite.testbeds.devices import accelerator_type

    return ["cpu"] if accelerator_type() is None else ["cpu", None]
