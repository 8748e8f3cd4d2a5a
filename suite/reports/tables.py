"""Tables as data: the same rows go to the HTML report, to the terminal and to CSV files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from suite.records import AnyRecord, CheckRecord, Record
from suite.reports.cohorts import FLOOR, Cohort, Ratio, curve_difference, flat, moment

NOTHING = "–"
MIB = 2**20


@dataclass(frozen=True)
class Cell:
    """What is shown, and the value behind it for sorting and CSV (None where there is none)."""

    text: str
    value: float | str | None = None

    @property
    def is_number(self) -> bool:
        return isinstance(self.value, (int, float)) or self.text == NOTHING


@dataclass(frozen=True)
class Table:
    """`head` names the columns, units included; the first cell of a row names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Per column, whether it holds numbers; such columns are set flush right."""
        return tuple(all(row[index].is_number for row in self.rows) for index in range(len(self.head)))

    def to_csv(self) -> str:
        """Unrounded values; an empty field where there is none."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.head)
        writer.writerows([[cell.value for cell in row] for row in self.rows])
        return text.getvalue()


def word(text: str | None) -> Cell:
    return Cell(text, text) if text else Cell(NOTHING)


def number(value: float | None, write: Callable[[float], str] | None = None) -> Cell:
    """A missing or non-finite number is shown as missing, never as 0."""
    if value is None or not math.isfinite(value):
        return Cell(NOTHING)
    return Cell((write or rounded)(value), value)


def rounded(value: float) -> str:
    """Three significant digits, more before the point where there are more."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def scientific(value: float) -> str:
    """Two significant digits: 7.5e-8."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def whole(value: float) -> str:
    return f"{value:.0f}"


@dataclass(frozen=True)
class TimeUnit:
    """Seconds or milliseconds, whichever reads better for a whole cohort."""

    name: str
    per_second: float

    @staticmethod
    def of(cohort: Cohort) -> TimeUnit:
        longest = max(run.step_time_s.median for run in cohort.members)
        return TimeUnit("s", 1) if longest >= 1 else TimeUnit("ms", 1000)


@dataclass(frozen=True)
class SpeedUnit:
    """GFLOPS for processors, TFLOPS for accelerators."""

    name: str
    per_tflops: float

    @staticmethod
    def of(cohort: Cohort) -> SpeedUnit:
        fastest = max(run.model_tflops_per_gpu for run in cohort.members)
        return SpeedUnit("TFLOPS", 1) if fastest >= 1 else SpeedUnit("GFLOPS", 1000)


def throughput_table(cohort: Cohort) -> Table:
    """The main table: step time with its spread, throughput, and ratios to ddp and to the floor."""
    time, speed = TimeUnit.of(cohort), SpeedUnit.of(cohort)
    recomputing = any(run.hardware_tflops_per_gpu != run.model_tflops_per_gpu for run in cohort.members)
    head = (
        "implementation",
        f"step, median {time.name}",
        f"min–max {time.name}",
        f"p95 {time.name}",
        "n",
        "samples/s",
        f"model {speed.name} per rank",
        *((f"hardware {speed.name} per rank",) if recomputing else ()),
        "step ÷ ddp",
        "step ÷ floor",
        "evidence",
    )

    def row(label: str, run: Record) -> tuple[Cell, ...]:
        step = run.step_time_s
        return (
            word(label),
            number(step.median * time.per_second),
            Cell(_range(step.min * time.per_second, step.max * time.per_second), step.min * time.per_second),
            number(step.p95 * time.per_second),
            number(step.n, whole),
            number(run.samples_per_s),
            number(run.model_tflops_per_gpu * speed.per_tflops),
            *((number(run.hardware_tflops_per_gpu * speed.per_tflops),) if recomputing else ()),
            ratio_cell(run, cohort.reference) if run is not cohort.floor else Cell(NOTHING),
            ratio_cell(run, cohort.floor),
            evidence_cell(run),
        )

    return Table("Step time and throughput", head, _per_run(cohort, row))


def brief_table(cohort: Cohort) -> Table:
    """The main table, narrow enough for a terminal."""
    time, speed = TimeUnit.of(cohort), SpeedUnit.of(cohort)

    def row(label: str, run: Record) -> tuple[Cell, ...]:
        step = run.step_time_s
        middle = step.median * time.per_second
        spread = _range(step.min * time.per_second, step.max * time.per_second)
        return (
            word(label),
            Cell(f"{rounded(middle)} ({spread})", middle),
            number(run.samples_per_s),
            number(run.model_tflops_per_gpu * speed.per_tflops),
            ratio_cell(run, cohort.reference, "≈ {}") if run is not cohort.floor else Cell(NOTHING),
            evidence_cell(run),
        )

    head = ("implementation", f"step {time.name} (range)", "samples/s", speed.name, "÷ ddp", "evidence")
    return Table(f"{cohort.key} {cohort.title}", head, _per_run(cohort, row))


