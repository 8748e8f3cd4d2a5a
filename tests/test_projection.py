"""Projected steps: memory, speed, plans, curves, records, the command."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import pytest

from suite.cli import main
from suite.config import Config
from suite.errors import UsageError
from suite.projection.assumptions import default_assumptions, keep
from suite.projection.calibrate import calibrate
from suite.projection.compute import Costs, Pass
from suite.projection.emulated import EmulatedCluster, project_emulated
from suite.projection.plan import make_plan
from suite.projection.project import memory_for, project
from suite.projection.published_runs import NUMBERS, evaluate, projected_config
from suite.projection.scaling import NODES, weak_scaling
from suite.records import ProjectionRecord, from_json, read, to_json


def config(*words: str) -> Config:
    return projected_config(["impl=mics", "workload=bert-10b", "cluster=p4d", "cluster.nodes=2", *words])


def test_zero3_of_10b_runs_out_of_memory_on_one_p3dn_node_and_not_on_two() -> None:
    words = ("impl=deepspeed-zero3-v0.5", "workload=roberta-10b", "cluster=p3dn", "train.micro_batch=8")
    fits = {nodes: memory_for(config(*words, f"cluster.nodes={nodes}")).fits for nodes in (1, 2, 16)}
    assert fits == {1: False, 2: True, 16: True}


def test_a_partition_size_that_is_left_open_is_the_smallest_that_fits() -> None:
    chosen = project(config("workload=bert-50b", "cluster.nodes=16", "train.micro_batch=8")).partition_size
    assert chosen is not None
    smaller = config("workload=bert-50b", "cluster.nodes=16", "train.micro_batch=8")
    smaller.impl.options = {"partition_size": chosen // 2}
    assert not memory_for(smaller).fits


def test_checkpointing_and_larger_micro_batches_move_memory_the_right_way() -> None:
    plain = memory_for(config("train.micro_batch=8")).total
    assert memory_for(config("train.micro_batch=16")).total > plain
    assert memory_for(config("train.micro_batch=8", "train.activation_checkpointing=false")).total > plain


def test_a_step_costs_the_same_to_project_on_100_000_gpus() -> None:
    big = config("impl=zero3", "workload=bert-100b", "cluster.nodes=12500", "train.micro_batch=8")
    start = time.perf_counter()
    projection = project(big)
    assert time.perf_counter() - start < 1.0
    assert projection.world_size == 100_000


def test_a_curve_leaves_out_the_clusters_that_its_partition_groups_do_not_fill() -> None:
    asked = weak_scaling(config("train.micro_batch=8", "impl.options.partition_size=16"), nodes=(1, 2, 3, 4))
    assert [point.gpus for point in asked.points] == [16, 32]
    # Left open: 64 ranks hold this one, on any number of nodes that eight divide.
    chosen = weak_scaling(config("workload=bert-50b", "train.micro_batch=8"))
    sizes = {point.projection.partition_size for point in chosen.points if point.efficiency is not None}
    assert sizes == {64} and chosen.points[-1].gpus == 8 * NODES[-1]
    with pytest.raises(UsageError, match=r"partition_size=3 does not fit 4 nodes of 8; use one of 1, 2, 4"):
        weak_scaling(config("impl.options.partition_size=3"), nodes=(1, 4))


@pytest.mark.parametrize(
    "words",
    [
        ("impl=ddp", "impl.options.two_hop=false"),
        ("impl=hsdp", "impl.options.hierarchical=true"),
        ("impl=deepspeed-zero2", "impl.options.prefetch_bucket_size=1000"),
        ("impl=deepspeed-mics", "impl.options.optimizer_sharding=world"),
    ],
    ids=lambda words: words[0],
)
def test_a_method_is_asked_only_for_what_it_has(words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=f"unknown option of {words[0].removeprefix('impl=')} to project"):
        project(config(*words))


def test_a_smaller_bucket_of_whole_gradients_is_sent_more_often() -> None:
    whole = project(config("impl=deepspeed-zero2"))
    assert (
        project(config("impl=deepspeed-zero2", "impl.options.reduce_bucket_size=50000000")).calls
        > whole.calls
    )


def test_methods_that_keep_fp32_shards_alone_hold_16_bytes_per_parameter() -> None:
    fsdp2, zero3 = (
        memory_for(config(f"impl={impl}", "cluster.nodes=2")).states for impl in ("fsdp2", "zero3")
    )
    assert fsdp2 / zero3 == pytest.approx(16 / 18)


def test_the_released_mics_gathers_in_two_stages_and_reduces_in_one() -> None:
    words = ("impl.options.partition_size=16", "impl.options.hierarchical=true")
    released, described = (project(config(f"impl={impl}", *words)) for impl in ("deepspeed-mics", "mics-s2"))
    assert released.hierarchical and described.hierarchical
    # One of three collectives passes 15 of 16 shards between the nodes instead of 8.
    assert released.node_bytes / described.node_bytes == pytest.approx((2 * 8 + 15) / (3 * 8), rel=0.02)


def test_hierarchical_gathers_carry_less_between_nodes() -> None:
    words = ("impl.options.partition_size=16", "train.micro_batch=4")
    flat = project(config(*words, "impl.options.hierarchical=false"))
    staged = project(config(*words, "impl.options.hierarchical=true"))
    assert staged.node_bytes / flat.node_bytes == pytest.approx((16 - 8) / 15, rel=0.01)


def test_more_micro_steps_amortise_the_second_hop() -> None:
    words = ("cluster=p3dn", "cluster.nodes=16", "impl.options.partition_size=8", "train.micro_batch=8")
    rates = [project(config(*words, f"train.micro_steps={n}")).model_tflops_per_gpu for n in (1, 4, 16)]
    assert rates == sorted(rates) and rates[-1] > rates[0]


def test_the_cost_of_partition_groups_does_not_grow_with_the_cluster_and_zero3_s_does() -> None:
    words = ("cluster=p3dn", "train.micro_batch=8", "train.micro_steps=8")
    mics = weak_scaling(config(*words), nodes=(2, 64, 1024))
    zero3 = weak_scaling(config(*words, "impl=zero3"), nodes=(2, 64, 1024))
    assert mics.points[-1].efficiency is not None and mics.points[-1].efficiency > 0.85
    assert zero3.stops_at == 8192 and zero3.points[0].efficiency == pytest.approx(1.0)


def test_the_plan_for_bert_50b_on_128_gpus_fits_is_sorted_and_says_why_others_lost() -> None:
    plan = make_plan("bert-50b", "p4d", 128)
    rates = [item.projection.model_tflops_per_gpu for item in plan.fastest]
    assert len(rates) == 5 and all(later <= 1.005 * sooner for sooner, later in pairwise(rates))
    assert all(item.projection.memory.fits for item in plan.fastest)
    memory = [item.projection.memory.total for item in plan.fastest if item.reason.startswith("as fast")]
    assert memory == sorted(memory), "what is as fast comes in the order of what it needs"
    assert [bool(item.reason) for item in plan.fastest] == [False, True, True, True, True]
    assert any("out of memory" in line for line in plan.lost)


def test_the_command_answers_with_one_json_object_and_a_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    words = ["impl=mics", "workload=bert-10b", "cluster=p4d", "cluster.nodes=4", "train.micro_steps=3"]
    assert main(["project", *words, "--json", "--trace", str(trace), "--out", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["evidence"], record["world_size"], record["nodes"]) == ("projected", 32, 4)
    assert record["assumptions"] == default_assumptions().values()
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    end_s = max(event["ts"] + event["dur"] for event in spans) / 1e6
    assert end_s == pytest.approx(record["step_time_s"], rel=1e-6)
    (kept,) = read(tmp_path / "records.jsonl")
    assert isinstance(kept, ProjectionRecord) and from_json(to_json(kept)) == kept


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["impl=mics"], "needs a cluster"),
        (["impl=mixs", "cluster=p4d"], "did you mean 'mics'?"),
        (["impl=mics", "cluster=p4d", "impl.options.partition_size=3"], "use one of 1, 2, 4, 8"),
        (["impl=zero3", "cluster=p4d", "impl.options.partition_size=8"], "no partition groups"),
        (["impl=mics", "cluster=p4d", "impl.options.partition=8"], "did you mean 'partition_size'?"),
        (["impl=deepspeed-zero2", "cluster=p4d", "impl.options.reduce_bucket_size=-1"], "must be at least 1"),
        (["--published", "cluster=p4d"], "leave 'cluster=p4d' out"),
        (["--emulated", "results", "--trace", "step.json"], "leave options, --trace"),
    ],
)
def test_what_cannot_be_projected_is_one_clear_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["project", *words]) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split()) and error.count("\n") == 1


def test_a_sweep_projects_its_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        "stages: [{name: scaling, kind: project, impls: [mics, zero3], grid: {cluster.nodes: [2, 4]}, "
        "base: {workload: bert-10b, cluster: p4d, train: {precision: bf16}, wandb: {mode: disabled}}}]"
    )
    for _ in range(2):  # the second finds everything finished
        assert main(["sweep", str(sweep), "--out", str(tmp_path / "results")]) == 0
    records = read(tmp_path / "results" / "records.jsonl")
    assert [(r.impl, r.world_size, r.stage) for r in records] == [
        (impl, gpus, "scaling") for gpus in (16, 32) for impl in ("mics", "zero3")
    ]


def test_the_calibration_recovers_the_value_that_made_the_numbers() -> None:
    """Numbers that the model itself made with another value, from the usual start."""
    name = "network_efficiency.efa-400g"
    given = default_assumptions()
    numbers = [number for number in NUMBERS if number.what == "RoBERTa-50B, ZeRO-3 before, 8 p4d"]
    made = [row.made() for row in evaluate(given.with_values({name: 0.6}), numbers)]
    found = calibrate(given.only_fitting([name]), made, tried=3, starts=1)
    assert found.value(name) == pytest.approx(0.6, rel=0.03)


def test_keeping_fitted_values_changes_nothing_else(tmp_path: Path) -> None:
    from suite.projection.assumptions import FILE

    copy = tmp_path / "projection.yaml"
    copy.write_text(FILE.read_text())
    keep(default_assumptions().with_values({"stall_ms_per_gb": 0.25}), copy)
    changed = [
        (before, after)
        for before, after in zip(FILE.read_text().splitlines(), copy.read_text().splitlines(), strict=True)
        if before != after
    ]
    assert [after for _, after in changed] == ["    value: 0.25"]


def test_an_emulated_cluster_is_projected_from_its_own_links_and_paces() -> None:
    """Worked out by hand: two nodes of one rank, nothing but one gather, one reduction and the paces."""
    shape = [f"workload.model.{key}" for key in ("layers=1", "hidden=64", "vocab=512", "seq_len=16")]
    words = ["impl=zero3", "workload=bert-tiny", "train.precision=fp32", *shape]
    words.append("train.activation_checkpointing=false")
    costs = Costs(Pass(0.1, 0.2), Pass(0.0, 0.0), Pass(0.0, 0.0))
    cluster = EmulatedCluster(2, 1, 1e6, 1e9, 0.0, 0.0, costs, optimizer_s=0.05)
    machine = project_emulated(projected_config(words), cluster)
    projection_bytes = machine.node_bytes
    n_bytes = 4 * projected_parameters(words)
    assert projection_bytes == pytest.approx(n_bytes, rel=0.01)  # gather and reduce, half of it each
    assert machine.busy_s == pytest.approx(0.35)
    assert machine.compute_s == pytest.approx(0.05 + n_bytes / 1e6 + 0.3, rel=0.5)


def projected_parameters(words: list[str]) -> int:
    from suite.workloads.models import n_params

    return n_params(projected_config(words).workload.model)
