"""Judging the claims about networks, partition groups and paper scale."""

from __future__ import annotations

from dataclasses import replace

import pytest
import record_factory as factory

from suite.records import AnyRecord, Record
from suite.reports.claims import Verdict, judge
from suite.reports.judges.pairs import Pair
from suite.reports.judges.partition_groups import frequent_bytes, hop2_bytes


def verdict_on(claim: str, records: list[AnyRecord]) -> Verdict:
    return next(verdict for verdict in judge(records) if verdict.claim.id == claim)


def without(records: list[Record], *impls: str) -> list[AnyRecord]:
    return [run for run in records if run.impl not in impls]


def changed(records: list[Record], impl: str, nodes: int, **changes: object) -> list[AnyRecord]:
    return [
        replace(run, **changes) if (run.impl, run.nodes) == (impl, nodes) else run  # type: ignore[arg-type]
        for run in records
    ]


def test_hop_2_is_an_all_reduce_of_the_gradients_over_the_nodes():
    assert hop2_bytes(factory.emulated("mics", nodes=4)) == 2 * 3 / 4 * 4e6
    assert hop2_bytes(factory.emulated("mics", nodes=4, partition_size=4)) == 2 * 1 / 2 * 4e6 / 2
    assert hop2_bytes(factory.emulated("zero3", nodes=4)) == 0


def test_the_cost_stays_fixed_when_only_hop_2_leaves_the_node():
    verdict = verdict_on("M1", list(factory.weak_scaling()))
    assert verdict.verdict == "reproduced"
    assert "mics from 2 to 4 nodes: 0 → 0 MiB" in verdict.findings[0].ours
    assert {run.nodes for run in verdict.findings[0].runs if isinstance(run, Record)} == {2, 4}


def test_a_growing_exposed_communication_spoils_the_fixed_cost():
    records = changed(factory.weak_scaling(), "mics", 4, exposed_comm_s=0.1)
    assert verdict_on("M1", records).verdict == "partly"


def test_growing_bytes_are_no_fixed_cost():
    records = changed(factory.weak_scaling(), "mics", 4, inter_node_bytes_per_node=20_000_000)
    assert verdict_on("M1", records).verdict == "not reproduced"


def test_a_partition_size_that_changes_is_no_fixed_cost_to_judge():
    records = changed(factory.weak_scaling(), "mics", 4, partition_size=4)
    assert verdict_on("M1", records).verdict == "not testable here"


def test_weak_scaling_needs_zero3_beside_mics_and_a_network():
    assert verdict_on("M1", without(factory.weak_scaling(), "zero3")).verdict == "not testable here"
    local = [replace(run, testbed="local") for run in factory.weak_scaling()]
    assert verdict_on("M1", list(local)).verdict == "not testable here"


def test_hierarchical_collectives_are_held_against_the_formula():
    verdict = verdict_on("M2", list(factory.mics_ablation()))
    assert verdict.verdict == "reproduced"
    assert "× 1.500, predicted (4−1)/(4−2) = 1.500" in verdict.findings[0].ours


def test_too_few_bytes_saved_by_hierarchical_collectives_are_partly():
    on, flat, single = factory.mics_ablation()
    more = int(frequent_bytes(on) * 1.2 + hop2_bytes(on))
    verdict = verdict_on("M2", [on, replace(flat, inter_node_bytes_per_node=more), single])
    assert verdict.verdict == "partly"


def test_two_hops_save_one_hop_2_per_micro_step_and_time():
    verdict = verdict_on("M3", list(factory.mics_ablation()))
    assert verdict.verdict == "reproduced"
    assert "slower in 3 of 3 rounds" in verdict.findings[0].ours


def test_two_hops_that_save_bytes_but_no_time_are_partly():
    on, flat, single = factory.mics_ablation()
    as_fast = replace(single, step_time_s=on.step_time_s, step_times_s=on.step_times_s)
    assert verdict_on("M3", [on, flat, as_fast]).verdict == "partly"


def test_a_single_replica_has_no_second_hop_to_save():
    alone = [replace(run, world_size=4, nodes=2) for run in factory.mics_ablation()]
    assert verdict_on("M3", list(alone)).verdict == "not testable here"


def test_a_single_micro_step_says_nothing_about_two_hops():
    assert verdict_on("M3", list(factory.mics_ablation(micro_steps=1))).verdict == "not testable here"


