"""Times several implementations of the same training side by side, step by step in turns."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import mean, median

from suite.config import Config
from suite.errors import SuiteError
from suite.harness import traffic
from suite.harness.environment import environment
from suite.harness.launch import Place, launch, prepare, scale_of, step_timeout_s, testbed_of
from suite.harness.noise import Noise, noise_between, read_cpu
from suite.harness.timeline import Timeline, timeline_of
from suite.harness.worker import Device, Resources, StepMeasurement, Worker
from suite.records import Record, Spread
from suite.testbeds.testbed import Ranks, Testbed
from suite.workloads import flops
from suite.workloads.models import n_params

MAX_ATTEMPTS = 3
NOISE_WARNING = "noisy: something else used the machine during all attempts"
BUSY_WARNING = "noisy: this host's own processors were too busy to emulate; raise testbed.dilation"

Say = Callable[[str], None]
"""Receives what is being done, for a progress display."""

Keep = Callable[[Record, Timeline], None]
"""Receives the last timed step of a paced run, for whoever wants to keep it."""


@dataclass(frozen=True)
class Failure:
    """A cell that could not be measured; the others of its cohort were."""

    config: Config
    error: SuiteError

    def __post_init__(self) -> None:
        # A traceback's frames hold the whole cohort, and this: only a full garbage collection, which is rare
        # in a process with so many objects, would find them.
        self.error.__traceback__ = self.error.__cause__ = self.error.__context__ = None


@dataclass
class Team:
    """One implementation's ranks during a measurement."""

    config: Config
    testbed: Testbed
    ranks: Ranks
    steps: list[list[StepMeasurement]] = field(default_factory=list)
    """Per step, one measurement from each rank."""
    timed_from: int = 0
    devices: list[Device] = field(default_factory=list)
    """Of each rank."""
    before: list[Resources] = field(default_factory=list)
    after: list[Resources] = field(default_factory=list)
    partition_size: int | None = None
    notes: list[str] = field(default_factory=list)

    def step(self) -> None:
        timeout_s = step_timeout_s(self.config, len(self.steps))
        self.steps.append(self.ranks.call("step", timeout_s=timeout_s))

    def last_step(self) -> None:
        """Where steps are paced, a log of it costs too little to be seen in its time."""
        method = "traced_step" if scale_of(self.config) else "step"
        timeout_s = step_timeout_s(self.config, len(self.steps))
        self.steps.append(self.ranks.call(method, timeout_s=timeout_s))

    def timeline(self) -> Timeline | None:
        """Of the last timed step; None where steps are not paced."""
        if scale_of(self.config) is None:
            return None
        return timeline_of(self.config, self.ranks.call("trace", timeout_s=self.config.testbed.timeout_s))

    def resources(self) -> list[Resources]:
        return self.ranks.call("resources", timeout_s=self.config.testbed.timeout_s)

    def start_timing(self) -> None:
        self.timed_from = len(self.steps)
        self.devices = self.ranks.call("device", timeout_s=self.config.testbed.timeout_s)
        self.ranks.call("reset_peak_memory", timeout_s=self.config.testbed.timeout_s)
        self.before = self.resources()

    def stop_timing(self) -> None:
        self.after = self.resources()
        self.partition_size = self.ranks.call("partition_size", timeout_s=self.config.testbed.timeout_s)[0]
        self.notes = self.ranks.call("notes", timeout_s=self.config.testbed.timeout_s)[0]

    def step_times(self) -> list[float]:
        """Seconds per timed step: those of its slowest rank."""
        return [max(rank.seconds for rank in step) for step in self.steps[self.timed_from :]]

    def waiting(self) -> float | None:
        """Host seconds per step in which a rank's training thread waited for messages: mean over the
        ranks, median over the timed steps. None where no blocks are paced: there it is not known."""
        waits = [
            [rank.seconds - rank.paced.computing_s for rank in step if rank.paced is not None]
            for step in self.steps[self.timed_from :]
        ]
        return median(map(mean, waits)) if all(waits) else None

    def sent_computing_share(self) -> float | None:
        """Of the bytes that left the nodes in the timed steps, the share that did while a rank's training
        thread computed; mean over the ranks, each of which sees its whole node's link. None where steps
        are not paced or nothing left."""
        paced = [rank.paced for step in self.steps[self.timed_from :] for rank in step if rank.paced]
        sent = sum(item.sent_bytes for item in paced)
        return sum(item.sent_computing_bytes for item in paced) / sent if sent else None


