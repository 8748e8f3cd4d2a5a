"""The result records and their file: append-only JSON lines, one finished result per line.

The harness writes them; the reports read them. What could not be measured is None, never 0.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from suite import typed
from suite.errors import OutputError, UsageError
from suite.secrets import mask

RECORDS = "records.jsonl"
"""In a results folder."""
RUN_SCHEMA = "run/1"
CHECK_SCHEMA = "check/1"
PROJECTION_SCHEMA = "projection/1"


@dataclass(frozen=True)
class Spread:
    """A repeated measurement, in the unit that its field names."""

    median: float
    min: float
    max: float
    p95: float
    n: int

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        """Raises ValueError when there is no value."""
        ordered = sorted(values)
        if not ordered:
            raise ValueError("a spread needs at least one value")
        n = len(ordered)
        middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
        # Nearest rank: with few repetitions the 95th percentile is the maximum, not an invention.
        p95 = ordered[max(0, -(-95 * n // 100) - 1)]
        return Spread(middle, ordered[0], ordered[-1], p95, n)


@dataclass(frozen=True)
class Record:
    """One measured run of one implementation; flat enough to be a row of a table.

    Units are in the names: `_s` seconds, `_bytes` bytes, `tflops` 1e12 floating-point operations
    per second. Bytes are per optimizer step. `losses` and `grad_norms` are in step order, warm-up
    included. Records with the same `cohort` were timed interleaved in one run and may be compared with
    each other; `stage` is the sweep's stage that asked for the record, empty outside a sweep. `details`
    are figures of the implementation's own, per step, units in their names, and on accelerators those of
    the allocator. `step_times_s` are the raw repetitions behind the spread, in the order they were taken.

    `device` is the accelerator's name, `peak_tflops` its peak for this precision, and `mfu` and `hfu` the
    shares of it that the model's and the hardware FLOPs are; None on the CPU and for devices whose peak
    is not known. `attention` is the kernel that torch picked. Lines from before these were added lack
    them.
    """

    evidence: str
    impl: str
    workload: str
    testbed: str
    world_size: int
    nodes: int
    ranks_per_node: int
    partition_size: int | None
    micro_batch: int
    micro_steps: int
    seq_len: int
    precision: str
    n_params: int
    step_time_s: Spread
    step_times_s: list[float]
    samples_per_s: float
    model_tflops_per_gpu: float
    hardware_tflops_per_gpu: float
    peak_memory_bytes: int | None
    inter_node_bytes_per_node: int | None
    bytes_sent_per_rank: int | None
    exposed_comm_s: float | None
    losses: list[float]
    grad_norms: list[float]
    noise: dict[str, Any]
    env: dict[str, Any]
    config: dict[str, Any]
    config_hash: str
    started_at: str
    cohort: str
    notes: list[str] = field(default_factory=list)
    details: dict[str, float] = field(default_factory=dict)
    device: str | None = None
    peak_tflops: float | None = None
    mfu: float | None = None
    hfu: float | None = None
    attention: str | None = None
    stage: str = ""
    schema: str = RUN_SCHEMA


@dataclass(frozen=True)
class CheckRecord:
    """An implementation held against the single-process reference.

    Gradients are those of step 1, parameters those after the last step, both in fp32 and compared
    on every rank; `max_replica_diff` is how far the ranks' own copies of the parameters lie apart.
    `tolerance` holds the limit for each of the `max_*` fields, `worst` names the parameter behind
    some of them.
    """

    impl: str
    workload: str
    world_size: int
    micro_steps: int
    precision: str
    steps: int
    max_abs_grad_diff: float
    max_rel_grad_diff: float
    max_abs_param_diff: float
    max_replica_diff: float
    max_loss_diff: float
    max_rel_grad_norm_diff: float
    tolerance: dict[str, float]
    ok: bool
    worst: dict[str, str]
    env: dict[str, Any]
    config: dict[str, Any]
    config_hash: str
    started_at: str
    notes: list[str] = field(default_factory=list)
    stage: str = ""
    schema: str = CHECK_SCHEMA

    NULLABLE_FLOATS: ClassVar[bool] = True
    """A difference may be infinite."""


@dataclass(frozen=True)
class ProjectionRecord:
    """One step that a model has computed and nobody has run; `evidence` is always `projected`.

    Units as in `Record`; bytes and seconds are per step. `compute_s` is what the GPU is busy,
    `exposed_comm_s` what it waits. `memory` holds bytes by what they are for, and the limit.
    `assumptions` are the numbers that the model took for granted, by name. A record that stands for a
    published number carries it in `published`: what, quantity, role (fitted or predicted), the
    published and the projected value, error, source, what of the conditions is ours, the runs that it
    is made of, and how far it moves with each assumption. A record that stands for an emulated run, on
    that run's links and paces, names it in `stands_for`: its config_hash, cohort and stage; times and
    bytes are those of the emulated cluster then, undilated. `timeline` holds (stream, name, start, end
    in seconds) around the turn from forward to backward, where a timeline was asked for.
    """

    impl: str
    workload: str
    cluster: str
    world_size: int
    nodes: int
    ranks_per_node: int
    partition_size: int | None
    hierarchical: bool
    micro_batch: int
    micro_steps: int
    seq_len: int
    precision: str
    activation_checkpointing: bool
    n_params: int
    step_time_s: float
    compute_s: float
    exposed_comm_s: float
    samples_per_s: float
    model_tflops_per_gpu: float
    hardware_tflops_per_gpu: float
    share_of_peak: float
    inter_node_bytes_per_node: float
    bytes_sent_per_rank: float
    memory: dict[str, float]
    fits_memory: bool
    assumptions: dict[str, float]
    config: dict[str, Any]
    config_hash: str
    started_at: str
    published: dict[str, Any] | None = None
    stands_for: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    env: dict[str, Any] = field(default_factory=dict)
    stage: str = ""
    timeline: list[list[Any]] = field(default_factory=list)
    evidence: str = "projected"
    schema: str = PROJECTION_SCHEMA


AnyRecord = Record | CheckRecord | ProjectionRecord
_KINDS: dict[str, type[AnyRecord]] = {
    RUN_SCHEMA: Record,
    CHECK_SCHEMA: CheckRecord,
    PROJECTION_SCHEMA: ProjectionRecord,
}


def to_json(record: AnyRecord) -> str:
    """One line of JSON. Non-finite numbers become null: JSON has none; secrets are masked."""
    return json.dumps(_clean(asdict(record)), allow_nan=False)


def from_json(line: str) -> AnyRecord:
    """Raises UsageError when the line is not a record of a schema that this version knows."""
    try:
        values = json.loads(line, parse_constant=_no_constant)
        record = typed.build(_KINDS[values["schema"]], values)
        _require_names(record)
        return record
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else error
        raise UsageError(f"not a result record ({reason}): {line[:80]!r}") from error


def append(path: Path, *records: AnyRecord) -> None:
    """Adds records durably, all or none. A line that an earlier crash left unfinished is cut off first.

    Raises OutputError, which holds the records' lines, when they cannot be written.
    """
    lines = "".join(to_json(record) + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = _cut_unfinished_line(file)
            try:
                _write_whole(file, lines.encode())
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise OutputError(
            f"cannot write to {path}: {error.strerror}; what is in it is kept. Make room and run again, or "
            "add the lines above to it by hand",
            details=lines,
        ) from error


def read(path: Path) -> list[AnyRecord]:
    """All finished records; an unfinished last one (a crash while writing) is left out."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    records: list[AnyRecord] = []
    for number, line in enumerate(text[: _finished(text)].splitlines(), 1):
        try:
            records.append(from_json(line.decode(errors="replace")))
        except UsageError as error:
            raise UsageError(f"{path}, line {number}: {error}; remove that line to go on") from error
    return records


def _require_names(record: AnyRecord) -> None:
    """Reports name files after these; a file from elsewhere must not choose where they lie."""
    for key in ("evidence", "impl", "workload", "testbed", "cluster", "precision"):
        name = getattr(record, key, None)
        if name is not None and not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(f"{key} is {name[:40]!r}")


def _finished(content: bytes) -> int:
    """Bytes of it that are whole records: the last line may have been cut off in writing or, when an editor
    has added it, want nothing but its end."""
    end = content.rfind(b"\n") + 1
    try:
        from_json(content[end:].decode())
    except (UsageError, UnicodeDecodeError):
        return end
    return len(content)


def _cut_unfinished_line(file: Any) -> int:
    """Returns the length that is left."""
    file.seek(0)
    content = file.read()
    end = _finished(content)
    file.truncate(end)
    if not content[:end].endswith(b"\n") and end:
        _write_whole(file, b"\n")
        end += 1
    return end


def _write_whole(file: Any, content: bytes) -> None:
    while content:
        content = content[file.write(content) :]


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
