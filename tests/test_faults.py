"""What goes wrong in a training: the run ends soon, and says which rank, which unit, which collective."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch

from suite.config import Config
from suite.config_load import load
from suite.errors import RankError
from suite.harness.launch import launch
from suite.harness.measure import Failure, measure
from suite.harness.worker import Worker
from suite.impls.trainer import Trainer
from suite.testbeds.testbed import RankContext
from suite.testbeds.whereabouts import Whereabouts

SMALL = [
    "workload.data=synthetic",
    "workload.model.layers=2",
    "workload.model.hidden=32",
    "workload.model.heads=2",
    "workload.model.intermediate=32",
    "testbed.ranks=3",
    "testbed.timeout_s=2",
    "train.steps=4",
    "train.warmup=0",
]
BLOCK = "bert.encoder.layer.1"

Fault = Callable[[], object]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    time.sleep(600)


def fail() -> None:
    raise ValueError("planted failure")


def faulty(
    rank: int, where: str, fault: Fault, step: int = 1, times: int = 1
) -> Callable[[Config, RankContext], Worker]:
    """A worker that comes to harm on `rank` when it tells, after that step, that it is at `where`."""

    class Faulty(Worker):
        def __init__(self, config: Config, context: RankContext) -> None:
            if context.rank == rank:
                tell, left = context.whereabouts.tell, [times]

                def told(doing: str, waiting: str = "") -> None:
                    tell(doing, waiting)
                    if left[0] and self._step > step and where in f"{doing}, {waiting}":
                        left[0] -= 1
                        fault()

                self._step = 0
                context.whereabouts.tell = told  # type: ignore[method-assign]
            super().__init__(config, context)

    return Faulty


def failure_of(program: Callable[[Config, RankContext], Worker], *words: str) -> tuple[RankError, float]:
    """What a training says that came to harm, and how many seconds it took from its start."""
    config = load([*SMALL, *words])
    with pytest.raises(RankError) as caught, launch(config, program) as ranks:
        start = time.monotonic()
        for _ in range(4):
            ranks.call("step", timeout_s=config.testbed.timeout_s)
    return caught.value, time.monotonic() - start


@pytest.mark.parametrize(
    ("where", "told"),
    [
        (f"forward of {BLOCK}", f"forward of {BLOCK}"),
        (f"backward of {BLOCK}", f"backward of {BLOCK}"),
        (f", gather {BLOCK}", f"waiting for gather {BLOCK}"),
        (f", reduce {BLOCK}", f"waiting for reduce {BLOCK}"),
        ("optimizer step", "optimizer step"),
        ("all-reduce of the gradient norm", "optimizer step, waiting for all-reduce of the gradient norm"),
    ],
)
def test_a_rank_killed_anywhere_in_a_step_is_named_with_unit_and_collective(where: str, told: str) -> None:
    error, seconds = failure_of(faulty(1, where, kill), "impl=zero3")
    assert str(error).startswith("rank 1 was ended by SIGKILL in step (") and told in str(error)
    assert error.rank == 1 and seconds < 10


@pytest.mark.parametrize("impl", ["ddp", "fsdp2", "fairscale-fsdp", "deepspeed-zero3"])
def test_the_unit_is_named_also_in_frameworks_that_tell_nothing(impl: str) -> None:
    error, _ = failure_of(faulty(2, f"forward of {BLOCK}", kill), f"impl={impl}")
    assert str(error) == f"rank 2 was ended by SIGKILL in step (forward of {BLOCK})"


@pytest.mark.parametrize("fault", [hang, stop], ids=["sleeps", "stopped by a signal"])
def test_a_rank_that_hangs_is_named_with_its_unit(fault: Fault) -> None:
    error, seconds = failure_of(faulty(1, f"backward of {BLOCK}", fault), "impl=zero3")
    assert f"rank 1 made no progress for 2 s in step (backward of {BLOCK})" in str(error)
    assert "waiting for" in error.details  # what the others were doing
    assert seconds < 15


def test_a_rank_that_raises_is_named_with_its_unit() -> None:
    error, _ = failure_of(faulty(0, f"forward of {BLOCK}", fail), "impl=mics")
    assert str(error) == f"rank 0 failed in step (forward of {BLOCK}): ValueError: planted failure"


def test_a_slow_step_that_gets_on_is_not_a_hang() -> None:
    """Each block takes longer than half of the time that a rank may stand still."""
    config = load([*SMALL, "impl=zero3", "testbed.ranks=2", "testbed.timeout_s=1"])
    slow = faulty(0, "forward of", lambda: time.sleep(0.6), step=-1, times=9)
    with launch(config, slow) as ranks:
        start = time.monotonic()
        ranks.call("step", timeout_s=1)
        assert time.monotonic() - start > 1


def poisoned(rank: int, step: int) -> Callable[[Config, RankContext], Worker]:
    """A worker whose loss is NaN on one rank after so many steps."""

    class Poisoned(Worker):
        def __init__(self, config: Config, context: RankContext) -> None:
            super().__init__(config, context)
            forward_backward, calls = self._trainer._forward_backward, [0]

            def with_nan(micro_batch: object, last: bool) -> torch.Tensor:
                loss = forward_backward(micro_batch, last)  # type: ignore[arg-type]
                calls[0] += 1
                return loss * float("nan") if context.rank == rank and calls[0] > step else loss

            self._trainer._forward_backward = with_nan  # type: ignore[method-assign]

    return Poisoned


@pytest.mark.parametrize("impl", ["ddp", "zero3"])
def test_a_loss_that_is_not_a_number_on_one_rank_names_that_rank(impl: str) -> None:
    error, _ = failure_of(poisoned(2, step=1), f"impl={impl}")
    assert error.rank == 2
    assert "FloatingPointError: the loss of this rank's own batch is nan" in str(error)


def test_gradients_that_are_not_finite_end_the_run_although_the_losses_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from suite.impls.ddp import DDP

    step = DDP._optimizer_step
    monkeypatch.setattr(DDP, "_optimizer_step", lambda self: (step(self)[0] * float("inf"), False))
    error, _ = failure_of(Worker, "impl=ddp")
    assert "all losses are finite, but the gradient norm is inf" in str(error)


def test_a_step_that_fp16_skips_is_no_error() -> None:
    config = load([*SMALL, "impl=zero3", "train.precision=fp16", "testbed.ranks=2"])

    class Overflowing(Worker):
        def __init__(self, config: Config, context: RankContext) -> None:
            super().__init__(config, context)
            self._trainer.engine.loss_scale.value = 2.0**60  # type: ignore[attr-defined]

    with launch(config, Overflowing) as ranks:
        ranks.call("step", timeout_s=30)
        assert ranks.call("resources", timeout_s=30)[0].details["skipped_steps"] == 1


def test_the_other_members_of_a_cohort_go_on_and_the_failed_ones_ranks_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train_step, seen = Trainer.train_step, list[list[int]]()

    def dies_in_ddp(self: Trainer, batches: object) -> object:
        if type(self).__name__ == "DDP" and self.topology.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, batches)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "train_step", dies_in_ddp)
    cohort = [load([*SMALL, "testbed.ranks=2", f"impl={impl}"]) for impl in ("ddp", "zero3")]
    zero3, ddp = measure(cohort, lambda text: seen.append(_children()))
    assert isinstance(ddp, Failure) and "rank 1 was ended by SIGKILL in step" in str(ddp.error)
    assert not isinstance(zero3, Failure) and len(zero3.losses) % 4 == 0  # more on a noisy machine
    assert (max(map(len, seen)), len(seen[-1])) == (4, 2)  # a failed member's ranks do not stay


def _children() -> list[int]:
    import multiprocessing

    return [child.pid or 0 for child in multiprocessing.active_children()]


def test_telling_costs_a_microsecond_or_so() -> None:
    whereabouts = Whereabouts()
    start = time.perf_counter()
    for _ in range(10_000):
        whereabouts.tell("forward of bert.encoder.layer.11", "gather bert.encoder.layer.11")
    assert (time.perf_counter() - start) / 10_000 < 20e-6  # typically 1e-6; a step has a hundred of them
    sighting = whereabouts.read()
    assert (sighting.count, sighting.waiting) == (10_000, "gather bert.encoder.layer.11")
