"""A grid of runs and checks from one YAML file, resumable cell by cell.

A sweep file holds `stages`, each with a `kind` (`run`, `check` or `project`), the `impls`, a `base` (any
configuration keys) and a `grid` (dotted key -> values). Every combination of the grid is one
cohort: all implementations on exactly the same training, timed in turns when `kind` is `run`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from suite.config import Config
from suite.config_load import SHORT_KEYS, load
from suite.errors import SuiteError, UsageError, first_line, unknown
from suite.harness.check import References, check
from suite.harness.launch import Place, require, testbed_of
from suite.harness.measure import Failure, measure
from suite.harness.timeline import Timeline, write_timeline
from suite.harness.turns import measure_alone
from suite.records import RECORDS, AnyRecord, CheckRecord, ProjectionRecord, Record, append, read

Identity = tuple[str, str, str]
"""Of a cell: kind, stage, hash of its configuration."""

KINDS = ("run", "check", "project")
TIMELINES = "timelines"


@dataclass(frozen=True)
class Cohort:
    """Configurations that differ in their implementation only."""

    stage: str
    kind: str
    cells: list[Config]

    def title(self) -> str:
        train = self.cells[0].train
        parts = [
            self.stage,
            self.cells[0].workload.name,
            f"{self.cells[0].world_size} ranks",
            train.precision,
            f"{train.micro_steps} micro-step{'s' if train.micro_steps > 1 else ''}",
        ]
        parts += ["activation checkpointing"] if train.activation_checkpointing else []
        parts += [f"clip {train.clip:g}"] if train.clip is not None else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Progress:
    """Where a sweep stands; `left_s` is None until there is something to judge by."""

    done: int
    total: int
    doing: str
    left_s: float | None


@dataclass
class Outcome:
    """What a sweep did: `finished` in this call, `skipped` because they were finished before."""

    finished: list[AnyRecord] = field(default_factory=list)
    skipped: int = 0
    failures: list[Failure] = field(default_factory=list)

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.finished + other.finished, self.skipped + other.skipped, self.failures + other.failures
        )


def read_sweep(path: Path, overrides: Mapping[str, Any] | None = None) -> list[Cohort]:
    """The cohorts of a sweep file, in order; `overrides` (dotted keys) win over the file.

    Raises UsageError, naming the file and the stage, for anything that cannot be run.
    """
    if not path.is_file():
        raise UsageError(f"there is no sweep file {str(path)!r}; see configs/sweeps/")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise UsageError(f"{path} is not readable as YAML: {first_line(error)}") from error
    except Exception as error:  # yaml's own errors share no base class with OmegaConf's
        raise UsageError(f"{path} is not YAML: {first_line(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("stages"), list):
        raise UsageError(f"{path} has no list of stages; see configs/sweeps/ for examples")
    cohorts: list[Cohort] = []
    for stage in content["stages"]:
        cohorts += _stage_cohorts(path, stage, overrides or {})
    if not cohorts:
        raise UsageError(f"{path} has nothing to run: no stages, or a grid without values")
    return cohorts


def _stage_cohorts(path: Path, stage: Any, overrides: Mapping[str, Any]) -> Iterable[Cohort]:
    keys = ("name", "kind", "impls", "base", "grid")
    if not isinstance(stage, dict):
        raise UsageError(f"{path}: a stage must be a mapping with {', '.join(keys)}, not {stage!r}")
    for key in stage:
        if key not in keys:
            raise unknown(f"stage key in {path}", str(key), keys)
    name, kind = str(stage.get("name", "sweep")), stage.get("kind", "run")
    if kind not in KINDS:
        raise unknown(f"kind of stage {name!r} in {path}", str(kind), KINDS)
    for key in ("base", "grid"):
        if not isinstance(stage.get(key) or {}, dict):
            raise UsageError(f"{path}, stage {name!r}: {key} must be a mapping, not {stage[key]!r}")
    grid = {key: _as_list(values) for key, values in (stage.get("grid") or {}).items()}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        cells = []
        for impl in _as_list(stage.get("impls") or []):
            layers = (stage.get("base") or {}, point, _impl_keys(impl), overrides)
            try:
                cells.append(_cell(item for layer in layers for item in layer.items()))
            except UsageError as error:
                raise UsageError(f"{path}, stage {name!r}: {error}") from error
        if not cells:
            raise UsageError(f"{path}, stage {name!r} names no impls")
        yield Cohort(name, kind, cells)


def _cell(settings: Iterable[tuple[Any, Any]]) -> Config:
    """Later settings win over earlier ones."""
    content = OmegaConf.create({})
    for key, value in settings:
        try:
            # A preset's name may have been given in short: make room for keys below it.
            OmegaConf.update(content, _full_key(str(key), value), value, force_add=True)
        except Exception as error:  # keys and values that OmegaConf has no place for: many types
            raise UsageError(f"{key!r} cannot be set: {first_line(error)}") from error
    config = load(OmegaConf.to_container(content))  # type: ignore[arg-type]
    if config.out is not None:
        raise UsageError(f"out={config.out} has no meaning in a sweep; name the folder with --out")
    if config.train.checkpoint_every is not None:
        raise UsageError("train.checkpoint_every has no meaning in a sweep, whose cells are timed in turns")
    return config


def _impl_keys(impl: Any) -> dict[str, Any]:
    """`impls` holds names, or mappings like {name: mics, options: {partition_size: 2}}."""
    return {f"impl.{key}": value for key, value in impl.items()} if isinstance(impl, dict) else {"impl": impl}


def _full_key(key: str, value: Any) -> str:
    return f"{key}.name" if key in SHORT_KEYS and not isinstance(value, dict) else key


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def run_sweep(
    cohorts: Sequence[Cohort],
    out: Path,
    observe: Callable[[Progress], None] = lambda _: None,
    project: Callable[[Config], ProjectionRecord] | None = None,
    place: Place = testbed_of,
) -> Outcome:
    """Runs what `out/records.jsonl` does not hold yet and adds it there, cohort by cohort.

    `project` answers the cells of kind `project`: the model is another room of the house.
    A cell that fails or is not ok is reported in the outcome and tried again by the next call; the rest
    goes on. Raises UsageError, before anything runs, for options that an implementation does not have,
    packages that are missing and a testbed that is not there.
    """
    file = out / RECORDS
    todo = unfinished(cohorts, finished_in(file))
    require_all(todo, place)
    outcome = Outcome(skipped=cells(cohorts) - cells(todo))
    clock = Clock(cells(todo), observe)
    for cohort in todo:
        for results in _run_cohort(cohort, clock, project, place, out):
            records = [replace(item, stage=cohort.stage) for item in results if not isinstance(item, Failure)]
            outcome.failures += [item for item in results if isinstance(item, Failure)]
            append(file, *records)
            outcome.finished += records
    return outcome


def keep_timeline(out: Path, record: Record, timeline: Timeline) -> None:
    """Keeps a record's last timed step beside the records, for the report and for trace viewers."""
    name = "-".join([*record.stage.split(), record.impl, record.config_hash])
    name = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
    about = {key: getattr(record, key) for key in ("impl", "stage", "config_hash", "cohort")}
    write_timeline(out / TIMELINES / f"{name}.json", timeline, about)


