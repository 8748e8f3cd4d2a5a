"""Ranks on this host: they answer together, a failure names its rank, and nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from suite.errors import RankError
from suite.testbeds import forked
from suite.testbeds.local import LocalTestbed
from suite.testbeds.process import ChildProcess
from suite.testbeds.testbed import RankContext


class Program:
    """A rank program with every way to go wrong."""

    def __init__(self, context: RankContext) -> None:
        self._context = context

    def sum_of_ranks(self, extra: float) -> float:
        value = torch.tensor(self._context.rank + extra)
        dist.all_reduce(value)
        return value.item()

    def raise_on(self, rank: int) -> None:
        if self._context.rank == rank:
            raise ValueError("planted failure")
        self._context.barrier()

    def die_on(self, rank: int) -> None:
        if self._context.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        self._context.barrier()

    def hang_on(self, rank: int) -> None:
        if self._context.rank == rank:
            time.sleep(60)
        self._context.barrier()

    def start_child(self) -> int:
        return subprocess.Popen(["sleep", "60"]).pid

    def print_something(self) -> None:
        print("on stdout")
        print("on stderr", file=sys.stderr)
        os.write(1, b"on the descriptor")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie still has a pid; it is gone for everybody but its parent.
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def gone_soon(pids: list[int]) -> bool:
    """A kill signal takes effect a moment after it was sent."""
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("ranks", [1, 3])
def test_all_ranks_answer_in_rank_order(ranks: int) -> None:
    with LocalTestbed(ranks, ranks).launch(Program, 30) as running:
        answers = running.call("sum_of_ranks", 1.0, timeout_s=30)
        assert answers == [sum(range(ranks)) + ranks] * ranks
        assert len(set(running.pids())) == ranks


def test_a_rank_that_raises_is_named_with_its_traceback() -> None:
    with pytest.raises(RankError) as caught, LocalTestbed(3, 3).launch(Program, 30) as running:
        pids = running.pids()
        running.call("raise_on", 2, timeout_s=30)
    assert caught.value.rank == 2
    assert "rank 2 failed in raise_on: ValueError: planted failure" in str(caught.value)
    assert "raise ValueError" in caught.value.details
    assert not any(alive(pid) for pid in pids)


def test_a_rank_that_dies_is_named_with_its_signal_although_others_lose_their_connection() -> None:
    with pytest.raises(RankError, match="rank 1 was ended by SIGKILL in die_on") as caught:
        with LocalTestbed(3, 3).launch(Program, 30) as running:
            pids = running.pids()
            running.call("die_on", 1, timeout_s=30)
    assert caught.value.rank == 1
    assert not any(alive(pid) for pid in pids)


def test_a_rank_that_hangs_is_told_from_those_that_wait_for_it() -> None:
    with pytest.raises(RankError, match="rank 1 made no progress for 1 s in hang_on") as caught:
        with LocalTestbed(3, 3).launch(Program, 30) as running:
            pids = running.pids()
            running.call("hang_on", 1, timeout_s=1)
    assert caught.value.rank == 1
    assert "in hang_on" in caught.value.details
    assert not any(alive(pid) for pid in pids)


def test_what_a_rank_started_ends_with_it() -> None:
    with LocalTestbed(2, 2).launch(Program, 30) as running:
        children = running.call("start_child", timeout_s=30)
        assert all(alive(pid) for pid in children)
    assert gone_soon(children)


def test_ranks_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\n"
        "from suite.testbeds.local import LocalTestbed\n"
        "with LocalTestbed(2, 2).launch(lambda context: object(), 30) as ranks:\n"
        "    print(*ranks.pids(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    assert gone_soon(pids)


def test_a_rank_that_has_not_got_as_far_as_a_session_of_its_own_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forked.os, "setsid", lambda: time.sleep(60))
    with pytest.raises(RankError, match="made no progress for 1 s in start-up"):
        with LocalTestbed(2, 2).launch(Program, 1):
            pass
    assert multiprocessing.active_children() == []


def test_an_interruption_right_after_a_fork_leaves_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_rank, pids = forked.fork_rank, []

    def interrupted(number: int, *others: Any) -> Any:
        process = fork_rank(number, *others)
        pids.append(process.pid)
        if number == 1:
            signal.raise_signal(signal.SIGINT)  # before the caller has noted the process
        return process

    monkeypatch.setattr(forked, "fork_rank", interrupted)
    with pytest.raises(KeyboardInterrupt), LocalTestbed(3, 3).launch(Program, 30):
        pass
    assert len(pids) == 3 and gone_soon(pids)  # it was heard when all were noted


@pytest.mark.parametrize("method", ["join", "kill"])
def test_an_interruption_while_ranks_are_ended_ends_all_of_them(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    original, interruptions = getattr(ChildProcess, method), [KeyboardInterrupt()]

    def interrupted(process: ChildProcess, *others: Any) -> None:
        if interruptions:
            raise interruptions.pop()
        original(process, *others)

    with pytest.raises(KeyboardInterrupt), LocalTestbed(3, 3).launch(Program, 30) as running:
        pids = running.pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # they will not end by themselves
        monkeypatch.setattr(ChildProcess, method, interrupted)
    assert gone_soon(pids)


def test_ranks_print_nothing_on_our_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with LocalTestbed(2, 2).launch(Program, 30) as running:
        running.call("print_something", timeout_s=30)
    assert capfd.readouterr() == ("", "")


def test_a_program_that_cannot_start_is_reported_like_any_failure() -> None:
    def broken(context: RankContext) -> Program:
        raise RuntimeError("no model")

    with pytest.raises(RankError, match=r"failed in start-up \(building .*\): RuntimeError: no model"):
        with LocalTestbed(2, 2).launch(broken, 30):
            pass


def test_a_rank_may_compute_on_several_threads_after_its_parent_has_computed() -> None:
    """The parent keeps to one thread (conftest.py): a forked thread pool would hang here."""

    class Computes(Program):
        def multiply(self) -> float:
            return (torch.ones(600, 600) @ torch.ones(600, 600)).sum().item()

    assert (torch.ones(600, 600) @ torch.ones(600, 600)).sum() == 600**3
    with LocalTestbed(1, 1, threads=2).launch(Computes, 30) as running:
        assert running.call("multiply", timeout_s=20) == [600**3]