def ratio_cell(run: Record, reference: Record | None, pattern: str = "{} no difference") -> Cell:
    """The ratio of the medians; `pattern` marks it where the spreads allow no difference."""
    if reference is None:
        return Cell(NOTHING)
    ratio = Ratio.of(run, reference)
    if run is reference:
        return Cell("1", 1.0)
    text = f"{ratio.median:.2f}"
    return Cell(text if ratio.differs else pattern.format(text), ratio.median)


def evidence_cell(run: Record) -> Cell:
    return word(f"{run.evidence}, noisy" if run.noise.get("noisy") else run.evidence)


def resources_table(cohort: Cohort) -> Table:
    """Memory and traffic. Traffic is per optimizer step."""

    def row(label: str, run: Record) -> tuple[Cell, ...]:
        return (
            word(label),
            _mebibytes(run.peak_memory_bytes),
            _mebibytes(run.bytes_sent_per_rank),
            _mebibytes(run.inter_node_bytes_per_node),
            number(run.partition_size, whole),
            evidence_cell(run),
        )

    head = (
        "implementation",
        "peak memory of a rank, MiB",
        "sent by a rank per step, MiB",
        "sent between nodes per node and step, MiB",
        "partition size",
        "evidence",
    )
    return Table("Memory and bytes", head, _per_run(cohort, row))


def fidelity_table(cohort: Cohort) -> Table:
    """Loss curves and gradient norms held against ddp's."""
    reference = cohort.reference

    def row(label: str, run: Record) -> tuple[Cell, ...]:
        losses = norms = None
        if reference is not None and run is not reference:
            losses = curve_difference(run.losses, reference.losses)
            norms = curve_difference(run.grad_norms, reference.grad_norms)
        return (
            word(label),
            number(run.losses[0] if run.losses else None, "{:.5f}".format),
            number(run.losses[-1] if run.losses else None, "{:.5f}".format),
            number(len(run.losses), whole),
            number(losses, scientific),
            number(norms, scientific),
            evidence_cell(run),
        )

    head = (
        "implementation",
        "first loss",
        "last loss",
        "steps",
        "largest relative difference of a loss to ddp's",
        "of a gradient norm",
        "evidence",
    )
    rows = tuple(row(label, run) for label, run in zip(cohort.labels, cohort.runs, strict=True))
    return Table("Loss curves", head, rows)


CHECK_LIMITS = {
    "gradient, abs.": "max_abs_grad_diff",
    "gradient, rel.": "max_rel_grad_diff",
    "parameter, abs.": "max_abs_param_diff",
    "between replicas": "max_replica_diff",
    "loss, abs.": "max_loss_diff",
    "gradient norm, rel.": "max_rel_grad_norm_diff",
}
_CHECK_HEAD = ("implementation", "workload", "ranks", "micro-steps", "precision", "verdict")


def correctness_table(checks: Iterable[CheckRecord]) -> Table:
    """One row per check; every difference beside its limit."""
    rows = (
        (
            *_check_cells(check),
            *(_against(getattr(check, key), check.tolerance.get(key)) for key in CHECK_LIMITS.values()),
        )
        for check in _worst_first(checks)
    )
    return Table("Largest differences to single-process torch", (*_CHECK_HEAD, *CHECK_LIMITS), tuple(rows))


def brief_check_table(checks: Iterable[CheckRecord]) -> Table:
    """The same for a terminal: of the differences only the one that comes closest to its limit."""

    def row(check: CheckRecord) -> tuple[Cell, ...]:
        micro_steps = "1 micro-step" if check.micro_steps == 1 else f"{check.micro_steps} micro-steps"
        training = f"{check.workload}, {check.precision}, {check.world_size} ranks, {micro_steps}"
        return word(check.impl), word(training), _ok(check), _closest(check)

    head = ("implementation", "training", "verdict", "closest to its limit")
    return Table("Checks against single-process torch", head, tuple(map(row, _worst_first(checks))))


def _worst_first(checks: Iterable[CheckRecord]) -> list[CheckRecord]:
    def order(check: CheckRecord) -> tuple[Any, ...]:
        training = (check.workload, check.precision, check.world_size, check.micro_steps)
        return (check.ok, check.impl, *training)

    return sorted(checks, key=order)


def _check_cells(check: CheckRecord) -> tuple[Cell, ...]:
    return (
        word(check.impl),
        word(check.workload),
        number(check.world_size, whole),
        number(check.micro_steps, whole),
        word(check.precision),
        _ok(check),
    )


def _ok(check: CheckRecord) -> Cell:
    return word("ok" if check.ok else "NOT OK")


def _closest(check: CheckRecord) -> Cell:
    def used(key: str) -> float:
        difference, limit = getattr(check, key), check.tolerance.get(key)
        if difference is None:  # not finite
            return math.inf
        return (difference / limit if limit else math.inf) if difference else 0.0

    name, key = max(CHECK_LIMITS.items(), key=lambda item: used(item[1]))
    return word(f"{name} {_against(getattr(check, key), check.tolerance.get(key)).text}")


