"""How a reader repeats exactly one row of the claims: its runs as a sweep, timed in turns again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import OmegaConf

from suite.config import Config, presets
from suite.config_load import load
from suite.records import ProjectionRecord, Record
from suite.reports.cohorts import flat, training_key

AGAIN = "../again"
_PROJECT = f"suite project --published --out {AGAIN}"


def commands(runs: Iterable[Record | ProjectionRecord], sweep: str) -> tuple[str, ...]:
    """To be typed in the report's folder, where the file `sweep` lies."""
    kinds = {type(run) for run in runs}
    lines = [f"suite sweep {sweep} --out {AGAIN}"] if Record in kinds else []
    lines += [_PROJECT] if ProjectionRecord in kinds else []
    return (*lines, f"suite report {AGAIN} --out {AGAIN}/report")


def sweep_of(runs: Iterable[Record | ProjectionRecord]) -> str | None:
    """A sweep file with a stage per cohort; None when nothing of it was run."""
    cohorts: dict[tuple[str, str], list[Record]] = {}
    for run in runs:
        if isinstance(run, Record):
            cohorts.setdefault((run.cohort, training_key(run)), []).append(run)
    if not cohorts:
        return None
    stages = [
        {
            "name": name,
            "kind": "run",
            "impls": [run.config["impl"] for run in group],
            "base": _base(group[0].config),
        }
        for name, group in _named(cohorts.values())
    ]
    return OmegaConf.to_yaml(OmegaConf.create({"stages": stages}))


def _named(groups: Iterable[list[Record]]) -> Iterator[tuple[str, list[Record]]]:
    """Groups under the names of their stages, which keep weak scaling together; a group with a run that has
    been under that name already gets another name, or the sweep would take the run for finished."""
    taken: dict[str, set[str]] = {}
    for group in groups:
        stage, hashes = group[0].stage or "run", {run.config_hash for run in group}
        names = (stage if number == 1 else f"{stage} {number}" for number in itertools.count(1))
        name = next(name for name in names if not hashes & taken.setdefault(name, set()))
        taken[name] |= hashes
        yield name, group


def _base(config: dict[str, Any]) -> dict[str, Any]:
    """The keys, but for the implementation's, that differ from what the presets would give."""
    names = {key: config[key]["name"] for key in ("workload", "cluster") if config.get(key)}
    known = {key: name for key, name in names.items() if name in presets(f"{key}s")}
    usual = flat((load([f"{key}={name}" for key, name in known.items()]) if known else Config()).to_dict())
    base: dict[str, Any] = dict(names)
    for key, value in flat(config).items():
        shown = not key.startswith(("wandb.", "impl.", "workload.name", "cluster.name")) and key != "out"
        if shown and usual.get(key) != value:
            base[key] = value
    return base