@pytest.mark.parametrize(
    ("rival_s", "expected"), [(0.6, "reproduced"), (0.3, "partly"), (0.2, "not reproduced")]
)
def test_the_headline_is_the_best_ratio_on_a_slow_network(rival_s: float, expected: str):
    records = [factory.emulated("mics", step_s=0.2), factory.emulated("deepspeed-zero3", step_s=rival_s)]
    assert verdict_on("M4", list(records)).verdict == expected


def test_the_headline_is_about_slow_networks_only():
    records = [factory.emulated(impl, gbit_s=400.0) for impl in ("mics", "deepspeed-zero3")]
    assert verdict_on("M4", list(records)).verdict == "not testable here"


def test_emulated_and_projected_ratios_stand_beside_each_other():
    name = "MiCS against ZeRO-3, BERT-10B on p3dn (up to)"
    records = [factory.emulated("mics", step_s=0.2), factory.emulated("deepspeed-zero3", step_s=0.6)]
    verdict = verdict_on("M4", [*records, factory.published(name, 2.82, 2.46)])
    assert [(item.evidence, item.outcome) for item in verdict.findings] == [
        ("emulated", "reproduced"),
        ("projected", "partly"),
    ]
    assert verdict.verdict == "partly"
    assert "suite project --published --out ../again" in verdict.commands


def test_mics_must_beat_our_own_zero3_at_every_size():
    assert verdict_on("M7", list(factory.weak_scaling())).verdict == "reproduced"
    slower = factory.emulated("mics", 2, 0.5)
    records = changed(
        factory.weak_scaling(), "mics", 2, step_time_s=slower.step_time_s, step_times_s=slower.step_times_s
    )
    assert verdict_on("M7", records).verdict == "partly"


@pytest.mark.parametrize(
    ("mics", "zero3", "expected"), [(99, 74, "reproduced"), (90, 74, "partly"), (90, 90, "not reproduced")]
)
def test_projected_efficiencies_are_judged_in_points(mics: float, zero3: float, expected: str):
    names = ("MiCS 100 B, 128 → 512 GPUs", "ZeRO-3 100 B, 128 → 512 GPUs")
    records = [factory.published(names[0], 99.4, mics, "%"), factory.published(names[1], 72, zero3, "%")]
    verdict = verdict_on("M5", list(records))
    assert verdict.verdict == expected
    assert "points" in verdict.findings[0].ours


@pytest.mark.parametrize(("share", "expected"), [(0.55, "reproduced"), (0.5, "partly")])
def test_the_share_of_peak_decides_about_peak(share: float, expected: str):
    unit, names = "TFLOPS/GPU", {"MiCS 100 B, 64 p4d": 170, "MiCS 175 B, 16 p4de": 169}
    records = [
        factory.published(name, value, 160, unit, share_of_peak=share) for name, value in names.items()
    ]
    assert verdict_on("M6", list(records)).verdict == expected


def test_the_newest_projection_of_a_number_counts():
    name = "MiCS against ZeRO-3, BERT-10B on p3dn (up to)"
    old = factory.published(name, 2.82, 1.0)
    new = factory.published(name, 2.82, 2.8, started_at="2026-04-01T00:00:00+00:00")
    assert verdict_on("M4", [new, old]).verdict == "reproduced"


@pytest.mark.parametrize(
    ("slow3", "expected"), [(0.5, "reproduced"), (0.24, "partly"), (0.2, "not reproduced")]
)
def test_a_slower_network_is_judged_by_the_relative_drops(slow3: float, expected: str):
    records = [
        factory.emulated("deepspeed-zero2", step_s=0.2, gbit_s=400),
        factory.emulated("deepspeed-zero2", step_s=0.22, gbit_s=100),
        factory.emulated("deepspeed-zero3", step_s=0.21, gbit_s=400),
        factory.emulated("deepspeed-zero3", step_s=slow3, gbit_s=100),
    ]
    assert verdict_on("Z1", list(records)).verdict == expected


def test_drops_that_the_spread_does_not_tell_apart_reproduce_nothing():
    steps = {("deepspeed-zero2", 400): 0.2, ("deepspeed-zero2", 100): 0.2, ("deepspeed-zero3", 400): 0.2}
    records = [factory.emulated(impl, step_s=step_s, gbit_s=speed) for (impl, speed), step_s in steps.items()]
    records.append(factory.emulated("deepspeed-zero3", step_s=0.2004, gbit_s=100))
    assert verdict_on("Z1", list(records)).verdict == "not reproduced"