def overview_table(cohorts: Sequence[Cohort]) -> Table:
    """Step time over ddp's: implementations down, cohorts across."""
    with_reference = [cohort for cohort in cohorts if cohort.reference is not None]
    labels = sorted({label for cohort in with_reference for label in cohort.labels})

    def cell(cohort: Cohort, label: str) -> Cell:
        if label not in cohort.labels:
            return Cell(NOTHING)
        return ratio_cell(cohort.runs[cohort.labels.index(label)], cohort.reference)

    rows = tuple((word(label), *(cell(cohort, label) for cohort in with_reference)) for label in labels)
    head = ("implementation", *(_short(cohort) for cohort in with_reference))
    return Table("Step time over that of ddp", head, rows)


def implementation_table(impl: str, cohorts: Sequence[Cohort]) -> Table:
    """Everything measured of one implementation, a row per cohort."""
    rows = []
    for cohort in cohorts:
        time, speed = TimeUnit.of(cohort), SpeedUnit.of(cohort)
        for label, run in members(cohort):
            if run.impl != impl:
                continue
            step = run.step_time_s
            rows.append(
                (
                    word(f"{cohort.key} {cohort.title}" + (f", {label}" if label != impl else "")),
                    Cell(f"{rounded(step.median * time.per_second)} {time.name}", step.median),
                    Cell(
                        f"{_range(step.min * time.per_second, step.max * time.per_second)} {time.name}",
                        step.min,
                    ),
                    number(step.n, whole),
                    number(run.samples_per_s),
                    Cell(
                        f"{rounded(run.model_tflops_per_gpu * speed.per_tflops)} {speed.name}",
                        run.model_tflops_per_gpu,
                    ),
                    ratio_cell(run, cohort.reference) if run.impl != FLOOR else Cell(NOTHING),
                    _mebibytes(run.peak_memory_bytes),
                    _mebibytes(run.bytes_sent_per_rank),
                    evidence_cell(run),
                )
            )
    head = (
        "cohort",
        "step, median",
        "min–max",
        "n",
        "samples/s",
        "model speed per rank",
        "step ÷ ddp",
        "peak memory, MiB",
        "sent per step, MiB",
        "evidence",
    )
    return Table(impl, head, tuple(rows))


def noise_table(cohorts: Sequence[Cohort]) -> Table:
    """What else happened on the machine during each cohort."""

    def row(cohort: Cohort) -> tuple[Cell, ...]:
        noises = [run.noise for run in cohort.members]

        def share(key: str) -> Cell:
            values = [noise[key] for noise in noises if noise.get(key) is not None]
            return number(100 * median(values) if values else None, "{:.1f}".format)

        return (
            word(f"{cohort.key} {cohort.title}"),
            share("ours"),
            share("others"),
            share("steal"),
            number(max((noise.get("attempts", 1) for noise in noises), default=None), whole),
            word("noisy" if any(noise.get("noisy") for noise in noises) else "quiet"),
            word(moment(cohort.any.started_at)),
            evidence_cell(cohort.any),
        )

    head = (
        "cohort",
        "used by us, % of the cores",
        "by others, %",
        "taken by the hypervisor, %",
        "attempts",
        "verdict",
        "started",
        "evidence",
    )
    return Table("Noise", head, tuple(map(row, cohorts)))


def environment_table(records: Sequence[AnyRecord]) -> Table:
    """Machine and versions; where results differ, every value with how many results have it."""
    environments = [flat(record.env) for record in records]
    keys = list(dict.fromkeys(key for environment in environments for key in environment))

    def shown(value: Any) -> str:
        return NOTHING if value in (None, [], {}) else str(value)

    def values(key: str) -> Cell:
        counts: dict[str, int] = {}
        for environment in environments:
            text = shown(environment.get(key))
            counts[text] = counts.get(text, 0) + 1
        if len(counts) == 1:
            return word(next(iter(counts)))
        return word("; ".join(f"{text} ({count} results)" for text, count in counts.items()))

    return Table("Environment", ("what", "value"), tuple((word(key), values(key)) for key in keys))


def members(cohort: Cohort) -> list[tuple[str, Record]]:
    """Labels and runs, the floor last."""
    pairs = list(zip(cohort.labels, cohort.runs, strict=True))
    return [*pairs, (FLOOR, cohort.floor)] if cohort.floor else pairs


def _short(cohort: Cohort) -> str:
    run = cohort.any
    micro_steps = "micro-step" if run.micro_steps == 1 else "micro-steps"
    return f"{cohort.key}: {run.workload}, {run.precision}, {run.micro_steps} {micro_steps}"


def _per_run(cohort: Cohort, row: Callable[[str, Record], tuple[Cell, ...]]) -> tuple[tuple[Cell, ...], ...]:
    rows = [row(label, run) for label, run in zip(cohort.labels, cohort.runs, strict=True)]
    if cohort.floor is not None:
        rows.append(row("floor (lower bound)", cohort.floor))
    return tuple(rows)


def _range(low: float, high: float) -> str:
    return f"{rounded(low)}–{rounded(high)}"


def _mebibytes(value: float | None) -> Cell:
    return number(None if value is None else value / MIB)


def _against(difference: float | None, limit: float | None) -> Cell:
    if difference is None:
        return Cell("not finite")
    shown = scientific(difference)
    return Cell(shown if limit is None else f"{shown} / {scientific(limit)}", difference)
