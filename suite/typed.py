"""Dataclasses from JSON that may hold anything: every value is held against its field's type."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """An object of a dataclass, nested dataclasses included; fields with a default may be missing.

    Raises ValueError, naming the field, for a value of another type and KeyError for one that is
    missing. A float may be null wherever non-finite numbers can have been written: in lists and
    mappings, and in fields of classes that say so with `NULLABLE_FLOATS`.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{kind.__name__} is {_shown(values)}, not an object")
    hints = _hints(kind)  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        if item.name not in values:
            if item.default is item.default_factory is dataclasses.MISSING:
                raise KeyError(item.name)
            continue
        hint, value = hints[item.name], values[item.name]
        if dataclasses.is_dataclass(hint):
            given[item.name] = build(hint, value)  # type: ignore[arg-type]
            continue
        null_float = value is None and hint is float and getattr(kind, "NULLABLE_FLOATS", False)
        if not null_float and not fits(value, hint):
            raise ValueError(f"{item.name} is {_shown(value)}")
        given[item.name] = value
    return kind(**given)


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of that annotated type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if hint is None or hint is type(None):
        return value is None
    if origin is list:
        return isinstance(value, list) and all(_fits_inside(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits_inside(item, arguments[1]) for item in value.values())
    if hint in (int, float):
        kinds = (int, float) if hint is float else int
        number = isinstance(value, kinds) and not isinstance(value, bool)
        return number and abs(value) < 2**63  # which NaN and infinity are not either
    return isinstance(value, hint)


def _fits_inside(item: Any, hint: Any) -> bool:
    return fits(item, hint) or (hint is float and item is None)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _shown(value: Any) -> str:
    return repr(value)[:40]
