from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import record_factory as factory
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from suite.harness.sweep import read_sweep
from suite.records import Record, Spread
from suite.reports.claims import JUDGES, Verdict, judge, write_claims, write_sweeps
from suite.reports.cohorts import Ratio, group_cohorts
from suite.reports.judges.convergence import LOSS_TOLERANCE
from suite.reports.published import CLAIMS, NUMBERS, SOURCES
from suite.reports.repeat import sweep_of
from suite.reports.sections.runs import run_names
from suite.reports.verdicts import NOT_TESTABLE, VERDICTS


def verdict_on(claim: str, records: list) -> Verdict:
    return next(verdict for verdict in judge(records) if verdict.claim.id == claim)


def with_losses_off_by(impl: str, relative: float):
    run = factory.run(impl)
    return replace(run, losses=[*run.losses[:-1], run.losses[-1] * (1 + relative)])


def test_every_published_claim_gets_exactly_one_row_in_order():
    assert [verdict.claim.id for verdict in judge([])] == [
        *(f"Z{number}" for number in range(1, 10)),
        *(f"M{number}" for number in range(1, 9)),
    ]


def test_without_records_every_claim_says_what_a_test_would_need():
    for verdict in judge([]):
        assert verdict.verdict == NOT_TESTABLE
        assert verdict.missing == f"needs {verdict.claim.needs}: no such records among these results"
        assert not verdict.findings and not verdict.commands


def test_every_claim_has_a_judge_with_a_rule():
    assert all(JUDGES[claim.id].rule for claim in CLAIMS)


def test_same_convergence_is_reproduced_when_both_methods_follow_ddp():
    verdict = verdict_on("M8", factory.cohort(["floor", "ddp", "zero3", "mics"]))
    assert verdict.verdict == "reproduced"
    assert [finding.evidence for finding in verdict.findings] == ["measured"]
    assert "2 of 2" in verdict.findings[0].ours
    assert {run.config_hash for run in verdict.runs} == {
        factory.run(impl).config_hash for impl in ("ddp", "zero3", "mics")
    }


def test_a_curve_beyond_the_tolerance_is_named_and_spoils_the_verdict():
    records = [*factory.cohort(["ddp", "zero3"]), with_losses_off_by("mics", 3 * LOSS_TOLERANCE)]
    verdict = verdict_on("M8", records)
    assert verdict.verdict == "partly"
    assert "apart: mics" in verdict.findings[0].ours


def test_same_convergence_is_not_reproduced_when_no_curve_coincides():
    records = [factory.run("ddp"), with_losses_off_by("zero3", 0.01), with_losses_off_by("mics", 0.01)]
    assert verdict_on("M8", records).verdict == "not reproduced"


@pytest.mark.parametrize("impl", ["zero3", "mics"])
def test_one_method_alone_reproduces_the_claim_only_partly(impl: str):
    assert verdict_on("M8", factory.cohort(["ddp", impl])).verdict == "partly"


def test_a_loss_that_is_no_number_does_not_coincide():
    broken = replace(factory.run("mics"), losses=[None, *factory.run("mics").losses[1:]])  # type: ignore[list-item]
    assert verdict_on("M8", [factory.run("ddp"), broken]).verdict == "not reproduced"


def test_runs_of_other_trainings_are_not_compared():
    other = factory.run("mics")
    other = replace(other, config={**other.config, "train": {**other.config["train"], "seed": 1}})
    assert verdict_on("M8", [factory.run("ddp"), other]).verdict == NOT_TESTABLE


def test_only_fp32_runs_judge_convergence():
    assert (
        verdict_on("M8", factory.cohort(["ddp", "zero3", "mics"], precision="bf16")).verdict == NOT_TESTABLE
    )


def test_a_loss_that_never_moved_proves_nothing():
    records = [
        replace(run, losses=[7.7] * len(run.losses)) for run in factory.cohort(["ddp", "zero3", "mics"])
    ]
    assert verdict_on("M8", records).verdict == NOT_TESTABLE


