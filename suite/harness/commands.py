"""What the commands that measure do wherever the ranks are: on this machine, in processes that torchrun has
started, or in Slurm jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

from suite.config import Config
from suite.config_load import load
from suite.errors import UsageError
from suite.harness.check import References, check
from suite.harness.cluster_doctor import examine_cluster
from suite.harness.doctor import Finding
from suite.harness.elastic import discard_checkpoints, is_elastic, train_elastically
from suite.harness.launch import Place, on_seats, testbed_of
from suite.harness.measure import Failure, Say, measure
from suite.harness.slurm_jobs import scripts
from suite.harness.slurm_sweep import require_slurm, run_on_slurm, run_once
from suite.harness.sweep import Cohort, Outcome, Progress, keep_timeline, run_sweep
from suite.harness.task import Result, examine_task, read_task, run_task
from suite.records import AnyRecord, CheckRecord, ProjectionRecord
from suite.testbeds.torchrun import Seats, TorchrunTestbed

OUT = Path("results")
"""Where results go when no folder is named."""


class Commands:
    """`seats`: those that torchrun has started, when it has started us."""

    def __init__(self, seats: Seats | None) -> None:
        self._seats = seats

    @cached_property
    def _place(self) -> Place:
        return testbed_of if self._seats is None else on_seats(self._seats)

    def _in_a_job(self, config: Config) -> bool:
        return _on_slurm(config) and self._seats is None

    def run(self, config: Config, say: Say) -> AnyRecord:
        if self._in_a_job(config):
            return _from_a_job("run", config, say).records[0]
        if is_elastic(config):
            return train_elastically(config, say)
        keep = partial(keep_timeline, Path(config.out)) if config.out is not None else lambda *_: None
        (result,) = measure([config], say, self._place, keep)
        if isinstance(result, Failure):
            raise result.error
        return result

    def has_kept(self, config: Config) -> None:
        """The record of that run is kept: what an interrupted one would go on from can go."""
        if is_elastic(config):
            discard_checkpoints(config)

    def check(self, config: Config, say: Say) -> CheckRecord:
        if self._in_a_job(config):
            result = _from_a_job("check", config, say).records[0]
            assert isinstance(result, CheckRecord)
            return result
        with References(shared=out_of(config) if self._seats is not None else None) as references:
            return check(config, references, self._place)

    def sweep(
        self,
        cohorts: Sequence[Cohort],
        out: Path,
        observe: Callable[[Progress], None],
        project: Callable[[Config], ProjectionRecord],
    ) -> Outcome:
        jobs = [c for c in cohorts if c.kind != "project" and self._in_a_job(c.cells[0])]
        here = [cohort for cohort in cohorts if cohort not in jobs]
        if jobs:
            require_slurm(jobs)  # before the rest runs
        outcome = run_sweep(here, out, observe, project, self._place)
        return outcome + run_on_slurm(jobs, out, observe) if jobs else outcome

    def task(self, file: Path, observe: Callable[[Progress], None]) -> Result:
        """What a job runs."""
        cohort = read_task(file)
        if cohort.kind == "doctor":
            return examine_task(file, self._examine(cohort.cells[0]))
        return run_task(file, self._place, observe)

    def examine_cluster(self, options: Sequence[str], say: Say) -> list[Finding]:
        if self._seats is not None:
            return self._examine(load(["testbed=torchrun", *options]))
        config = load(options)
        if config.testbed.name != "slurm":
            raise UsageError(
                "`suite doctor --cluster` looks at several nodes; give testbed=slurm testbed.nodes=N, or "
                "start it on all of them with torchrun ... -m suite.cli doctor --cluster"
            )
        return _from_a_job("doctor", config, say).findings

    def _examine(self, config: Config) -> list[Finding]:
        if self._seats is None:
            raise UsageError("a task runs in processes that torchrun has started; `suite` submits it")
        environment = config.cluster.env if config.cluster is not None else {}
        return examine_cluster(self._seats, TorchrunTestbed(self._seats, environment))


def _on_slurm(config: Config) -> bool:
    return config.testbed.name == "slurm"


def scripts_of(cohorts: Sequence[Cohort], out: Path) -> list[str]:
    """Those of the jobs that would be submitted. Raises UsageError when there is none."""
    jobs = [cohort for cohort in cohorts if cohort.kind != "project" and _on_slurm(cohort.cells[0])]
    if not jobs:
        raise UsageError("--dry-run prints the script of a Slurm job; give testbed=slurm")
    return scripts(jobs, out)


def alone(kind: str, config: Config) -> Cohort:
    return Cohort("", kind, [config])


def out_of(config: Config) -> Path:
    return Path(config.out) if config.out is not None else OUT


def _from_a_job(kind: str, config: Config, say: Say) -> Result:
    result = run_once(alone(kind, config), out_of(config), lambda progress: say(progress.doing))
    if result.failures:
        raise result.failures[0].error
    return result
