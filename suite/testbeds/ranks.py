"""The parent's end of ranks that run as its child processes: calls, failures by name, ending them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import IO, Any

from suite.errors import RankError
from suite.testbeds.whereabouts import Whereabouts

KILL_GRACE_S = 5.0
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


class Rank:
    """The parent's end of one rank."""

    def __init__(
        self,
        number: int,
        process: Any,
        channel: Connection,
        log: IO[bytes],
        whereabouts: Whereabouts,
    ) -> None:
        self.number = number
        self.process = process
        self.channel = channel
        self.whereabouts = whereabouts
        self._log = log

    def printed(self, since: int = 0) -> str:
        """What the rank has printed, from that byte on."""
        # Not by seeking: the rank writes at the position that both share.
        return os.pread(self._log.fileno(), self.log_size() - since, since).decode(errors="replace").strip()

    def log_size(self) -> int:
        return os.fstat(self._log.fileno()).st_size

    def output(self, lines: int = 15) -> str:
        """The end of what the rank printed."""
        return "\n".join(self.printed().splitlines()[-lines:])

    def where(self) -> str:
        """What it told last, in brackets; empty when it told nothing."""
        text = str(self.whereabouts.read())
        return f" ({text})" if text else ""

    def close(self) -> None:
        self.channel.close()
        self._log.close()


class LocalRanks:
    """Running ranks on this host (see `suite.testbeds.testbed.Ranks`)."""

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
        seen = self._sightings(silent.values())
        while silent:
            ready = wait(list(silent), timeout=max(0.0, min(LOOK_S, deadline - time.monotonic())))
            now = self._sightings(silent.values())
            if not failures and now != seen:
                seen, deadline = now, time.monotonic() + timeout_s
            elif not ready and time.monotonic() >= deadline:
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
            raise min(failures, key=_is_consequence)
        if silent:
            error = self._hung(list(silent.values()), doing, timeout_s)
            self.kill()
            raise error
        return [answers[rank.number] for rank in self._ranks]

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
        rank.process.join(KILL_GRACE_S)
        code = rank.process.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"exited with {code}"
        return RankError(f"rank {rank.number} {how} in {doing}{rank.where()}", rank.number, rank.output())

    @staticmethod
    def _sightings(ranks: Iterable[Rank]) -> dict[int, int]:
        return {rank.number: rank.whereabouts.read().count for rank in ranks}

    def _hung(self, silent: list[Rank], doing: str, timeout_s: float) -> RankError:
        """Names the ranks that are not waiting in a collective: they are what the others wait for."""
        stacks = _stacks(silent)
        rank = next((rank for rank in silent if not _waits(rank, stacks[rank.number])), silent[0])
        others = ", ".join(str(other.number) for other in silent if other is not rank)
        return RankError(
            f"rank {rank.number} made no progress for {timeout_s:g} s in {doing}{rank.where()}"
            + (f"; also silent: rank {others}" if others else ""),
            rank.number,
            "\n".join(f"--- rank {item.number}{item.where()}\n{stacks[item.number]}" for item in silent),
        )

    def end(self) -> None:
        """Ends every rank and what it started, and waits until they are gone."""
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
        self._ended = True
        for rank in self._ranks:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.process.pid, signal.SIGKILL)
        for rank in self._ranks:
            rank.process.join(KILL_GRACE_S)
            rank.close()


def _stacks(ranks: Sequence[Rank]) -> dict[int, str]:
    """Where each of them is right now: asks it to print its stacks and reads them from its log. One that
    is stopped by a signal prints none."""
    before = [rank.log_size() for rank in ranks]
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank.process.pid, signal.SIGUSR1)
    time.sleep(STACKS_S)
    return {rank.number: rank.printed(size) for rank, size in zip(ranks, before, strict=True)}


def _waits(rank: Rank, stack: str) -> bool:
    """Whether it is inside a collective: by its own word, or on the stack of its training thread."""
    training_thread = stack.rpartition("Current thread")[2]
    return bool(rank.whereabouts.read().waiting) or "torch/distributed/" in training_thread


def _is_consequence(failure: RankError) -> bool:
    """Whether a rank failed only because its connection to another one broke."""
    return "onnection" in str(failure) or "roken pipe" in str(failure)
