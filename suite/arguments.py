"""What can be written after `suite`: commands, their options, and what each is for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

Add = Callable[[str, str], argparse.ArgumentParser]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse, which alone would refuse options that follow a flag (`--json train.steps=3`)."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    strange = [word for word in rest if word.startswith("-") or not hasattr(parsed, "options")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        parsed.options += rest
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="suite", description=__import__("suite").__doc__)
    actions = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        command = actions.add_parser(name, help=help, description=help)
        command.set_defaults(command=name)
        return command

    _measuring(add)
    _projecting(add)
    _reporting(add)
    return parser


def _measuring(add: Add) -> None:
    for name, help in (
        ("run", "measure one implementation"),
        ("check", "hold one implementation against single-process reference gradients"),
    ):
        command = add(name, help)
        command.add_argument("options", nargs="*", metavar="KEY=VALUE", help="e.g. impl=ddp train.steps=3")
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")
        command.add_argument("--dry-run", action="store_true", help="print the Slurm job's script only")
    sweep = add("sweep", "run a grid of configurations; finished cells are not run again")
    sweep.add_argument("file", type=Path)
    sweep.add_argument("options", nargs="*", metavar="KEY=VALUE", help="wins over the file")
    sweep.add_argument("--out", type=Path, default=Path("results"))
    sweep.add_argument("--dry-run", action="store_true", help="print the Slurm jobs' scripts only")
    task = add("task", "what a Slurm job runs: one cohort from a file, its result beside it")
    task.add_argument("file", type=Path)
    timeline = add("timeline", "what each rank does in one step, for ui.perfetto.dev")
    timeline.add_argument("options", nargs="*", metavar="KEY=VALUE", help="as for `suite run`")
    timeline.add_argument("--out", type=Path, default=Path("timeline.json"))
    doctor = add("doctor", "what this host can run, and why not")
    doctor.add_argument("--cluster", action="store_true", help="equal nodes, clocks, bandwidth of a cluster")
    doctor.add_argument("options", nargs="*", metavar="KEY=VALUE", help="e.g. testbed=slurm testbed.nodes=2")


def _projecting(add: Add) -> None:
    project = add("project", "what a configuration would do on a cluster (a model, no run)")
    project.add_argument("options", nargs="*", metavar="KEY=VALUE", help="e.g. impl=mics cluster=p4d")
    project.add_argument("--json", action="store_true", help="one JSON object on stdout")
    project.add_argument("--out", type=Path, help="add the record(s) to this folder")
    project.add_argument("--trace", type=Path, help="write the step's timeline as a Chrome trace")
    project.add_argument("--timeline", action="store_true", help="keep a part of it in the record")
    project.add_argument("--picture", type=Path, help="draw a part of the timeline, as SVG or PDF")
    what = project.add_mutually_exclusive_group()
    what.add_argument("--scaling", action="store_true", help="weak scaling from 8 to 100,352 GPUs")
    what.add_argument("--published", action="store_true", help="published numbers beside projected ones")
    what.add_argument("--elsewhere", action="store_true", help="the same for runs that nothing was fitted to")
    what.add_argument("--emulated", type=Path, help="hold projections against this folder's emulated records")
    what.add_argument("--sensitivity", action="store_true", help="how far assumptions move the numbers")
    project.add_argument("--markdown", action="store_true", help="those tables as the documentation has them")
    what.add_argument("--calibrate", action="store_true", help="fit the assumptions and keep them")
    plan = add("plan", "the fastest configurations of MiCS that fit a cluster's memory (projected)")
    plan.add_argument("--model", required=True, help="a workload, e.g. bert-50b")
    plan.add_argument("--cluster", required=True, help="e.g. p4d")
    plan.add_argument("--gpus", required=True, type=int)
    plan.add_argument("--global-batch", type=int, help="samples per step; 64 per GPU unless given")
    plan.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _reporting(add: Add) -> None:
    report = add("report", "write the report of result folders")
    report.add_argument("results", nargs="+", type=Path)
    report.add_argument("--out", type=Path, help="the page's folder; report/ unless asked for others only")
    report.add_argument("--terminal", action="store_true", help="claims and main tables, here")
    report.add_argument("--export", type=Path, metavar="FOLDER", help="all records as CSV and Parquet")
    report.add_argument("--latex", type=Path, metavar="FOLDER", help="all tables for a paper")
    report.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="all runs as event files")
    report.add_argument(
        "--wandb", metavar="ENTITY/PROJECT", help="build a W&B report; publish when logged in"
    )
    compare = add("compare", "is B faster than A? exit status 1 when significantly slower")
    compare.add_argument("first", type=Path, metavar="A", help="a result folder")
    compare.add_argument("second", type=Path, metavar="B", help="another one")
    compare.add_argument("--threshold", default="5%", help="a regression up to this much is let pass")
