"""A training that outlives its ranks: it goes on from its last checkpoint, with fewer ranks or later."""

from __future__ import annotations

import datetime
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from suite import typed
from suite.config import Config
from suite.errors import RankError, UsageError
from suite.harness.launch import launch, prepare, testbed_of
from suite.harness.measure import Say, Team, name_cohort, record_of
from suite.harness.noise import noise_between, read_cpu
from suite.harness.worker import Worker
from suite.impls import registry
from suite.impls.sharded import kept
from suite.records import Record

KEPT = 2
"""Checkpoints: the newest, and the one before it in case the newest is damaged."""

NOT_A_LOSS = ("FloatingPointError", "OutputError", "UsageError", "DesyncError")
"""Exceptions that fewer ranks would raise again."""


@dataclass(frozen=True)
class Point:
    """One step of the loss curve. The norm of a step that fp16 has skipped is no finite number."""

    NULLABLE_FLOATS: ClassVar[bool] = True

    step: int
    loss: float
    grad_norm: float


def is_elastic(config: Config) -> bool:
    return config.train.checkpoint_every is not None


def train_elastically(config: Config, say: Say = lambda _: None) -> Record:
    """Runs all steps, saving every `train.checkpoint_every`. When a rank fails, the rest of them are started
    again with the largest number of ranks below that can share out the same global batch, down to
    `testbed.min_ranks`; without that, or when there is none, the error is raised.

    With `out`, checkpoints lie in `out/checkpoints`, and a later call of an interrupted training goes on
    there; `discard_checkpoints` ends that. The record is one of the configuration that was asked for; its
    times are those of the ranks that finished, and its notes say what happened.
    """
    registry.require_checkpoints(config.impl.name)
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    notes: list[str] = []
    now = config
    with _folder(config) as folder:
        while True:
            try:
                record = _attempt(now, folder, started_at, say, notes)
                break
            except RankError as error:
                kept.discard_unfinished(folder)
                fewer = None if error.raised in NOT_A_LOSS else with_fewer_ranks(now)
                if fewer is None:
                    raise
                notes.append(f"{error}; went on with {fewer.world_size} ranks from the last checkpoint")
                say(notes[-1])
                now = fewer
        curve = _read_curve(folder)
    steps = [curve.get(step, LOST) for step in range(config.train.warmup + config.train.steps)]
    return replace(
        record,
        losses=[point.loss for point in steps],
        grad_norms=[point.grad_norm for point in steps],
        # Checkpoints send messages of their own, which cannot be told from the training's.
        inter_node_bytes_per_node=None,
        bytes_sent_per_rank=None,
        config=config.to_dict(),
        config_hash=config.hash(),
        notes=[*notes, *record.notes],
    )


def discard_checkpoints(config: Config) -> None:
    """To be called when the training's record is kept, and not before."""
    if config.out is not None:
        shutil.rmtree(_kept_in(config, config.out), ignore_errors=True)


def with_fewer_ranks(config: Config) -> Config | None:
    """The same training, global batch included, in the largest smaller world that it fits; of several
    nodes whole ones are given up. None when there is none of at least `testbed.min_ranks`."""
    testbed, train, batch = config.testbed, config.train, config.global_batch
    if testbed.min_ranks is None:
        return None
    for ranks in range(config.world_size - 1, testbed.min_ranks - 1, -1):
        per_node = config.ranks_per_node if config.world_size > config.ranks_per_node else ranks
        if ranks % per_node or batch % (ranks * train.micro_steps):
            continue
        try:
            registry.parse_options(config.impl.name, config.impl.options, ranks, per_node)
        except UsageError:  # a partition size that does not divide that many
            continue
        return replace(
            config,
            testbed=replace(testbed, ranks=ranks, nodes=ranks // per_node, ranks_per_node=per_node),
            train=replace(train, global_batch=batch, micro_batch=batch // (ranks * train.micro_steps)),
        )
    return None


def _attempt(config: Config, folder: Path, started_at: str, say: Say, notes: list[str]) -> Record:
    """From the last whole checkpoint to the end."""
    # Checkpoints are read and written without a word on how far that is.
    train, timeout_s = config.train, config.testbed.startup_timeout_s
    assert train.checkpoint_every is not None
    last = train.warmup + train.steps
    say(f"starting {config.impl.name} on {config.world_size} ranks")
    prepare(config)
    discarded = kept.discard_damaged(folder)
    newest = kept.latest(folder)
    for damaged in discarded:
        serves = "the training began anew" if newest is None else f"{newest.name} served"
        notes.append(f"checkpoint {damaged.name} was damaged and is removed; {serves}")
        say(notes[-1])
    _cut_unfinished_line(folder / CURVE)
    _read_curve(folder)  # refused before it is trained on
    with launch(config, Worker) as ranks:
        team = Team(config, testbed_of(config), ranks)
        first = 0 if newest is None else ranks.call("load", newest, timeout_s=timeout_s)[0]
        # The first step after a start is always a warm-up, unless it is the only one.
        timed_from = min(max(train.warmup, first + 1 if first else 0), last - 1)
        for step in range(first, last):
            say(f"step {step + 1}/{last}")
            if step == timed_from:
                team.start_timing()
                before = read_cpu(ranks.pids())
            team.step()
            _keep(folder, Point(step, team.steps[-1][0].loss, team.steps[-1][0].grad_norm))
            done = step + 1
            if done % train.checkpoint_every == 0 and done < last:
                ranks.call("save", folder / f"step-{done:08}", done, timeout_s=timeout_s)
                kept.keep_newest(folder, KEPT)
        noise = noise_between(before, read_cpu(ranks.pids()), attempts=1)
        noise = replace(noise, busy_limit=team.testbed.busy_limit)
        team.stop_timing()
        return record_of(team, noise, started_at, name_cohort(config, started_at))


@contextmanager
def _folder(config: Config) -> Iterator[Path]:
    """Where the checkpoints of this training lie: kept for a later call when there is an `out`."""
    if config.out is not None:
        folder = _kept_in(config, config.out)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="suite-training-") as root:
        folder = Path(root) / "checkpoints"
        folder.mkdir()
        yield folder


def _kept_in(config: Config, out: str) -> Path:
    return Path(out) / "checkpoints" / config.hash()


CURVE = "curve.jsonl"
LOST = Point(-1, math.nan, math.nan)
"""A step that a crash of the machine took out of the curve."""


def _keep(folder: Path, point: Point) -> None:
    with (folder / CURVE).open("a") as file:
        values = {key: value if math.isfinite(value) else None for key, value in vars(point).items()}
        file.write(json.dumps(values) + "\n")


def _cut_unfinished_line(file: Path) -> None:
    if file.exists():
        content = file.read_bytes()
        file.write_bytes(content[: content.rfind(b"\n") + 1])


def _read_curve(folder: Path) -> dict[int, Point]:
    """By step; what was repeated after a restart as it was the last time. Raises UsageError for a file that
    is not a curve."""
    file = folder / CURVE
    if not file.exists():
        return {}
    try:
        points = [typed.build(Point, json.loads(line)) for line in file.read_bytes().splitlines()]
    except (ValueError, KeyError, RecursionError) as error:
        raise UsageError(
            f"{file} is damaged ({error}); remove {folder} to start the training anew"
        ) from error
    return {point.step: point for point in points}
