"""`torch.compile` for units: their insides become one graph, their edges stay as they are.

Only a unit's `forward` is compiled, not its call: the hooks that gather and release run before and after
it, uncompiled, and so does activation checkpointing. The graph reads weights where they are gathered;
for backward it keeps views of them, as eager autograd does, and finds them gathered again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from suite.errors import UsageError
from suite.impls.sharded.units import Unit, can_be_called


def compile_units(units: Sequence[Unit]) -> None:
    """Has each unit that contains no other one compiled when it first runs.

    The unit around the others (the model itself) stays eager: a graph across them would run past their
    hooks. Blocks of one shape share one graph. Raises UsageError for a unit that has no forward: others
    would use its weights, and that cannot be watched where there are graphs.
    """
    modules = {unit.module for unit in units}
    for unit in units:
        if not can_be_called(unit.module):
            kind = type(unit.module).__name__
            raise UsageError(f"compile=true: unit {unit.name} is a {kind}, which has no forward to compile")
        if not any(part in modules for part in unit.module.modules() if part is not unit.module):
            unit.module.forward = torch.compile(unit.module.forward)
            unit.compiled = True