def unfinished(cohorts: Iterable[Cohort], finished: Collection[Identity]) -> list[Cohort]:
    """The cohorts with those cells that are not finished."""
    todo = []
    for cohort in cohorts:
        left = [cell for cell in cohort.cells if (cohort.kind, cohort.stage, cell.hash()) not in finished]
        if left:
            todo.append(Cohort(cohort.stage, cohort.kind, left))
    return todo


def finished_in(file: Path) -> set[Identity]:
    """What need not run again. A check that was not ok does, until it is."""
    return {identity(item) for item in read(file) if not (isinstance(item, CheckRecord) and not item.ok)}


def require_all(cohorts: Iterable[Cohort], place: Place | None = None) -> None:
    """Raises UsageError for what would be refused in the middle of the sweep; where the cells run at that
    `place`, also for a testbed that is not there."""
    for cohort in cohorts:
        for cell in cohort.cells if cohort.kind != "project" else ():
            try:
                require(cell)
                if place is not None:
                    place(cell)
            except UsageError as error:
                raise UsageError(f"stage {cohort.stage!r}: {error}") from error


def cells(cohorts: Iterable[Cohort]) -> int:
    return sum(len(cohort.cells) for cohort in cohorts)


class Clock:
    """Turns finished cells into progress with an estimate of the time left."""

    def __init__(self, total: int, observe: Callable[[Progress], None]) -> None:
        self._total = total
        self._observe = observe
        self._done = 0
        self._start = time.monotonic()

    def say(self, doing: str) -> None:
        elapsed = time.monotonic() - self._start
        left = elapsed / self._done * (self._total - self._done) if self._done else None
        self._observe(Progress(self._done, self._total, doing, left))

    def finished(self, cells: int, doing: str) -> None:
        self._done += cells
        self.say(doing)


def _run_cohort(
    cohort: Cohort,
    clock: Clock,
    project: Callable[[Config], ProjectionRecord] | None,
    place: Place,
    out: Path,
) -> Iterable[Sequence[AnyRecord | Failure]]:
    """What belongs together is yielded together, as soon as it is there."""

    def say(text: str) -> None:
        clock.say(f"{cohort.title()}: {text}")

    def keep(record: Record, timeline: Timeline) -> None:
        keep_timeline(out, replace(record, stage=cohort.stage), timeline)

    if cohort.kind == "run":
        alone = cohort.cells[0].testbed.alone
        results = (
            measure_alone(cohort.cells, say, place) if alone else measure(cohort.cells, say, place, keep)
        )
        clock.finished(len(cohort.cells), cohort.title())
        yield results
        return
    if cohort.kind == "project":
        if project is None:
            raise UsageError(f"stage {cohort.stage!r} projects; run it with the `suite sweep` command")
        yield from _each(cohort, clock, project)
        return
    with References(shared=None if place is testbed_of else out) as references:
        yield from _each(cohort, clock, lambda cell: check(cell, references, place))


def _each(
    cohort: Cohort, clock: Clock, answer: Callable[[Config], AnyRecord]
) -> Iterable[Sequence[AnyRecord | Failure]]:
    for cell in cohort.cells:
        clock.say(f"{cohort.title()}: {cohort.kind}ing {cell.impl.name}")
        try:
            result: AnyRecord | Failure = answer(cell)
        except SuiteError as error:
            result = Failure(cell, error)
        clock.finished(1, cohort.title())
        yield [result]


_KIND_OF = {Record: "run", CheckRecord: "check", ProjectionRecord: "project"}


def identity(record: AnyRecord) -> Identity:
    """The same configuration may be a cell of several stages: a yardstick is measured in each."""
    return (_KIND_OF[type(record)], record.stage, record.config_hash)