def measure(
    cohort: Sequence[Config],
    say: Say = lambda _: None,
    place: Place = testbed_of,
    keep: Keep = lambda _, __: None,
) -> list[Record | Failure]:
    """Runs all configurations of a cohort at once, their steps taken in turns (A B C A B C ...).

    The members may differ in their implementation only. All are alive at the same time, but only
    one computes at any moment; the others wait. A member that fails, or whose input is wrong, is left out
    of what follows.
    """
    _require_comparable(cohort)
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    failures: list[Failure] = []
    with ExitStack() as stack:
        teams: list[Team] = []
        for config in cohort:
            say(f"starting {config.impl.name}")
            try:
                prepare(config, place)
                ranks = stack.enter_context(launch(config, Worker, place))
                teams.append(Team(config, place(config), ranks))
            except SuiteError as error:
                failures.append(Failure(config, error))
        for _ in range(cohort[0].train.warmup):
            teams = _turn(teams, failures, lambda team: _warm_up(team, say))
        noise = None
        for attempt in range(1, MAX_ATTEMPTS + 1):
            teams, noise = _timed(teams, failures, attempt, say)
            if not noise.noisy:
                break
        assert noise is not None
        cohort_name = name_cohort(cohort[0], started_at)
        records = [record_of(team, noise, started_at, cohort_name) for team in teams]
        kept = [_kept(team, record, keep) for team, record in zip(teams, records, strict=True)]
        return [*kept, *failures]


