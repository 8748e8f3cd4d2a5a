"""Projections as records: rows that the reports read beside the measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple
from datetime import UTC, datetime
from typing import Any

from suite.projection.against_emulation import LOCAL_BYTES_S, MESSAGE_S
from suite.projection.against_emulation import Comparison as Emulated
from suite.projection.assumptions import Assumptions, default_assumptions
from suite.projection.methods import find_method
from suite.projection.project import Projection, project
from suite.projection.published_runs import Comparison, Sensitivity
from suite.projection.scaling import Curve
from suite.projection.trace import around_the_turn
from suite.records import ProjectionRecord

PUBLISHED_STAGE = "published runs"
SCALING_STAGE = "weak scaling"
EMULATED_STAGE = "emulated runs"


def record_of(
    projection: Projection,
    assumptions: Assumptions | None = None,
    published: dict[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    stage: str = "",
) -> ProjectionRecord:
    """The projection as one flat row."""
    config, cluster, memory = projection.config, projection.config.cluster, projection.memory
    assert cluster is not None, "a projection has a cluster"
    return ProjectionRecord(
        impl=config.impl.name,
        workload=config.workload.name,
        cluster=cluster.name,
        world_size=projection.world_size,
        nodes=cluster.nodes,
        ranks_per_node=cluster.gpus_per_node,
        partition_size=projection.partition_size,
        hierarchical=projection.hierarchical,
        micro_batch=config.train.micro_batch,
        micro_steps=config.train.micro_steps,
        seq_len=config.workload.model.seq_len,
        precision=config.train.precision,
        activation_checkpointing=config.train.activation_checkpointing,
        n_params=projection.n_params,
        step_time_s=projection.step_s,
        compute_s=projection.compute_s,
        exposed_comm_s=projection.exposed_s,
        samples_per_s=projection.samples_per_s,
        model_tflops_per_gpu=projection.model_tflops_per_gpu,
        hardware_tflops_per_gpu=projection.hardware_tflops_per_gpu,
        share_of_peak=projection.share_of_peak,
        inter_node_bytes_per_node=projection.node_bytes,
        bytes_sent_per_rank=projection.sent_bytes,
        memory={**asdict(memory), "total": memory.total},
        fits_memory=memory.fits,
        assumptions=(assumptions or default_assumptions()).values(),
        config=config.to_dict(),
        config_hash=config.hash(),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        published=published,
        notes=list(notes),
        stage=stage,
        timeline=[list(astuple(span)) for span in around_the_turn(projection.spans)],
    )


def project_record(config: Any) -> ProjectionRecord:
    """A configuration's projection as a record. Raises UsageError for what cannot be."""
    return record_of(project(config))


def emulated_records(rows: Sequence[Emulated]) -> list[ProjectionRecord]:
    """One record for each run on an emulated cluster, of the same step on the same links."""
    return [_stand_in(row) for row in rows]


def _stand_in(row: Emulated) -> ProjectionRecord:
    run, machine = row.record, row.machine
    cluster, options = run.config["cluster"], run.config["impl"]["options"]
    wants = options.get("hierarchical", find_method(run.impl).hierarchical)
    faster = run.step_time_s.median / row.projected_s
    hardware = run.hardware_tflops_per_gpu * faster
    return ProjectionRecord(
        impl=run.impl,
        workload=run.workload,
        cluster=cluster["name"],
        world_size=run.world_size,
        nodes=run.nodes,
        ranks_per_node=run.ranks_per_node,
        partition_size=run.partition_size,
        hierarchical=wants and (run.partition_size or run.world_size) > run.ranks_per_node > 1,
        micro_batch=run.micro_batch,
        micro_steps=run.micro_steps,
        seq_len=run.seq_len,
        precision=run.precision,
        activation_checkpointing=run.config["train"]["activation_checkpointing"],
        n_params=run.n_params,
        step_time_s=row.projected_s,
        compute_s=machine.busy_s,
        exposed_comm_s=machine.compute_s - machine.busy_s,
        samples_per_s=run.samples_per_s * faster,
        model_tflops_per_gpu=run.model_tflops_per_gpu * faster,
        hardware_tflops_per_gpu=hardware,
        share_of_peak=hardware / cluster["peak_tflops"],
        inter_node_bytes_per_node=machine.node_bytes,
        bytes_sent_per_rank=machine.sent_bytes,
        memory={},
        fits_memory=True,
        assumptions={"local_bytes_s": LOCAL_BYTES_S, "message_s": MESSAGE_S},
        config=run.config,
        config_hash=run.config_hash,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        stands_for={key: getattr(run, key) for key in ("config_hash", "cohort", "stage")},
        stage=EMULATED_STAGE,
    )


def published_records(
    rows: Sequence[Comparison], assumptions: Assumptions, moved: Sequence[Sensitivity] = ()
) -> list[ProjectionRecord]:
    """One record per published number, of the (first) run behind it, with what was found to move it."""
    return [
        record_of(
            row.runs[0],
            assumptions,
            {
                **_published(row),
                "runs": [_run(projection) for projection in row.runs],
                "sensitivities": {
                    item.assumption: [*item.range, item.at_low, item.at_high]
                    for item in moved
                    if item.what == row.number.what
                },
            },
            (f"not stated by the source: {row.unstated}",) if row.unstated else (),
            PUBLISHED_STAGE,
        )
        for row in rows
    ]


def scaling_records(curve: Curve) -> list[ProjectionRecord]:
    """One record per cluster size; its efficiency and where the method stops are notes."""
    stops = "scales to the largest" if curve.stops_at is None else f"stops scaling at {curve.stops_at} GPUs"
    return [
        record_of(
            point.projection,
            notes=(
                "does not fit memory" if point.efficiency is None else f"efficiency {point.efficiency:.4f}",
                stops,
            ),
            stage=SCALING_STAGE,
        )
        for point in curve.points
    ]


def _run(projection: Projection) -> dict[str, Any]:
    return {
        "impl": projection.config.impl.name,
        "gpus": projection.world_size,
        "model_tflops_per_gpu": projection.model_tflops_per_gpu,
        "hardware_tflops_per_gpu": projection.hardware_tflops_per_gpu,
    }


def _published(row: Comparison) -> dict[str, Any]:
    number = row.number
    return {
        "what": number.what,
        "quantity": number.quantity,
        "unit": number.unit,
        "role": number.role,
        "source": number.source,
        "published": number.published,
        "projected": row.projected,
        "error": row.error,
        "within": row.within,
        "unstated": row.unstated,
    }
