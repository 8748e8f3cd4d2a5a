"""Writes the report: one self-contained HTML page, `claims.json`, and the figures as files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from suite.errors import UsageError
from suite.records import AnyRecord
from suite.reports.claims import OVERALL_RULE, SWEEPS, Verdict, judge, write_claims, write_sweeps
from suite.reports.cohorts import (
    NO_DIFFERENCE_RULE,
    Cohort,
    checks_of,
    group_cohorts,
    projections_of,
    runs_of,
    stand_ins_of,
)
from suite.reports.descriptions import Description
from suite.reports.figures import Plot, Style, styles_for
from suite.reports.published import INSTANCES, NUMBERS, SOURCES
from suite.reports.sections import correctness, environment, resources, throughput
from suite.reports.sections.ablations import ablation_section
from suite.reports.sections.bounds import bounds_section
from suite.reports.sections.cohort import cohort_section
from suite.reports.sections.headline import headline_section
from suite.reports.sections.hierarchical import hierarchical_section
from suite.reports.sections.implementations import impl_section
from suite.reports.sections.losses import convergence_section
from suite.reports.sections.memory import memory_section
from suite.reports.sections.networks import networks_section
from suite.reports.sections.projected import projected_section
from suite.reports.sections.runs import Key, key_of, projections_table, run_names, runs_table
from suite.reports.sections.section import Section
from suite.reports.sections.summary import impl_names, run_here, summary
from suite.reports.sections.timelines import shown_cohorts, timelines_section
from suite.reports.sections.traffic import traffic_section
from suite.reports.sections.two_hops import two_hops_section
from suite.reports.sections.weak_scaling import weak_scaling_section
from suite.reports.tables import Table, word
from suite.reports.timelines import FOLDER as TIMELINES
from suite.reports.timelines import Timeline
from suite.reports.verdicts import NOT_TESTABLE, VERDICTS

INDEX = "index.html"
CLAIMS = "claims.json"
FIGURES = "figures"
WANDB_REPORT = "wandb-report.json"
OURS = {INDEX, CLAIMS, FIGURES, SWEEPS, TIMELINES, WANDB_REPORT}


def build_report(
    records: Sequence[AnyRecord],
    out: Path,
    descriptions: Mapping[str, Description] | None = None,
    timelines: Sequence[Timeline] = (),
) -> Path:
    """Writes `out/index.html`, `out/claims.json`, `out/figures/` and, when some of these timelines belong to
    the records, `out/timelines/`; returns the page's path.

    An earlier report in `out` is replaced as a whole when the new one is complete. Raises UsageError
    when there are no records, or when `out` holds something that is not a report.
    """
    if not records:
        raise UsageError("there are no records to report on; run `suite sweep` first")
    _require_ours(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as aside:
        new = Path(aside) / "new"
        _write(records, new, descriptions or {}, timelines)
        if out.exists():
            out.rename(Path(aside) / "old")
        new.rename(out)
    return out / INDEX


def named_tables(records: Sequence[AnyRecord]) -> list[tuple[str, Table]]:
    """Every table of the report but those of single implementations, with a name for its file."""
    cohorts = group_cohorts(records)
    styles = styles_for([record.impl for record in records])
    tables = main_tables(records)
    for cohort in cohorts:
        key = cohort.key.lower()
        tables.append((f"{key}-throughput", throughput.throughput_table(cohort)))
        tables.append((f"{key}-resources", resources.resources_table(cohort)))
    for section in extra_sections(records, cohorts, styles):
        tables += [(plot.name, plot.table) for plot in section.plots]
    return [(name, table) for name, table in tables if table.rows]


def main_tables(records: Sequence[AnyRecord]) -> list[tuple[str, Table]]:
    """Those about everything, with their names."""
    cohorts = group_cohorts(records)
    tables = [
        ("claims", claims_table(judge(records))),
        ("runs", runs_table(cohorts, run_names(records, cohorts))),
        ("overview", throughput.overview_table(cohorts)),
        ("correctness", correctness.correctness_table(checks_of(records))),
    ]
    return [(name, table) for name, table in tables if table.rows]


def claims_table(verdicts: Sequence[Verdict]) -> Table:
    head = ("claim", "sentence", "published", "here", "verdict")
    rows = tuple(
        (
            word(verdict.claim.id),
            word(verdict.claim.sentence),
            word(verdict.claim.published),
            word("; ".join(f"{item.evidence}: {item.ours}" for item in verdict.findings) or verdict.missing),
            word(verdict.verdict),
        )
        for verdict in verdicts
    )
    return Table("Claims", head, rows)


def _require_ours(out: Path) -> None:
    """A report replaces its folder, so the folder must hold nothing else."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"out={out} is a file; name a folder for the report")
    others = {item.name for item in out.iterdir()} - OURS if out.exists() else set()
    if others:
        raise UsageError(f"out={out} holds other files ({min(others)}); name a new or an empty folder")


