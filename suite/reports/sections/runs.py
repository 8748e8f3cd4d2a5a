"""Every timed run and every projection, each with a name that the claims point to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from suite.records import AnyRecord, CheckRecord, ProjectionRecord, Record
from suite.reports.cohorts import FLOOR, Cohort, moment, projections_of
from suite.reports.tables import (
    Cell,
    Table,
    evidence_cell,
    mebibytes,
    members,
    number,
    range_text,
    ratio_cell,
    whole,
    word,
)

Key = tuple[str, ...]


def key_of(record: AnyRecord) -> Key:
    """Tells any two results apart: one configuration may be measured again, in another stage or cohort,
    and may stand for several published numbers."""
    where = record.cohort if isinstance(record, Record) else ""
    what = (record.published or {}).get("what", "") if isinstance(record, ProjectionRecord) else ""
    return (record.schema, record.config_hash, record.started_at, record.stage, where, what)


def run_names(records: Iterable[AnyRecord], cohorts: Sequence[Cohort]) -> dict[Key, str]:
    """R1, R2, ... for what ran, in the order of the cohorts; P1, P2, ... for what was projected."""
    runs = [run for cohort in cohorts for _, run in members(cohort)]
    named = {key_of(run): f"R{index}" for index, run in enumerate(runs, 1)}
    projected = projections_of(records)
    return named | {key_of(record): f"P{index}" for index, record in enumerate(projected, 1)}


def runs_table(cohorts: Sequence[Cohort], names: Mapping[Key, str]) -> Table:
    """The comparison of everything that was timed: a row per run, units the same in all of them."""
    head = (
        "run",
        "implementation",
        "cohort",
        "stage",
        "workload",
        "precision",
        "nodes × ranks",
        "micro-steps",
        "step, median s",
        "min–max s",
        "n",
        "samples/s",
        "model TFLOPS per rank",
        "step ÷ ddp",
        "peak memory, MiB",
        "sent per rank and step, MiB",
        "exposed communication, s",
        "evidence",
        "configuration",
        "started",
    )
    rows = [_row(cohort, label, run, names) for cohort in cohorts for label, run in members(cohort)]
    return Table("Timed runs", head, tuple(rows))


def _row(cohort: Cohort, label: str, run: Record, names: Mapping[Key, str]) -> tuple[Cell, ...]:
    step = run.step_time_s
    return (
        word(names[key_of(run)]),
        word(label),
        Cell(cohort.key, cohort.key, f"#{cohort.key}"),
        word(run.stage),
        word(run.workload),
        word(run.precision),
        word(f"{run.nodes} × {run.ranks_per_node}"),
        number(run.micro_steps, whole),
        number(step.median),
        Cell(range_text(step.min, step.max), step.min),
        number(step.n, whole),
        number(run.samples_per_s),
        number(run.model_tflops_per_gpu),
        ratio_cell(run, cohort.reference, "≈ {}") if run.impl != FLOOR else word(None),
        mebibytes(run.peak_memory_bytes),
        mebibytes(run.bytes_sent_per_rank),
        number(run.exposed_comm_s),
        evidence_cell(run),
        word(run.config_hash),
        word(moment(run.started_at)),
    )


def projections_table(records: Iterable[AnyRecord], names: Mapping[Key, str]) -> Table:
    """What the model has computed: a row per projected step."""
    head = (
        "run",
        "method",
        "workload",
        "cluster",
        "nodes × GPUs",
        "stands for",
        "step, s",
        "TFLOPS per GPU (hardware)",
        "fits memory",
        "evidence",
        "configuration",
    )
    rows = tuple(
        (
            word(names[key_of(item)]),
            word(item.impl),
            word(item.workload),
            word(item.cluster),
            word(f"{item.nodes} × {item.ranks_per_node}"),
            word((item.published or {}).get("what")),
            number(item.step_time_s),
            number(item.hardware_tflops_per_gpu),
            word("yes" if item.fits_memory else "no"),
            word(item.evidence),
            word(item.config_hash),
        )
        for item in projections_of(records)
    )
    return Table("Projections", head, rows)


def evidence_of(records: Iterable[AnyRecord]) -> list[str]:
    """The kinds of evidence among these; a check compares numbers and times nothing."""
    return sorted({record.evidence for record in records if not isinstance(record, CheckRecord)})
