"""What the projection takes for granted: named numbers with a meaning and a plausible range.

They live in `configs/projection.yaml` alone. `suite project --calibrate` fits the few that are marked
`fitted`; the others are given, and their ranges say how far the truth may be from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from suite.config import CONFIGS

FILE = CONFIGS / "projection.yaml"


@dataclass(frozen=True)
class Assumption:
    """`value` lies in [`low`, `high`]; `meaning` says what it is, and in which unit."""

    name: str
    value: float
    low: float
    high: float
    meaning: str
    fitted: bool = False


@dataclass(frozen=True)
class Assumptions:
    """All of them by name. A name may be specific: `network_efficiency.efa-400g`."""

    entries: Mapping[str, Assumption]

    def value(self, name: str, kind: str | None = None) -> float:
        """Of `name.kind` where there is such an entry, else of `name`. Raises KeyError for neither."""
        specific = self.entries.get(f"{name}.{kind}") if kind is not None else None
        return (specific or self.entries[name]).value

    def with_values(self, values: Mapping[str, float]) -> Assumptions:
        """A copy in which these have other values. Raises KeyError for an unknown name."""
        changed = {name: replace(self.entries[name], value=value) for name, value in values.items()}
        return Assumptions({**self.entries, **changed})

    def only_fitting(self, names: Iterable[str]) -> Assumptions:
        """A copy in which a calibration may move these and no others."""
        free = set(names)
        entries = {name: replace(entry, fitted=name in free) for name, entry in self.entries.items()}
        return Assumptions(entries)

    @property
    def fitted(self) -> list[Assumption]:
        return [entry for entry in self.entries.values() if entry.fitted]

    def values(self) -> dict[str, float]:
        return {name: entry.value for name, entry in self.entries.items()}


@cache
def default_assumptions() -> Assumptions:
    """Those of `configs/projection.yaml`."""
    content: Any = OmegaConf.to_container(OmegaConf.load(FILE))
    entries = (_entry(name, given) for name, given in content["assumptions"].items())
    return Assumptions({entry.name: entry for entry in entries})


def _entry(name: str, given: Mapping[str, Any]) -> Assumption:
    low, high = given["range"]
    return Assumption(
        name,
        float(given["value"]),
        float(low),
        float(high),
        " ".join(given["meaning"].split()),
        bool(given.get("fitted", False)),
    )


def keep(assumptions: Assumptions, file: Path = FILE) -> None:
    """Writes the fitted values into the file, leaving its comments and everything else as they are."""
    name, lines = "", []
    for line in file.read_text().splitlines():
        heading = re.fullmatch(r"  ([\w.-]+):", line)
        name = heading.group(1) if heading else name
        if line.startswith("    value:") and assumptions.entries[name].fitted:
            line = f"    value: {assumptions.entries[name].value:.4g}"
        lines.append(line)
    file.write_text("\n".join(lines) + "\n")
