from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import record_factory as factory
from rich.console import Console

from suite.errors import UsageError
from suite.reports import tables
from suite.reports.build import Description, build_report
from suite.reports.cohorts import group_cohorts
from suite.reports.figures import styles_for
from suite.reports.sections import losses, resources, throughput
from suite.reports.sections.cohort import cohort_plots
from suite.reports.terminal import terminal_table

SMALL = ["floor", "ddp", "zero3", "mics"]


class Page(HTMLParser):
    """What a browser would fetch, and whether tags are balanced."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if "src" in values or tag == "link":
            self.fetched.append(str(values))
        if values.get("id"):
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values["href"])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    records = [*factory.cohort(SMALL), factory.check("zero3"), factory.check("mics", ok=False)]
    descriptions = {"mics": Description("mics", "Partition groups & <hops>.", "no overlap", ("a shim",))}
    return build_report(records, tmp_path_factory.mktemp("report") / "out", descriptions)


def test_the_page_is_self_contained_and_well_formed(report: Path):
    page = Page(report.read_text())
    assert page.fetched == []
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert "@import" not in report.read_text() and "url(http" not in report.read_text()


def test_every_link_of_the_page_leads_somewhere(report: Path):
    page = Page(report.read_text())
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        else:
            assert (report.parent / link).is_file(), link


def test_every_figure_has_a_text_alternative_a_table_and_three_files(report: Path):
    text = report.read_text()
    figures = re.findall(r"<figure.*?</figure>", text, flags=re.DOTALL)
    assert len(figures) == 5 + 4 + 1  # per cohort, per implementation, and memory
    for figure in figures:
        assert 'role="img"' in figure and re.search(r"<title id=[^>]*>[^<]+</title>", figure)
        assert "Measured" in figure and "<table" in figure
    assert sorted(path.suffix for path in (report.parent / "figures").iterdir()) == sorted(
        [".csv", ".pdf", ".svg"] * len(figures)
    )


def test_figures_are_valid_svg_and_their_csv_holds_unrounded_values(report: Path):
    ElementTree.parse(report.parent / "figures" / "c1-step-time.svg")
    rows = list(csv.DictReader((report.parent / "figures" / "c1-step-time.csv").open()))
    mics = next(row for row in rows if row["implementation"] == "mics")
    assert float(mics["median ms"]) == 1000 * factory.run("mics").step_time_s.median
    assert {row["evidence"] for row in rows} == {"measured"}


def test_a_failed_check_stands_out_and_comes_first(report: Path):
    section = report.read_text().split('id="correctness"')[1].split("</section>")[0]
    assert section.index("NOT OK") < section.index(">ok<")


def test_descriptions_are_shown_and_escaped(report: Path):
    text = report.read_text()
    assert "Partition groups &amp; &lt;hops&gt;." in text
    assert "no overlap" in text and "a shim" in text


def test_a_claim_links_exactly_the_runs_that_it_rests_on(report: Path):
    row = report.read_text().split('id="claim-M8"')[1].split("</tr>")[0]
    linked = re.findall(r'href="#(R\d+)"', row)
    table = report.read_text().split('<section id="runs">')[1].split("</section>")[0]
    rows = {name: re.search(rf'<tr id="{name}">.*?</tr>', table, re.DOTALL) for name in linked}
    shown = [re.findall(r"<td[^>]*>(.*?)</td>", found[0])[0] for found in rows.values() if found]
    assert sorted(shown) == ["ddp", "mics", "zero3"]
    (claim,) = [
        item
        for item in json.loads((report.parent / "claims.json").read_text())["claims"]
        if item["id"] == "M8"
    ]
    assert {run["name"] for run in claim["runs"]} == set(linked)


def test_claims_json_lies_beside_the_page(report: Path):
    claims = json.loads((report.parent / "claims.json").read_text())["claims"]
    assert {row["id"]: row["verdict"] for row in claims}["M8"] == "reproduced"


def test_the_same_records_give_the_same_bytes(report: Path, tmp_path: Path):
    records = [*factory.cohort(SMALL), factory.check("zero3"), factory.check("mics", ok=False)]
    descriptions = {"mics": Description("mics", "Partition groups & <hops>.", "no overlap", ("a shim",))}
    again = build_report(records, tmp_path / "again", descriptions)
    first, second = (
        {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (report.parent, again.parent)
    )
    assert first == second


def test_an_earlier_report_is_replaced_and_nothing_is_left_aside(tmp_path: Path):
    out = tmp_path / "report"
    build_report(factory.cohort(SMALL), out)
    build_report([factory.check("ddp")], out)
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    assert not list((out / "figures").iterdir())


def test_a_report_that_fails_leaves_the_earlier_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "report"
    index = build_report([factory.check("ddp")], out)
    before = index.read_bytes()
    monkeypatch.setattr("suite.reports.build.write_claims", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_report([factory.check("mics")], out)
    assert index.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        build_report([factory.check("ddp")], tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_no_records_are_a_usage_error(tmp_path: Path):
    with pytest.raises(UsageError, match="no records"):
        build_report([], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_what_was_not_measured_is_a_dash_and_never_zero():
    bare = replace(factory.run("mics"), peak_memory_bytes=None, bytes_sent_per_rank=None)
    (cohort,) = group_cohorts([factory.run("ddp"), bare])
    row = next(row for row in resources.resources_table(cohort).rows if row[0].text == "mics")
    assert [cell.text for cell in row[1:3]] == ["–", "–"]
    assert [cell.value for cell in row[1:3]] == [None, None]
    assert len(cohort_plots(cohort, styles_for(["ddp", "mics"]))) == 5


def test_measured_zero_is_zero():
    (cohort,) = group_cohorts([factory.run("floor"), factory.run("ddp")])
    assert resources.resources_table(cohort).rows[-1][2].text == "0"


def test_floor_is_a_bound_and_not_a_competitor():
    (cohort,) = group_cohorts(factory.cohort(SMALL))
    assert "floor" not in cohort.labels
    assert throughput.throughput_table(cohort).rows[-1][0].text == "floor (lower bound)"
    assert all(row[0].text != "floor" for row in throughput.overview_table([cohort]).rows)
    assert all(row[0].text != "floor" for row in losses.fidelity_table(cohort).rows)


def test_overlapping_spreads_are_called_no_difference():
    slow = replace(factory.run("fsdp2"), step_time_s=factory.Spread(0.2, 0.19, 0.21, 0.21, 3))
    near = replace(factory.run("mics"), step_time_s=factory.Spread(0.1, 0.09, 0.13, 0.13, 3))
    ddp = replace(factory.run("ddp"), step_time_s=factory.Spread(0.12, 0.11, 0.14, 0.14, 3))
    (cohort,) = group_cohorts([slow, near, ddp])
    cells = {row[0].text: row[-3].text for row in throughput.throughput_table(cohort).rows}
    assert cells == {"mics": "0.83 no difference", "ddp": "1", "fsdp2": "1.67"}


def test_runs_that_were_not_timed_together_are_not_compared():
    later = replace(factory.run("mics"), cohort="later", started_at="2026-03-02T10:00:00+00:00")
    cohorts = group_cohorts([factory.run("ddp"), later])
    assert [len(cohort.runs) for cohort in cohorts] == [1, 1]
    assert len({cohort.title for cohort in cohorts}) == 2
    assert throughput.throughput_table(cohorts[1]).rows[0][-3].text == "–"


def test_namesakes_are_told_apart_by_their_options():
    pair = [factory.run("mics", options={"partition_size": size}) for size in (2, 4)]
    (cohort,) = group_cohorts([factory.run("ddp"), *pair])
    assert set(cohort.labels) == {"ddp", "mics (partition_size=2)", "mics (partition_size=4)"}


def test_cohorts_that_differ_in_an_unusual_key_say_so_in_their_title():
    clipped = factory.run("ddp")
    clipped = replace(clipped, config={**clipped.config, "train": {**clipped.config["train"], "clip": 1.0}})
    titles = [cohort.title for cohort in group_cohorts([factory.run("ddp"), clipped])]
    assert sorted(title.rsplit(" · ", 1)[1] for title in titles) == ["clip 1.0", "clip None"]


def test_small_models_on_a_cpu_are_shown_in_gflops():
    (cohort,) = group_cohorts([factory.run("ddp")])
    table = throughput.throughput_table(cohort)
    column = table.head.index("model GFLOPS per rank")
    assert table.rows[0][column].value == 1000 * factory.run("ddp").model_tflops_per_gpu
    assert "4 ranks" in cohort.conditions and "CPU" in cohort.conditions


def test_a_noisy_run_is_marked_where_its_number_is_shown():
    noisy = replace(factory.run("ddp"), noise={"noisy": True})
    (cohort,) = group_cohorts([noisy])
    assert throughput.throughput_table(cohort).rows[0][-1].text == "measured, noisy"


def test_every_implementation_looks_different_in_a_figure():
    styles = styles_for(list(factory.IMPLS))
    assert len({(style.colour, style.marker) for style in styles.values()}) == len(factory.IMPLS)
    assert len({(style.colour, style.line) for style in styles.values()}) == len(factory.IMPLS)


def test_a_figure_without_a_floor_or_a_reference_is_still_drawn():
    (cohort,) = group_cohorts([factory.run("mics")])
    plot = throughput.step_time_plot(cohort, styles_for(["mics"]))
    assert "mics" in plot.svg and "floor" not in plot.svg


def test_nothing_is_drawn_in_proportion_to_itself():
    (cohort,) = group_cohorts([factory.run("ddp")])
    names = [plot.name for plot in cohort_plots(cohort, styles_for(["ddp"]))]
    assert names == ["c1-step-time", "c1-samples", "c1-resources", "c1-loss"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.01234, "0.0123"), (61.26, "61.3"), (101.0, "101"), (123456.7, "123457"), (0.999, "0.999")],
)
def test_numbers_keep_three_significant_digits(value: float, shown: str):
    assert tables.rounded(value) == shown


def test_the_terminal_table_shows_runs_and_checks():
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table([*factory.cohort(SMALL), factory.check("mics", ok=False)]))
    text = console.export_text()
    assert "mics" in text and "measured" in text and "NOT OK" in text


def test_the_terminal_table_is_whole_at_80_columns():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(
        terminal_table([*factory.cohort(), factory.check("zero3-unoptimized", workload="roberta-small")])
    )
    text = console.export_text()
    assert "…" not in text
    assert "zero3-unoptimized" in text and "deepspeed-zero3" in text


def test_the_terminal_says_so_when_there_is_nothing():
    console = Console(record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table([]))
    assert "no results yet" in console.export_text()
