"""The W&B Report: claims, throughput and weak scaling as panels over the logged runs.

`publish` runs this file as a program of its own, in a process of its own: it writes the specification,
which needs nobody, and then sends it when there is a login.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.errors import UsageError
from suite.records import RECORDS, AnyRecord, Record, read
from suite.reports.apart import run_apart
from suite.reports.claims import Verdict, judge
from suite.reports.cohorts import group_cohorts, runs_of
from suite.reports.metrics import GRAD_NORM, LOSS, STEP
from suite.reports.scaling import families
from suite.reports.wandb_log import sync_command

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import PanelGrid, Report, Runset

TITLE = "Sharded data-parallel training: results"
NOT_LOGGED_IN = "not logged in"
TIMEOUT_S = 120.0


def publish(results: Sequence[Path], target: str, specification: Path, timeout_s: float = TIMEOUT_S) -> str:
    """Writes the specification and publishes it to `target` (ENTITY/PROJECT) when logged in. Returns what
    became of it, for the user: where it is, or why not and what to run later.

    `results` are result folders or files. Raises UsageError as `require` does.
    """
    entity, project = require(target)
    specification.parent.mkdir(parents=True, exist_ok=True)
    files = [str(path / RECORDS if path.is_dir() else path) for path in results]
    words = ["--entity", entity, "--project", project, "--out", str(specification)]
    with tempfile.TemporaryDirectory() as aside:  # for W&B's own logs
        done = run_apart(["suite.reports.wandb_report", *words, *files], Path(aside), timeout_s)
    if done.ok:
        return f"published: {done.line}"
    if not specification.exists():
        raise UsageError(f"the W&B report could not be written: {done.line}")
    folders = [path if path.is_dir() else path.parent for path in results]
    later = ["wandb login", *map(sync_command, folders)]
    later += [f"suite report {' '.join(map(str, folders))} --wandb {target}"]
    return "\n".join([f"not published: {done.line}; its specification is {specification}. Later:", *later])


def require(target: str) -> tuple[str, str]:
    """Entity and project. Raises UsageError when it is no such pair, or when packages are missing."""
    entity, _, project = target.partition("/")
    if not entity or not project or "/" in project:
        raise UsageError(f"{target!r} is not ENTITY/PROJECT; write for example my-team/sharding")
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UsageError("a W&B report needs wandb and wandb-workspaces: pip install wandb-workspaces")
    return entity, project


def main() -> None:
    parser = argparse.ArgumentParser(prog="suite.reports.wandb_report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    for option in ("--entity", "--project"):
        parser.add_argument(option, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    records = [record for file in given.results for record in read(file)]
    report = build(records, given.entity, given.project)
    given.out.write_text(json.dumps(specification_of(report), indent=1) + "\n", encoding="utf-8")

    import wandb

    if not wandb.api.api_key:
        raise SystemExit(NOT_LOGGED_IN)
    print(report.save().url)


def specification_of(report: Report) -> dict[str, Any]:
    """What W&B would be sent, as JSON."""
    return report._to_model().model_dump(by_alias=True, exclude_none=True, mode="json")


def build(records: Sequence[AnyRecord], entity: str, project: str) -> Report:
    """Needs no network: its run sets are those of the report's own project."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.TableOfContents(), wr.H1("Claims"), wr.MarkdownBlock(_claims(judge(records)))]
    scaled = families(runs_of(records))
    blocks += [wr.H1("Weak scaling")] if scaled else []
    for family in scaled:
        members = [run for curve in family.members for run in curve.points]
        blocks += [wr.H2(f"{family.any.evidence}: {family.title}"), _scaling(members)]
    blocks.append(wr.H1("Throughput"))
    for cohort in group_cohorts(records):
        title = f"{cohort.key} {cohort.any.evidence}: {cohort.title}"
        blocks += [wr.H2(title), wr.P(cohort.conditions), _throughput(cohort.members)]
    return wr.Report(entity=entity, project=project, title=TITLE, blocks=blocks, width="fluid")


def _claims(verdicts: Iterable[Verdict]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    rows = ["| claim | published | here | verdict |", "|---|---|---|---|"]
    for item in verdicts:
        ours = "; ".join(f"**{one.evidence}**: {one.ours} (spread: {one.spread})" for one in item.findings)
        words = (f"{item.claim.id} {item.claim.sentence}", item.claim.published, ours or item.missing or "")
        rows.append("| " + " | ".join(map(cell, (*words, f"**{item.verdict}**"))) + " |")
    return "\n".join(rows)


def _scaling(runs: Sequence[Record]) -> PanelGrid:
    import wandb_workspaces.reports.v2 as wr

    def over_ranks(title: str, metric: str) -> wr.ScatterPlot:
        ranks = wr.SummaryMetric("world_size")
        return wr.ScatterPlot(title=title, x=ranks, y=wr.SummaryMetric(metric), log_x=True)

    panels: list[Any] = [
        over_ranks("TFLOPS per GPU over GPUs (flat is ideal)", "model_tflops_per_gpu"),
        over_ranks("step, s", "step_time_s.median"),
        over_ranks("exposed communication, s", "exposed_comm_s"),
        over_ranks("bytes between nodes, per node and step", "inter_node_bytes_per_node"),
    ]
    return wr.PanelGrid(runsets=_run_sets(runs), panels=panels)


def _throughput(runs: Sequence[Record]) -> PanelGrid:
    import wandb_workspaces.reports.v2 as wr

    def bars(title: str, metric: str) -> wr.BarPlot:
        return wr.BarPlot(title=title, metrics=[wr.SummaryMetric(metric)])

    def curves(title: str, metric: str) -> wr.LinePlot:
        return wr.LinePlot(title=title, x=STEP, y=[metric], smoothing_factor=0)

    panels: list[Any] = [
        bars("samples/s (higher is better)", "samples_per_s"),
        bars("step, median s (lower is better)", "step_time_s.median"),
        bars("model TFLOPS per GPU", "model_tflops_per_gpu"),
        bars("peak memory, bytes per rank", "peak_memory_bytes"),
        bars("sent, bytes per rank and step", "bytes_sent_per_rank"),
        curves("loss", LOSS),
        curves("gradient norm", GRAD_NORM),
    ]
    return wr.PanelGrid(runsets=_run_sets(runs), panels=panels)


def _run_sets(runs: Sequence[Record]) -> list[Runset]:
    """One per implementation, of these cohorts only: evidence and conditions are never mixed."""
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    cohorts = sorted({run.cohort for run in runs})
    return [
        wr.Runset(
            name=impl,
            filters=[
                expr.Metric("JobType") == impl,
                expr.Summary("evidence") == runs[0].evidence,
                expr.Summary("cohort").isin(cohorts),
            ],
        )
        for impl in sorted({run.impl for run in runs})
    ]


if __name__ == "__main__":
    main()
