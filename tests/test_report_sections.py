"""The sections that are there when their records are."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import record_factory as factory
from test_report import Page

from suite.records import Record
from suite.reports.build import build_report
from suite.reports.cohorts import Ratio, group_cohorts, runs_of
from suite.reports.scaling import families
from suite.reports.sections.ablations import ablations
from suite.reports.sections.projected import projected_section
from suite.reports.sections.resources import resources_table
from suite.reports.sections.throughput import brief_table, throughput_table
from suite.reports.sections.traffic import counts, traffic_table

SECTIONS = (
    "weak-scaling",
    "headline",
    "networks",
    "hierarchical",
    "two-hops",
    "bounds",
    "projected",
    "traffic",
    "ablations",
    "convergence",
    "memory",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(factory.full_report(), tmp_path_factory.mktemp("sections") / "out")


def test_every_section_is_there_with_its_figures_and_their_files(report: Path):
    text = report.read_text()
    for key in SECTIONS:
        section = text.split(f'<section id="{key}">')[1].split("</section>")[0]
        names = re.findall(r'<figure id="([^"]+)"', section)
        assert names, key
        for name in names:
            ElementTree.parse(report.parent / "figures" / f"{name}.svg")
            assert (report.parent / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
            assert len(list(csv.reader((report.parent / "figures" / f"{name}.csv").open()))) > 1


def test_the_page_with_every_section_is_well_formed_and_its_links_lead_somewhere(report: Path):
    page = Page(report.read_text())
    assert page.fetched == [] and page.open == []
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else (report.parent / link).is_file(), link


def test_sections_without_records_are_left_out(tmp_path: Path):
    text = build_report([factory.check("zero3")], tmp_path / "out").read_text()
    assert not any(f'<section id="{key}">' in text for key in SECTIONS)


def test_projections_alone_are_a_report(tmp_path: Path):
    text = build_report(factory.projections(), tmp_path / "out").read_text()
    assert '<section id="projected">' in text and "out of memory" in text


def test_efficiency_is_the_base_step_time_over_the_own_one():
    (family,) = families(factory.weak_scaling())
    curve = next(curve for curve in family.curves if curve.impl == "zero3")
    four = curve.at(4)
    assert four is not None
    against = {base: curve.efficiency(four, base) for base in (1, 2)}
    assert all(isinstance(ratio, Ratio) for ratio in against.values())
    assert [round(ratio.median, 3) for ratio in against.values() if ratio] == [0.5, 0.75]
    assert family.floor is not None and "floor" not in [curve.impl for curve in family.curves]


def test_different_work_per_rank_is_no_weak_scaling():
    batch = [
        replace(run, config={**run.config, "train": {**run.config["train"], "micro_batch": run.nodes}})
        for run in factory.weak_scaling()
    ]
    assert families(batch) == []


def test_the_newest_of_two_runs_of_one_size_is_on_the_curve():
    again = replace(factory.emulated("mics", 4, 0.9), started_at="2026-05-01T00:00:00+00:00")
    (family,) = families([again, *factory.weak_scaling()])
    newest = next(curve for curve in family.curves if curve.impl == "mics").at(4)
    assert newest is not None and newest.step_time_s.median == 0.9


def test_counted_bytes_outside_one_percent_stand_out():
    good = factory.emulated("mics", sent=1.005e6, details={"expected_inter_node_bytes": 1e6})
    bad = factory.emulated("zero3", sent=1.02e6, details={"expected_inter_node_bytes": 1e6})
    none = factory.emulated("hsdp", sent=1e6)
    rows = traffic_table(counts(group_cohorts([good, bad, none]))).rows
    assert {row[0].text: row[-2].text for row in rows} == {"mics": "yes", "zero3": "NO"}


def test_every_bar_of_an_ablation_names_and_links_its_claim(report: Path):
    (cohort,) = group_cohorts(factory.mics_ablation())
    assert [(item.claim, item.label) for item in ablations(cohort, "mics")] == [
        ("M2", "hierarchical off"),
        ("M3", "two_hop off"),
    ]
    section = report.read_text().split('<section id="ablations">')[1].split("</section>")[0]
    drawings = "".join(re.findall(r"<svg.*?</svg>", section, flags=re.DOTALL))
    for claim in ("Z4", "Z7", "M2", "M3"):
        assert f'<a href="#claim-{claim}"' in drawings
    assert "index.html" not in drawings


def test_a_projected_cluster_that_does_not_hold_the_model_has_no_efficiency():
    section = projected_section(factory.projections(), _styles())
    assert section is not None
    table = next(plot.table for plot in section.plots if plot.name == "projected-scaling-1")
    first, second = table.rows[:2]
    assert [cell.text for cell in first[2:4]] == ["–", "–"] and first[7].text == "out of memory"
    assert second[3].text == "100.0"


def _styles() -> dict:
    from suite.reports.figures import styles_for

    return styles_for(["mics", "zero3"])


def test_long_loss_curves_have_their_own_section_and_are_not_shown_twice(report: Path):
    text = report.read_text()
    section = text.split('<section id="convergence">')[1].split("</section>")[0]
    names = re.findall(r'<figure id="(c\d+-loss)"', section)
    assert len(names) == 1 and text.count(f'<figure id="{names[0]}"') == 1


def test_a_cohort_on_an_emulated_cluster_is_named_after_it():
    titles = [cohort.title for cohort in group_cohorts([*factory.weak_scaling(), factory.run("ddp")])]
    emulated = [title for title in titles if "as bert-10b on p3dn, 100 Gbit/s" in title]
    assert len(emulated) == 3 and len(set(titles)) == 4
    assert not any("None" in title for title in titles)


def test_the_bandwidths_of_two_clusters_tell_their_cohorts_apart():
    runs: list[Record] = [factory.emulated("zero3", gbit_s=speed) for speed in (100, 400)]
    assert [cohort.title.count("400 Gbit/s") for cohort in group_cohorts(runs)] in ([0, 1], [1, 0])
    assert len(runs_of(runs)) == 2


def test_accelerators_have_columns_of_their_own_and_processors_none_of_them():
    on_cpu = group_cohorts(factory.cohort())[0]
    details = {"peak_reserved_bytes": 3.0 * 2**20, "fragmentation": 0.25, "alloc_retries": 2.0}
    runs = [
        replace(
            run, mfu=0.4, hfu=0.5, hardware_tflops_per_gpu=1.25 * run.model_tflops_per_gpu, details=details
        )
        for run in factory.cohort()
    ]
    on_gpu = group_cohorts(runs)[0]
    for table, wanted in (
        (throughput_table, {"MFU %": 40.0, "HFU %": 50.0}),
        (brief_table, {"MFU %": 40.0}),
        (resources_table, {"reserved for it, MiB": 3.0, "fragmented %": 25.0, "retries": 2.0}),
    ):
        assert not wanted.keys() & set(table(on_cpu).head)
        found = table(on_gpu)
        for name, value in wanted.items():
            column = found.head.index(name)
            assert all(row[column].value == pytest.approx(value) for row in found.rows)
