"""Projections held against records of an emulated cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest
from record_factory import run

from suite.config_load import load
from suite.errors import UsageError
from suite.projection.against_emulation import compare
from suite.projection.record import emulated_records
from suite.records import Record, Spread, from_json, to_json

DETAILS = {"dilation": 10.0, "emulated_link_mbit_per_s": 201.0, "block_forward_s": 0.01065}


def emulated(impl: str, step_s: float, node_bytes: float, **options: object) -> Record:
    words = {"impl": {"name": impl, "options": options}, "workload": "bert-scale", "cluster": "p3dn"}
    config = load({**words, "testbed": {"name": "emulated", "nodes": 4, "ranks_per_node": 2}})
    return replace(
        run(impl),
        evidence="emulated",
        nodes=4,
        ranks_per_node=2,
        world_size=8,
        partition_size=options.get("partition_size", 8),  # type: ignore[arg-type]
        micro_steps=1,
        step_time_s=Spread.of([step_s]),
        inter_node_bytes_per_node=round(node_bytes),
        details=DETAILS,
        config=config.to_dict(),
    )


def test_what_was_seen_on_an_emulated_cluster_is_projected_within_a_tenth() -> None:
    """Medians of a run on two cores: nothing of the projection was fitted to them."""
    rows = compare([emulated("zero3", 0.232, 47.957e6), emulated("mics", 0.229, 29.246e6, partition_size=2)])
    for row in rows:
        assert abs(row.time_error) < 0.1
        assert abs(row.bytes_error) < 0.01


def test_a_projection_of_a_run_names_it_and_keeps_its_configuration() -> None:
    run = emulated("mics", 0.229, 29.246e6, partition_size=2)
    (record,) = emulated_records(compare([run]))
    assert record.stands_for == {"config_hash": run.config_hash, "cohort": run.cohort, "stage": run.stage}
    assert record.evidence == "projected" and record.config == run.config and not record.hierarchical
    assert record.compute_s + record.exposed_comm_s == pytest.approx(record.step_time_s)
    flops = run.model_tflops_per_gpu * run.step_time_s.median
    assert record.model_tflops_per_gpu * record.step_time_s == pytest.approx(flops)
    assert from_json(to_json(record)) == record


def test_other_methods_and_other_testbeds_are_left_out() -> None:
    with pytest.raises(UsageError, match="no records of zero3 or mics on an emulated cluster"):
        compare(
            [
                emulated("hsdp", 0.3, 1e6, partition_size=2),
                replace(emulated("zero3", 0.3, 1e6), evidence="measured"),
                emulated("zero3", 0.3, 1e6, stock_collectives=True),
                replace(emulated("mics", 0.3, 1e6, partition_size=4), world_size=12, ranks_per_node=3),
            ]
        )
