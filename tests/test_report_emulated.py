"""The report's sections about the emulated cluster: overlap, bounds, networks, two hops, projections."""

from __future__ import annotations

from dataclasses import replace

import pytest
import record_factory as factory

from suite.records import Record
from suite.reports.cohorts import group_cohorts, projections_of, stand_ins_of
from suite.reports.emulated import best_overlap, bound_s, link_s, overlap
from suite.reports.figures import styles_for
from suite.reports.networks import networks
from suite.reports.sections.ablations import ablation_section
from suite.reports.sections.bounds import bounds_section, held, projection_table
from suite.reports.sections.headline import headline_section, headline_table, headlines
from suite.reports.sections.hierarchical import hierarchical_pairs, hierarchical_section
from suite.reports.sections.networks import choice_table, loss_table, network_table
from suite.reports.sections.step_parts import parts_of
from suite.reports.sections.two_hops import accumulations, two_hops_table
from suite.reports.tables import Table, overlap_cell

STYLES = styles_for(list(factory.IMPLS))


def rows(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.head, (cell.text for cell in row), strict=True)) for row in table.rows]


def with_share(run: Record, share: float) -> Record:
    return replace(run, details={**run.details, "sent_while_computing_share": share})


def test_a_link_is_as_busy_as_its_bytes_take_and_a_step_no_shorter() -> None:
    # 0.2 Gbit/s per Gbit/s of the real node over a dilation of 10: 25 MB/s at 100 Gbit/s, undilated.
    run = factory.emulated("zero3", 4, 0.4, sent=5e7)
    assert link_s(run) == pytest.approx(5e7 / (20e6 / 8 * 10))
    assert bound_s(run) == pytest.approx(max(0.18, 2.0))
    assert best_overlap(run) == pytest.approx(0.18 / 2.0)


def test_overlap_is_what_was_counted_or_else_a_lower_bound_and_says_which() -> None:
    run = factory.emulated("zero3", 4, 0.4, sent=5e6, exposed_comm_s=0.05)
    assert overlap_cell(run).text == "≥ 75"
    assert overlap_cell(with_share(run, 0.81)).text == "81"
    waits_longer = replace(run, exposed_comm_s=0.5)
    assert overlap_cell(waits_longer).text == "≥ 0"


def test_what_hardly_sends_has_no_overlap() -> None:
    assert overlap(with_share(factory.emulated("mics", 4, sent=5e4), 0.5)) is None
    assert overlap(with_share(factory.emulated("floor", 4, sent=5e6), 0.5)) is None


def test_a_network_sweep_says_what_to_choose_at_each_bandwidth() -> None:
    (network,) = networks(factory.network_sweep())
    assert network.bandwidths == [25, 100, 400] and network.compared() == (400, 100)
    choices = rows(choice_table(network))
    assert [row["fastest"] for row in choices] == ["mics"] * 3
    assert [row["next"] for row in choices] == ["deepspeed-zero2"] * 3
    assert "floor" not in network.curves and len(network.floor) == 3
    at_25 = [row for row in rows(network_table(network)) if row["Gbit/s"] == "25"]
    assert {row["implementation"]: row["÷ fastest"] for row in at_25} == {
        "mics": "1.00",
        "deepspeed-zero2": "1.35",
        "deepspeed-zero3": "4.30",
        "floor": "–",
    }


def test_of_two_cohorts_at_one_bandwidth_the_larger_is_shown() -> None:
    sweep = factory.network_sweep()
    alone = [replace(run, stage="other", cohort="alone") for run in sweep if run.impl in ("floor", "mics")]
    (network,) = networks([*alone, *sweep])
    assert {run.cohort for run in network.curves["mics"].values()} == {"at 25.0", "at 100.0", "at 400.0"}


def test_methods_that_their_spread_does_not_tell_apart_are_both_a_choice() -> None:
    sweep = factory.network_sweep()
    twin = [
        replace(run, impl="zero3", config={**run.config, "impl": {"name": "zero3", "options": {}}})
        for run in sweep
        if run.impl == "mics"
    ]
    (network,) = networks([*sweep, *twin])
    choice = rows(choice_table(network))[0]
    assert {choice["fastest"], choice["no slower"]} == {"mics", "zero3"}
    assert choice["next"] == "deepspeed-zero2"


def test_the_loss_on_the_slower_network_is_a_share_of_throughput() -> None:
    (network,) = networks(factory.network_sweep())
    lost = {row["implementation"]: row for row in rows(loss_table(network))}
    key = "throughput lost from 400 to 100 Gbit/s, %"
    # 0.19 + 0.2 × 100 / Gbit/s: 0.24 s against 0.39 s.
    assert float(lost["deepspeed-zero3"][key]) == pytest.approx(100 * (1 - 0.24 / 0.39), abs=0.1)
    assert float(lost["deepspeed-zero3"]["low"]) < float(lost["deepspeed-zero3"][key])


def test_a_sweep_may_come_from_several_stages_that_time_differently_often() -> None:
    slow, fast = (
        [run for run in factory.network_sweep() if run.cohort == f"at {speed}"] for speed in (100.0, 400.0)
    )
    fast = [
        replace(
            run,
            stage="other",
            config={**run.config, "train": {**run.config["train"], "steps": 2, "warmup": 1}},
        )
        for run in fast
    ]
    (network,) = networks([*slow, *fast])
    assert network.bandwidths == [100, 400]