STAGES = [
    factory.everything(),
    factory.weak_scaling(),
    factory.mics_ablation(),
    factory.two_hops(),
    factory.network_sweep(),
]
CHANGES: list[dict[str, Any]] = [
    {},
    {"exposed_comm_s": None},
    {"inter_node_bytes_per_node": None},
    {"inter_node_bytes_per_node": 0},
    {"partition_size": None},
    {"partition_size": 4},
    {"world_size": 2, "nodes": 1},
    {"world_size": 4, "nodes": 2},
    {"micro_steps": 1},
    {"precision": "bf16"},
    {"step_times_s": [0.2], "step_time_s": Spread.of([0.2])},
    {"losses": [], "grad_norms": []},
    {"peak_memory_bytes": None},
    {"details": {}},
    {"noise": {"noisy": True}},
]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(STAGES), st.sampled_from(CHANGES), st.integers(0, 30), st.sampled_from(CHANGES))
def test_no_strange_results_are_too_much_for_a_judge(stage: list, all_of: dict, number: int, one_of: dict):
    records = [replace(run, **all_of) if isinstance(run, Record) else run for run in stage]
    odd = number % len(records)
    if isinstance(records[odd], Record):
        records[odd] = replace(records[odd], **one_of)
    assert all(verdict.verdict in VERDICTS for verdict in judge(records))


def test_kinds_of_evidence_are_judged_apart():
    measured = factory.cohort(["ddp", "zero3", "mics"])
    emulated = [
        replace(run, evidence="emulated") for run in [factory.run("ddp"), with_losses_off_by("mics", 0.1)]
    ]
    verdict = verdict_on("M8", [*measured, *emulated])
    assert [(finding.evidence, finding.outcome) for finding in verdict.findings] == [
        ("emulated", "not reproduced"),
        ("measured", "reproduced"),
    ]
    assert verdict.verdict == "partly"


def test_the_sweep_of_a_row_repeats_the_configurations_of_its_runs(tmp_path: Path):
    records = factory.cohort(["ddp", "zero3", "mics"], workload="bert-tiny", micro_steps=4, ranks_per_node=2)
    records = [replace(run, config=_two_nodes(run.config)) for run in records]
    verdict = verdict_on("M8", records)
    write_sweeps(tmp_path, [verdict])
    assert verdict.commands == (
        "suite sweep sweeps/M8.yaml --out ../again",
        "suite report ../again --out ../again/report",
    )
    (cohort,) = read_sweep(tmp_path / "M8.yaml")
    assert [cell.to_dict() for cell in cohort.cells] == [run.config for run in records]


def test_the_sweep_of_a_row_keeps_its_stages_and_loses_no_run_of_them():
    (ddp,) = factory.cohort(["ddp"])
    again = replace(ddp, cohort="another")
    other = replace(ddp, cohort="a third", config={**ddp.config, "train": {**ddp.config["train"], "seed": 5}})
    other = replace(other, config_hash="0" * 16)
    stages = OmegaConf.create(sweep_of([ddp, again, other])).stages
    assert [stage.name for stage in stages] == ["run", "run 2", "run"]


def _two_nodes(config: dict) -> dict:
    testbed = {**config["testbed"], "nodes": 2, "ranks_per_node": 2}
    return {**config, "testbed": testbed, "train": {**config["train"], "clip": 1.0}}


def test_claims_json_holds_every_row_with_rule_and_runs(tmp_path: Path):
    records = factory.everything()
    names = run_names(records, group_cohorts(records))
    write_claims(tmp_path / "claims.json", judge(records), names)
    rows = json.loads((tmp_path / "claims.json").read_text())["claims"]
    assert len(rows) == len(CLAIMS)
    judged = next(row for row in rows if row["id"] == "M8")
    assert judged["verdict"] == "reproduced"
    assert judged["ours"][0]["evidence"] == "measured"
    assert "1e-5" in judged["rule"] and judged["commands"]
    assert {run["name"] for run in judged["runs"]} <= set(names.values())
    assert all(run["config_hash"] and run["link"] == f"index.html#{run['name']}" for run in judged["runs"])


def test_everything_published_names_a_known_source():
    keys = {source.key for source in SOURCES}
    for item in (*CLAIMS, *NUMBERS):
        assert item.sources and keys.issuperset(item.sources)


def test_published_flops_always_name_their_convention():
    for number in NUMBERS:
        assert (number.flops is not None) == ("TFLOPS" in number.value)


@given(
    st.lists(st.floats(0.1, 10), min_size=1, max_size=8), st.lists(st.floats(0.1, 10), min_size=1, max_size=8)
)
def test_two_step_times_differ_exactly_when_their_ranges_do_not_overlap(ours: list, theirs: list):
    first = replace(factory.run("zero3"), step_time_s=Spread.of(ours))
    second = replace(factory.run("ddp"), step_time_s=Spread.of(theirs))
    overlap = min(ours) <= max(theirs) and min(theirs) <= max(ours)
    assert Ratio.of(first, second).differs == (not overlap)