def test_nodes_of_one_host_have_no_network_between_them():
    slower = [
        factory.emulated(impl, step_s=step_s) for impl, step_s in (("mics", 0.2), ("deepspeed-zero3", 0.6))
    ]
    local = [replace(run, testbed="local", evidence="measured") for run in slower]
    assert verdict_on("M4", list(local)).verdict == "not testable here"
    networks = [
        replace(factory.emulated(impl, step_s=step_s, gbit_s=speed), testbed="local")
        for impl, speed, step_s in (
            ("deepspeed-zero2", 400, 0.2),
            ("deepspeed-zero2", 100, 0.22),
            ("deepspeed-zero3", 400, 0.2),
            ("deepspeed-zero3", 100, 0.5),
        )
    ]
    assert verdict_on("Z1", list(networks)).verdict == "not testable here"


def test_noisy_runs_count_where_no_quiet_ones_do_and_reproduce_nothing_fully():
    quiet = [factory.emulated("mics", step_s=0.2), factory.emulated("deepspeed-zero3", step_s=0.3)]
    noisy = [
        replace(run, noise={**run.noise, "noisy": True}, cohort="noisy")
        for run in (factory.emulated("mics", step_s=0.2), factory.emulated("deepspeed-zero3", step_s=0.6))
    ]
    assert "noisy" not in verdict_on("M4", [*quiet, *noisy]).findings[0].ours
    (finding,) = verdict_on("M4", list(noisy)).findings
    assert finding.outcome == "partly" and finding.ours.endswith("2 of these 2 runs are marked noisy")


def test_networks_compare_however_often_each_was_timed():
    fast = [factory.emulated(impl, step_s=0.2, gbit_s=400) for impl in ("deepspeed-zero2", "deepspeed-zero3")]
    slow = [
        factory.emulated(impl, step_s=step_s, gbit_s=100)
        for impl, step_s in (("deepspeed-zero2", 0.22), ("deepspeed-zero3", 0.3))
    ]
    fewer = [
        replace(run, config={**run.config, "train": {**run.config["train"], "steps": 2}}) for run in fast
    ]
    assert verdict_on("Z1", [*fewer, *slow]).verdict == "reproduced"
    harder = [
        replace(run, config={**run.config, "train": {**run.config["train"], "micro_batch": 4}})
        for run in fast
    ]
    assert verdict_on("Z1", [*harder, *slow]).verdict == "not testable here"


def test_one_network_says_nothing_about_a_slower_one():
    records = [factory.emulated(impl) for impl in ("deepspeed-zero2", "deepspeed-zero3")]
    assert verdict_on("Z1", list(records)).verdict == "not testable here"


def test_memory_on_a_processor_is_shown_and_decides_nothing():
    pair = [factory.run("zero3"), factory.run("zero3", options={"contiguous_arenas": False})]
    pair[1] = replace(pair[1], peak_memory_bytes=2 * (pair[0].peak_memory_bytes or 0))
    verdict = verdict_on("Z6", list(pair))
    assert verdict.verdict == "not testable here" and "no caching allocator" in verdict.findings[0].ours


@pytest.mark.parametrize(
    ("reserved", "flushes", "expected"),
    [(1.0, 0, "not reproduced"), (1.2, 0, "reproduced"), (1.0, 3, "reproduced")],
)
def test_what_an_accelerators_allocator_held_and_flushed_decides_about_arenas(
    reserved: float, flushes: int, expected: str
):
    def on_gpu(run: Record, share: float, retries: int) -> Record:
        details = {"peak_reserved_bytes": share * 1e9, "fragmentation": 0.1, "alloc_retries": float(retries)}
        return replace(run, device="H100", details=details)

    pair = [factory.run("zero3"), factory.run("zero3", options={"contiguous_arenas": False})]
    accelerated = [on_gpu(pair[0], 1.0, 0), on_gpu(pair[1], reserved, flushes)]
    verdict = verdict_on("Z6", list(accelerated))
    assert verdict.verdict == expected and f"{flushes} flushes" in verdict.findings[0].ours
    beside = [replace(run, cohort="on the processor") for run in pair]
    assert verdict_on("Z6", [*accelerated, *beside]).verdict == expected


def test_three_rounds_apart_are_slower_and_two_are_not():
    on, off = (replace(factory.run("zero3"), step_times_s=[s] * 3) for s in (1.0, 1.1))
    spread = [factory.Spread.of(run.step_times_s) for run in (on, off)]
    pair = Pair(replace(on, step_time_s=spread[0]), replace(off, step_time_s=spread[1]))
    assert pair.slower
    short = [replace(run, step_times_s=run.step_times_s[:2]) for run in (pair.on, pair.off)]
    assert not Pair(*short).slower