def test_one_bandwidth_is_no_sweep() -> None:
    assert networks(run for run in factory.network_sweep() if "100" in run.cohort) == []


def test_two_hops_save_a_sum_for_every_micro_step_but_the_last() -> None:
    (item,) = accumulations(factory.two_hops())
    assert [pair.on.micro_steps for pair in item.pairs] == [1, 2, 4]
    without = [row for row in rows(two_hops_table(item)) if row["÷ two hops"] != "–"]
    assert [row["more than two hops, MiB"] for row in without] == [row["predicted, MiB"] for row in without]
    assert [row["micro-steps"] for row in without] == ["1", "2", "4"]


def test_micro_steps_may_come_from_several_stages() -> None:
    runs = [replace(run, stage=f"{run.micro_steps} micro-steps") for run in factory.two_hops()]
    (item,) = accumulations(runs)
    assert len(item.pairs) == 3


def test_flat_and_hierarchical_are_pairs_of_one_partition_size_over_several_nodes() -> None:
    runs = factory.mics_ablation()
    (pair,) = hierarchical_pairs(runs)
    assert (pair.on.config["impl"]["options"], pair.off.config["impl"]["options"]) == (
        {"partition_size": 4},
        {"partition_size": 4, "hierarchical": False},
    )
    assert hierarchical_pairs([replace(run, partition_size=2) for run in runs]) == []
    section = hierarchical_section(group_cohorts(runs))
    assert section is not None and "32% fewer bytes" in section.findings[0]


def test_a_single_switch_has_a_section_of_its_own_and_is_no_ablation() -> None:
    assert ablation_section(group_cohorts(factory.two_hops())) is None
    assert ablation_section(group_cohorts(factory.mics_ablation())) is not None


def test_the_headline_is_that_of_the_most_nodes_and_says_what_is_missing() -> None:
    cohorts = group_cohorts([*factory.weak_scaling(), *factory.network_sweep()])
    (item,) = headlines(cohorts)
    assert item.mics.nodes == 4 and item.mics.config["cluster"]["inter_node_gbit_s"] == 100
    section = headline_section(cohorts, STYLES)
    assert section is not None and section.findings


def test_what_a_rival_lacks_to_the_published_ratio_is_waiting() -> None:
    cohorts = group_cohorts(
        [
            factory.emulated("mics", 4, 0.2, 1e6, exposed_comm_s=0.01),
            factory.emulated("deepspeed-zero3", 4, 0.3, 4e6, exposed_comm_s=0.11),
        ]
    )
    (item,) = headlines(cohorts)
    row = rows(headline_table(item))[0]
    assert row["step ÷ mics"] == "1.50"
    # 2.82 × 200 ms are 264 ms more than 300 ms: on top of 110 ms.
    assert float(row["exposed at × 2.82 would be, ms"]) == pytest.approx(374, abs=1)


def test_the_backend_s_own_collectives_are_a_second_column() -> None:
    stock = factory.emulated("mics", 4, 0.25, 1e6, options={"stock_collectives": True})
    cohorts = group_cohorts(
        [
            factory.emulated("mics", 4, 0.2, 1e6),
            factory.emulated("deepspeed-zero3", 4, 0.3, 4e6),
            stock,
        ]
    )
    (item,) = headlines(cohorts)
    row = rows(headline_table(item))[0]
    assert row["step ÷ mics"] == "1.50"
    assert row["step ÷ mics on the backend's own collectives"] == "1.20"


def test_the_parts_of_a_step_add_up_to_it() -> None:
    run = factory.emulated("mics", 4, 0.21, exposed_comm_s=0.02)
    parts = parts_of(run)
    assert parts is not None
    assert parts[:2] == (pytest.approx(180), pytest.approx(20))
    assert sum(parts) == pytest.approx(1000 * run.step_time_s.median)


def test_a_projection_is_held_against_the_run_that_it_stands_for() -> None:
    runs = factory.mics_ablation()
    other_cohort = replace(runs[0], cohort="another day")
    stand_ins = [factory.stand_in(runs[0], 0.29), factory.stand_in(other_cohort, 9.0)]
    found = [item for item in held(group_cohorts(runs), stand_ins) if item.projection]
    assert [item.run.config_hash for item in found] == [runs[0].config_hash]
    (row,) = rows(projection_table(found))
    assert (row["error, %"], row["within 5%"]) == ("-3.3", "yes")
    assert row["evidence"] == "emulated | projected"
    section = bounds_section(group_cohorts(runs), stand_ins, STYLES)
    assert section is not None and [plot.name for plot in section.plots] == [
        "emulated-bounds",
        "emulated-projected",
    ]


def test_what_stands_for_a_run_is_no_projection_of_a_cluster_that_nobody_ran() -> None:
    records = [factory.projection(), factory.stand_in(factory.emulated(), 0.2)]
    assert [item.stands_for is None for item in projections_of(records)] == [True]
    assert [item.stands_for is None for item in stand_ins_of(records)] == [False]
