"""The `suite` command: parses, calls the rooms, prints. Logs and progress go to stderr."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from suite.arguments import parse
from suite.config import Config
from suite.config_load import dotlist_value, load
from suite.errors import SuiteError, UsageError
from suite.records import RECORDS, AnyRecord, CheckRecord, ProjectionRecord, append, read, to_json
from suite.secrets import mask

if TYPE_CHECKING:  # importing the harness takes seconds, which a wrong option need not pay
    from suite.harness.sweep import Progress


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # for `main` to answer


stderr = _Console(stderr=True, markup=False)  # texts may hold anything, brackets included
stdout = _Console(markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 (a check is not ok, a cell failed), 2 (wrong input), 3 (a rank
    failed, something could not be written), 130 (interrupted), 141 (nobody reads the output)."""
    parsed = parse(arguments)
    try:
        with _ended_in_order():
            return _act(parsed)
    except SuiteError as error:
        if error.details:
            _complain(error.details, style=None)
        _complain(f"suite: {error}")
        return error.exit_status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at exit
        return 141
    except OSError as error:
        _complain(f"suite: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        return 3
    except KeyboardInterrupt:
        _complain("suite: interrupted; finished results are kept")
        return 130


def _act(parsed: argparse.Namespace) -> int:
    """Under torchrun its rank 0 does what is asked, and the other processes hold seats for it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # importing torch takes seconds
        parsed.seats = None
        return ACTIONS[parsed.command](parsed)
    from suite.testbeds.torchrun import join

    with join() as parsed.seats:
        return 0 if parsed.seats is None else ACTIONS[parsed.command](parsed)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """A polite request to end, or a terminal that goes away, is like Ctrl-C: ranks and files go first."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    # One that is ignored (`nohup`) stays ignored.
    heard = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _complain(text: str, style: str | None = "red") -> None:
    stderr.print(mask(text), style=style, markup=False, highlight=False, soft_wrap=True)


def _run(parsed: argparse.Namespace) -> int:
    from suite.harness.commands import Commands

    config = load(parsed.options)
    if parsed.dry_run:
        return _print_scripts("run", config)
    commands = Commands(parsed.seats)
    with _status("starting") as say:
        result = commands.run(config, say)
    _keep(config, result)
    commands.has_kept(config)
    _show(config, result, parsed.json)
    return 0


def _check(parsed: argparse.Namespace) -> int:
    from suite.harness.commands import Commands

    config = load(parsed.options)
    if parsed.dry_run:
        return _print_scripts("check", config)
    with _status(f"checking {config.impl.name} against plain torch") as say:
        result = Commands(parsed.seats).check(config, say)
    _keep(config, result)
    _show(config, result, parsed.json)
    return 0 if result.ok else 1


@contextmanager
def _status(doing: str) -> Iterator[Callable[[str], None]]:
    """What it says may hold anything, so none of it is markup."""
    with stderr.status(Text(doing)) as status:
        yield lambda text: status.update(Text(text))


def _show(config: Config, record: AnyRecord, as_json: bool) -> None:
    from suite.reports.terminal import terminal_table

    if as_json:
        print(to_json(record), flush=True)
    else:
        stdout.print(terminal_table([record]))
    _log_result(config)


def _print_scripts(kind: str, config: Config) -> int:
    from suite.harness.commands import alone, out_of, scripts_of

    print(*scripts_of([alone(kind, config)], out_of(config)), sep="\n")
    return 0


def _task(parsed: argparse.Namespace) -> int:
    from suite.harness.commands import Commands

    def observe(progress: Progress) -> None:
        print(progress.doing, file=sys.stderr, flush=True)

    result = Commands(parsed.seats).task(parsed.file, observe)
    for failure in result.failures:
        _complain(f"failed: {failure.config.impl.name}: {failure.error}")
    return 1 if result.failures else 0


def _project(parsed: argparse.Namespace) -> int:
    from suite.projection import commands

    if parsed.emulated is not None:
        _require_nothing_else(parsed)
        records, shown = commands.against_emulation(_read_results(parsed.emulated), parsed.markdown)
    else:
        _require_drawable(parsed.picture)
        records, shown = commands.answer(
            parsed.options,
            commands.Question.of(parsed),
            parsed.trace,
            parsed.markdown,
            timeline=parsed.timeline or parsed.picture is not None,
        )
        if parsed.picture is not None:
            _draw(records[0], parsed.picture)
    for record in records if parsed.out is not None else ():
        append(parsed.out / RECORDS, record)
    if parsed.json:
        print(commands.to_json(records))
    else:
        stdout.print(shown, soft_wrap=parsed.markdown)
    return 0


def _require_nothing_else(parsed: argparse.Namespace) -> None:
    if parsed.options or parsed.trace or parsed.timeline or parsed.picture:
        raise UsageError(
            "--emulated projects the runs that are in those results; leave options, --trace, --timeline and "
            "--picture out"
        )


def _require_drawable(picture: Path | None) -> None:
    if picture is not None and picture.suffix not in (".svg", ".pdf"):
        raise UsageError(f"--picture {picture} is neither SVG nor PDF; name a file that ends in .svg or .pdf")


def _draw(record: ProjectionRecord, picture: Path) -> None:
    from suite.reports.sections.projected_timeline import timeline_plot

    plot = timeline_plot(record)
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(plot.pdf if picture.suffix == ".pdf" else plot.svg.encode())


def _plan(parsed: argparse.Namespace) -> int:
    from suite.projection import commands

    shown, content = commands.plan(parsed.model, parsed.cluster, parsed.gpus, parsed.global_batch)
    if parsed.json:
        print(content)
    else:
        stdout.print(shown)
    return 0


def _keep(config: Config, record: AnyRecord) -> None:
    """Adds the record to `out`, when an output folder is named."""
    if config.out is not None:
        append(Path(config.out) / RECORDS, record)


def _log_result(config: Config) -> None:
    """Comes last: what was measured is safe and shown by then, whatever W&B does."""
    if config.out is not None:
        _log_to_wandb(Path(config.out), config)


def _sweep(parsed: argparse.Namespace) -> int:
    from suite.harness.commands import Commands, scripts_of
    from suite.harness.sweep import read_sweep
    from suite.projection.record import project_record
    from suite.reports.terminal import terminal_table

    overrides = _overrides(parsed.options)
    cohorts = read_sweep(parsed.file, overrides)
    if parsed.dry_run:
        print(*scripts_of(cohorts, parsed.out), sep="\n")
        return 0
    with _progress_bar() as observe:
        outcome = Commands(parsed.seats).sweep(cohorts, parsed.out, observe, project_record)
    stdout.print(terminal_table(read(parsed.out / RECORDS)))
    stderr.print(
        f"{len(outcome.finished)} cells run, {outcome.skipped} were finished before, "
        f"{len(outcome.failures)} failed; results in {parsed.out}"
    )
    for failure in outcome.failures:
        _complain(f"failed: {failure.config.impl.name}: {failure.error}")
    wrong = [item for item in outcome.finished if isinstance(item, CheckRecord) and not item.ok]
    for item in wrong:
        stderr.print(f"not ok: {item.impl} ({item.workload}, {item.precision})", style="red")
    _log_to_wandb(parsed.out, cohorts[0].cells[0], compare=True)
    return 1 if outcome.failures or wrong else 0


def _overrides(words: Sequence[str]) -> dict[str, object]:
    for word in words:
        if "=" not in word:
            raise UsageError(f"{word!r} is not an option; options are written key=value")
    return {key: dotlist_value(text) for key, text in (word.split("=", 1) for word in words)}


@contextmanager
def _progress_bar() -> Iterator[Callable[[Progress], None]]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    with Bar(*columns, TextColumn("{task.description}", markup=False), console=stderr) as bar:
        task = bar.add_task("starting", total=None, left="")
        last = ""

        def observe(progress: Progress) -> None:
            nonlocal last
            left = f"{progress.left_s / 60:.1f} min left" if progress.left_s is not None else ""
            bar.update(
                task, completed=progress.done, total=progress.total, left=left, description=progress.doing
            )
            if not stderr.is_terminal and progress.doing.partition(":")[0] != last:
                last = progress.doing.partition(":")[0]
                stderr.print(f"[{progress.done}/{progress.total}] {last} {left}", markup=False)

        yield observe


def _log_to_wandb(folder: Path, config: Config, compare: bool = False) -> None:
    from suite.reports.wandb_log import log_records

    message = log_records(folder, config.wandb, compare)
    if message:
        _complain(message, style=None)


def _report(parsed: argparse.Namespace) -> int:
    records = [record for folder in parsed.results for record in _read_results(folder)]
    if parsed.wandb is not None:
        from suite.reports.wandb_report import publish, require

        require(parsed.wandb)
    others = (parsed.terminal, parsed.export, parsed.latex, parsed.tensorboard, parsed.wandb)
    if parsed.terminal:
        from suite.reports.terminal import terminal_report

        stdout.print(terminal_report(records))
    if parsed.export is not None:
        from suite.reports.export import export_records

        written, problem = export_records(records, parsed.export)
        stdout.print("\n".join(map(str, written)), soft_wrap=True)
        if problem:
            stderr.print(problem)
    if parsed.latex is not None:
        from suite.reports.build import named_tables
        from suite.reports.export import export_latex

        written = export_latex(named_tables(records), parsed.latex)
        stdout.print(f"{len(written)} tables in {parsed.latex}", soft_wrap=True)
    if parsed.tensorboard is not None:
        from suite.reports.tensorboard_log import export_tensorboard

        folders = export_tensorboard(records, parsed.tensorboard)
        stdout.print(f"{len(folders)} runs; tensorboard --logdir {parsed.tensorboard}", soft_wrap=True)
    if parsed.out is not None or not any(others):
        _write_page(records, parsed.out or Path("report"), parsed.results)
    if parsed.wandb is not None:
        from suite.reports.build import WANDB_REPORT

        place = (parsed.out or Path("report")) / WANDB_REPORT
        stdout.print(publish(parsed.results, parsed.wandb, place), soft_wrap=True, markup=False)
    return 0


def _write_page(records: Sequence[AnyRecord], out: Path, results: Sequence[Path]) -> None:
    from suite.reports.build import build_report
    from suite.reports.descriptions import registered
    from suite.reports.timelines import read_timelines

    index = build_report(records, out, registered(), read_timelines(results))
    stdout.print(f"report: {index}", soft_wrap=True)


def _compare(parsed: argparse.Namespace) -> int:
    from suite.reports.compare import (
        Comparison,
        Together,
        compare,
        comparison_table,
        other_machine,
        share,
        together,
    )
    from suite.reports.terminal import rich_table

    threshold = share(parsed.threshold)
    found = compare(_read_results(parsed.first), _read_results(parsed.second))
    stdout.print(rich_table(comparison_table(found)))
    if other_machine(found):
        stderr.print("the two were measured on different machines", style="yellow")
    judged: list[Comparison | Together] = [*found, *together(found)]
    regressed = [item for item in judged if item.regressed(threshold)]
    for item in regressed:
        text = f"regression: {item.label} ({item.training}) × {item.interval.middle:.3f}"
        stderr.print(text, style="red", markup=False, soft_wrap=True)
    return 1 if regressed else 0


def _read_results(folder: Path) -> list[AnyRecord]:
    file = folder / RECORDS if folder.is_dir() else folder
    if not file.exists():
        raise UsageError(f"there are no results in {str(folder)!r}; run `suite sweep` first")
    return read(file)


def _timeline(parsed: argparse.Namespace) -> int:
    from suite.harness.timeline import trace_step, write_timeline

    config = load(parsed.options)
    if parsed.out.is_dir():
        raise UsageError(f"--out {parsed.out} is a folder; name a file, such as {parsed.out / 'step.json'}")
    with _status(f"tracing a step of {config.impl.name}"):
        timeline = trace_step(config)
    write_timeline(parsed.out, timeline)
    stdout.print(f"timeline: {parsed.out} (open it in ui.perfetto.dev)", soft_wrap=True)
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    from suite.harness.commands import Commands
    from suite.harness.doctor import examine

    if parsed.options and not parsed.cluster:
        raise UsageError("`suite doctor` takes options with --cluster only")
    if parsed.cluster:
        with _status("looking at the nodes") as say:
            findings = Commands(parsed.seats).examine_cluster(parsed.options, say)
    else:
        findings = examine()
    table = Table("", "what", "detail", "what to do")
    for finding in findings:
        texts = map(Text, (finding.what, finding.detail, finding.remedy))
        table.add_row("ok" if finding.ok else "no", *texts)
    stdout.print(table)
    return 1 if parsed.cluster and not all(finding.ok for finding in findings) else 0


ACTIONS = {
    "run": _run,
    "check": _check,
    "project": _project,
    "plan": _plan,
    "sweep": _sweep,
    "task": _task,
    "report": _report,
    "compare": _compare,
    "timeline": _timeline,
    "doctor": _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
