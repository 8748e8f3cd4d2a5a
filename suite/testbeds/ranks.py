"""The caller's end of running ranks: calls, failures by name, ending them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from suite.errors import RankError
from suite.testbeds.process import KILL_GRACE_S, Process

FAILURE_GRACE_S = 0.5
LOOK_S = 1.0
"""How often silent ranks are looked at for progress."""
STACKS_S = 0.3
"""How long ranks are given to print their stacks."""


@dataclass(frozen=True)
class Raised:
    """A rank's answer when its program raised."""

    message: str
    traceback: str


@dataclass(frozen=True)
class Rank:
    """The caller's end of one rank."""

    number: int
    process: Process
    channel: Connection

    def where(self) -> str:
        """What it told last, in brackets; empty when it told nothing."""
        text = str(self.process.sighting())
        return f" ({text})" if text else ""


class LocalRanks:
    """Running ranks that answer over a channel each (see `suite.testbeds.testbed.Ranks`)."""

    def __init__(self, ranks: list[Rank]) -> None:
        self._ranks = ranks
        self._ended = False

    def pids(self) -> list[int]:
        return [rank.process.pid for rank in self._ranks]

    def call(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        for rank in self._ranks:
            with suppress(BrokenPipeError):  # a dead rank is found, with its story, in `answers`
                rank.channel.send((method, arguments))
        return self.answers(method, timeout_s)

    def answers(self, doing: str, timeout_s: float) -> list[Any]:
        """One answer from every rank, in rank order."""
        answers: dict[int, Any] = {}
        failures: list[RankError] = []
        silent = {rank.channel: rank for rank in self._ranks}
        deadline = time.monotonic() + timeout_s
        seen: dict[int, int] = {}
        while silent:
            ready = wait(list(silent), timeout=max(0.0, min(LOOK_S, deadline - time.monotonic())))
            if not ready:
                now = self._progress(list(silent.values()))
                if not failures and now != seen:
                    seen, deadline = now, time.monotonic() + timeout_s
                elif time.monotonic() >= deadline:
                    break
            for channel in ready:
                rank = silent.pop(channel)  # type: ignore[call-overload]
                answer = self._receive(rank, doing)
                if isinstance(answer, RankError):
                    # The first to be heard is often a peer that lost its connection to the rank
                    # that really failed: hear the others for a moment, then name the cause.
                    deadline = min(deadline, time.monotonic() + FAILURE_GRACE_S)
                    failures.append(answer)
                else:
                    answers[rank.number] = answer
        if failures:
            self.kill()
            raise min(failures, key=_distance)
        if silent:
            error = self._hung(list(silent.values()), doing, timeout_s)
            self.kill()
            raise error
        return [answers[rank.number] for rank in self._ranks]

    def _ask(self, ranks: Sequence[Rank], method: str) -> list[Any]:
        """That method of the processes of some ranks; many are asked at once where asking takes time."""
        return [getattr(rank.process, method)() for rank in ranks]

    def _progress(self, ranks: Sequence[Rank]) -> dict[int, int]:
        sightings = self._ask(ranks, "sighting")
        return {rank.number: sighting.count for rank, sighting in zip(ranks, sightings, strict=True)}

    def _receive(self, rank: Rank, doing: str) -> Any:
        try:
            answer = rank.channel.recv()
        except (EOFError, ConnectionResetError):
            return self._died(rank, doing)
        if isinstance(answer, Raised):
            message = f"rank {rank.number} failed in {doing}{rank.where()}: {answer.message}"
            return RankError(message, rank.number, answer.traceback, answer.message.partition(":")[0])
        return answer

    def _died(self, rank: Rank, doing: str) -> RankError:
        message = f"rank {rank.number} {rank.process.ended()} in {doing}{rank.where()}"
        return RankError(message, rank.number, rank.process.output())

    def _hung(self, silent: list[Rank], doing: str, timeout_s: float) -> RankError:
        """Names the ranks that are not waiting in a collective: they are what the others wait for."""
        stacks = self._stacks(silent)
        rank = next((rank for rank in silent if not _waits(rank, stacks[rank.number])), silent[0])
        others = ", ".join(str(other.number) for other in silent if other is not rank)
        return RankError(
            f"rank {rank.number} made no progress for {timeout_s:g} s in {doing}{rank.where()}"
            + (f"; also silent: rank {others}" if others else ""),
            rank.number,
            "\n".join(f"--- rank {item.number}{item.where()}\n{stacks[item.number]}" for item in silent),
        )

    def _stacks(self, ranks: Sequence[Rank]) -> dict[int, str]:
        """Where each of them is right now."""
        self._ask(ranks, "ask_for_stack")
        time.sleep(STACKS_S)
        return dict(zip((rank.number for rank in ranks), self._ask(ranks, "stack"), strict=True))

    def end(self) -> None:
        """Ends every rank and what it started, and waits until they are gone."""
        if self._ended:
            return
        for rank in self._ranks:
            with suppress(BrokenPipeError, OSError):
                rank.channel.send(None)
        deadline = time.monotonic() + KILL_GRACE_S
        for rank in self._ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """The same at once; harmless when they have ended."""
        if self._ended:
            return
        try:
            self._kill_all()
            for rank in self._ranks:
                rank.process.join(KILL_GRACE_S)
        except BaseException:
            self._kill_all()  # an interruption may have come between two of them
            raise
        finally:
            self._ended = True
            for rank in self._ranks:
                rank.channel.close()
                rank.process.close()

    def _kill_all(self) -> None:
        for rank in self._ranks:
            rank.process.kill()


def _waits(rank: Rank, stack: str) -> bool:
    """Whether it is inside a collective: by its own word, or on the stack of its training thread."""
    training_thread = stack.rpartition("Current thread")[2]
    return bool(rank.process.sighting().waiting) or "torch/distributed/" in training_thread


def _distance(failure: RankError) -> int:
    """How far from the cause: a rank that died first, then one that raised, and last one that raised only
    because its connection to another one broke."""
    if not failure.raised:
        return 0
    return 2 if "onnection" in str(failure) or "roken pipe" in str(failure) else 1