def _kept(team: Team, record: Record, keep: Keep) -> Record:
    """The record; that its timeline could not be kept takes nothing from what was measured."""
    try:
        if (timeline := team.timeline()) is not None:
            keep(record, timeline)
    except (SuiteError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return replace(record, notes=[*record.notes, f"its timeline was not kept: {reason}"])
    return record


def _require_comparable(cohort: Sequence[Config]) -> None:
    shared = {
        (str(config.workload), str(config.train), str(config.testbed), str(config.cluster))
        for config in cohort
    }
    if len(shared) != 1:
        raise ValueError("the configurations of a cohort may differ in their implementation only")


def _warm_up(team: Team, say: Say) -> None:
    say(f"warming up {team.config.impl.name}")
    team.step()


def _timed(teams: list[Team], failures: list[Failure], attempt: int, say: Say) -> tuple[list[Team], Noise]:
    """One attempt at all timed rounds, with what the rest of the machine did meanwhile."""
    again = f" (attempt {attempt}: the machine was busy)" if attempt > 1 else ""
    teams = _turn(teams, failures, Team.start_timing)
    before = read_cpu(_pids(teams))
    rounds = teams[0].config.train.steps if teams else 0
    for number in range(1, rounds + 1):
        say(f"timing step {number}/{rounds}{again}")
        teams = _turn(teams, failures, Team.step if number < rounds else Team.last_step)
    noise = noise_between(before, read_cpu(_pids(teams)), attempt)
    if teams:
        noise = replace(noise, busy_limit=teams[0].testbed.busy_limit)
    return _turn(teams, failures, Team.stop_timing), noise


def _turn(teams: list[Team], failures: list[Failure], action: Callable[[Team], None]) -> list[Team]:
    """Lets each team act once; returns those that could."""
    able = []
    for team in teams:
        try:
            action(team)
            able.append(team)
        except SuiteError as error:
            failures.append(Failure(team.config, error))
    return able


def _pids(teams: Iterable[Team]) -> list[int]:
    return [pid for team in teams for pid in team.ranks.pids()]


def name_cohort(config: Config, started_at: str) -> str:
    """Like no other, whatever the clock does."""
    return f"{started_at}/{config.workload.name}/{secrets.token_hex(4)}"


def record_of(team: Team, noise: Noise, started_at: str, cohort: str) -> Record:
    """What a team's timed steps, between `start_timing` and `stop_timing`, amount to."""
    config, scale = team.config, scale_of(team.config)
    train, model = config.train, config.workload.model
    dilation = 1.0 if scale is None else scale.dilation
    waiting = team.waiting()
    times = [seconds / dilation for seconds in team.step_times()]
    spread = Spread.of(times)
    samples = config.global_batch
    work = _own_work(config) if scale is None else (scale.model_flops, scale.hardware_flops)
    model_tflops, hardware_tflops = (operations / spread.median / 1e12 for operations in work)
    device = team.devices[0]
    peak = device.peak_tflops if len(set(team.devices)) == 1 else None
    before, after = (
        traffic.matrix([item.connections for item in reading], [item.memory_reads for item in reading])
        for reading in (team.before, team.after)
    )
    seen = any(map(any, after))  # NCCL, for one, does not send through connections of this process
    between = traffic.between_nodes(before, after, config.ranks_per_node)
    return Record(
        evidence=team.testbed.evidence,
        impl=config.impl.name,
        workload=config.workload.name,
        testbed=config.testbed.name,
        world_size=config.world_size,
        nodes=config.world_size // config.ranks_per_node,
        ranks_per_node=config.ranks_per_node,
        partition_size=team.partition_size,
        micro_batch=train.micro_batch,
        micro_steps=train.micro_steps,
        seq_len=model.seq_len,
        precision=train.precision,
        n_params=n_params(model),
        step_time_s=spread,
        step_times_s=times,
        samples_per_s=samples / spread.median,
        model_tflops_per_gpu=model_tflops,
        hardware_tflops_per_gpu=hardware_tflops,
        peak_memory_bytes=max(item.peak_memory_bytes for item in team.after),
        inter_node_bytes_per_node=round(between / len(times)) if seen else None,
        bytes_sent_per_rank=round(traffic.per_rank(before, after) / len(times)) if seen else None,
        exposed_comm_s=None if waiting is None else waiting / dilation,
        losses=[step[0].loss for step in team.steps],
        grad_norms=[step[0].grad_norm for step in team.steps],
        noise=noise.to_dict(),
        env=environment() | team.testbed.conditions(),
        config=config.to_dict(),
        config_hash=config.hash(),
        started_at=started_at,
        cohort=cohort,
        notes=[*team.notes, *team.testbed.notes(), *_warnings(noise)],
        details=_details(team) | ({} if scale is None else scale.details() | _overlap(team)),
        device=device.name,
        peak_tflops=peak,
        mfu=None if peak is None else model_tflops / peak,
        hfu=None if peak is None else hardware_tflops / peak,
        attention=device.attention,
    )


def _own_work(config: Config) -> tuple[float, float]:
    """(model FLOPs, hardware FLOPs) per step and rank of the configured model itself."""
    train, model, samples = config.train, config.workload.model, config.global_batch
    hardware = flops.hardware_flops(model, samples, train.activation_checkpointing)
    return flops.model_flops(model, samples) / config.world_size, hardware / config.world_size


def _warnings(noise: Noise) -> list[str]:
    if noise.disturbed:
        return [NOISE_WARNING]
    return [BUSY_WARNING] if noise.too_busy else []


def _overlap(team: Team) -> dict[str, float]:
    share = team.sent_computing_share()
    return {} if share is None else {"sent_while_computing_share": share}


def _details(team: Team) -> dict[str, float]:
    """The implementation's own counters per timed step, on the rank where each grew most; and on
    accelerators the allocator's figures, the worst of all ranks, and the step by the host's clock."""
    before, after = ([item.details for item in reading] for reading in (team.before, team.after))
    steps = len(team.step_times())
    details = {
        key: max(late[key] - early[key] for early, late in zip(before, after, strict=True)) / steps
        for key in after[0]
    }
    if team.after[0].allocator:
        details |= {key: max(item.allocator[key] for item in team.after) for key in team.after[0].allocator}
        timed = team.steps[team.timed_from :]
        details["host_step_s"] = median(max(rank.host_s for rank in step) for step in timed)
    return details
