"""Weights that are used outside of their unit: a root that multiplies with a block's weight, say.

No hook sees that, so torch's functions are watched: in the first training micro-step always (it
costs some microseconds per operation), afterwards only when something was found in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from suite.impls.sharded.units import Unit


class BorrowedWeights(TorchFunctionMode):
    """While entered: before a function gets a parameter of a unit that is not in use, or a view of
    one, `fetch(unit)`; with what comes out of it, `lent(unit, result)`."""

    def __init__(
        self,
        units: Sequence[Unit],
        in_use: Callable[[Unit], bool],
        fetch: Callable[[Unit], None],
        lent: Callable[[Unit, object], None],
    ) -> None:
        super().__init__()
        self._unit_of = {id(slot.parameter): unit for unit in units for slot in unit.slots}
        self._in_use, self._fetch, self._lent = in_use, fetch, lent
        self.found = False

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        keywords: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = keywords or {}
        borrowed = [
            unit
            for value in _flat((*arguments, *keywords.values()))
            if (unit := self._owner(value)) is not None and not self._in_use(unit)
        ]
        for unit in borrowed:
            self._fetch(unit)
        result = function(*arguments, **keywords)
        if borrowed and any(isinstance(value, Tensor) for value in _flat([result])):
            self.found = True
            for unit in borrowed:
                self._lent(unit, result)
        return result

    def _owner(self, value: object) -> Unit | None:
        if not isinstance(value, Tensor):
            return None
        base = value._base if value._is_view() else value
        return self._unit_of.get(id(base)) if isinstance(base, nn.Parameter) else None


def _flat(values: Iterable[object]) -> Iterator[object]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value