def _write(
    records: Sequence[AnyRecord],
    folder: Path,
    descriptions: Mapping[str, Description],
    timelines: Sequence[Timeline],
) -> None:
    cohorts = group_cohorts(records)
    styles = styles_for([record.impl for record in records])
    cohort_sections = [cohort_section(cohort, styles) for cohort in cohorts]
    sections = extra_sections(records, cohorts, styles, timelines)
    impls = [
        impl_section(descriptions.get(name, Description(name, "")), records, cohorts, timelines)
        for name in impl_names(records)
    ]
    verdicts, names = judge(records), run_names(records, cohorts)
    figures = folder / FIGURES
    figures.mkdir(parents=True)
    plots = [plot for section in cohort_sections for plot in section.plots]
    plots += [plot for section in sections for plot in section.plots]
    plots += [plot for impl in impls for plot in impl.plots]
    for plot in plots:
        plot.save(figures)
    _copy_timelines(folder / TIMELINES, cohorts, timelines)
    write_claims(folder / CLAIMS, verdicts, names)
    write_sweeps(folder / SWEEPS, verdicts)
    page = _template().render(
        summary=summary(records, cohorts),
        # Stable: what could be judged comes first, otherwise in the order of the claims.
        verdicts=sorted(verdicts, key=lambda verdict: verdict.verdict == NOT_TESTABLE),
        by_verdict={
            name: [verdict.claim.id for verdict in verdicts if verdict.verdict == name] for name in VERDICTS
        },
        overall_rule=OVERALL_RULE,
        run_links={verdict.claim.id: _run_links(verdict, names) for verdict in verdicts},
        runs=runs_table(cohorts, names),
        projections=projections_table(records, names),
        sources=SOURCES,
        numbers=NUMBERS,
        instances=INSTANCES,
        no_difference_rule=NO_DIFFERENCE_RULE,
        overview=throughput.overview_table(cohorts),
        correctness=correctness.correctness_table(checks_of(records)),
        cohorts=cohort_sections,
        sections=sections,
        impls=impls,
        noise=environment.noise_table(cohorts),
        environment=environment.environment_table(run_here(records)),
        notes=sorted({f"{run.impl}: {note}" for run in runs_of(records) for note in run.notes}),
    )
    (folder / INDEX).write_text(page, encoding="utf-8")


def _run_links(verdict: Verdict, names: Mapping[Key, str]) -> list[tuple[str, list[str]]]:
    """Per kind of evidence, the names of the runs behind a verdict."""
    return [
        (finding.evidence, list(dict.fromkeys(names[key_of(run)] for run in finding.runs)))
        for finding in verdict.findings
    ]


def extra_sections(
    records: Sequence[AnyRecord],
    cohorts: Sequence[Cohort],
    styles: Mapping[str, Style],
    timelines: Sequence[Timeline] = (),
) -> list[Section]:
    """Those for which there are records, in the order in which a reader asks."""
    runs, projections = runs_of(records), projections_of(records)
    possible = (
        weak_scaling_section(runs, styles),
        headline_section(cohorts, styles),
        networks_section(runs, styles),
        hierarchical_section(cohorts),
        two_hops_section(runs),
        bounds_section(cohorts, stand_ins_of(records), styles),
        timelines_section(cohorts, timelines),
        projected_section(projections, styles),
        traffic_section(cohorts),
        ablation_section(cohorts),
        convergence_section(cohorts, styles),
        memory_section(runs),
    )
    return [section for section in possible if section is not None]


def _copy_timelines(folder: Path, cohorts: Sequence[Cohort], timelines: Sequence[Timeline]) -> None:
    """Those that the page shows, to be opened from it."""
    for _, found in shown_cohorts(cohorts, timelines):
        folder.mkdir(exist_ok=True)
        for item in found:
            shutil.copy(item.timeline.file, folder)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    inline: Callable[[Plot], Markup] = lambda plot: Markup(plot.inline())  # noqa: E731
    environment.filters["inline"] = inline
    environment.filters["slug"] = lambda text: text.replace(" ", "-")
    return environment.get_template("report.html.j2")
