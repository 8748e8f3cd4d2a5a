"""The caller's end of running ranks: calls, failures by name, ending them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import IO, Any, Protocol

from suite.errors import RankError
from suite.testbeds.whereabouts import Sighting, Whereabouts

KILL_GRACE_S = 5.0
FAILURE_GRACE_S = 0.5
LOOK_S = 5.0
"""How often, at most, silent ranks are looked at for progress."""
STACK_S = 0.3
"""How long a rank is given to print its stacks."""


@dataclass(frozen=True)
class Raised:
    """A rank's answer when its program raised."""

    message: str
    traceback: str


class Process(Protocol):
    """A rank's process, as its parent sees it; on another machine its parent is asked."""

    @property
    def pid(self) -> int: ...

    def sighting(self) -> Sighting:
        """What it told last, also after its end."""
        ...

    def ended(self) -> str:
        """How it came to its end; called when its channel is closed."""
        ...

    def join(self, timeout_s: float) -> None:
        """Waits until it is gone, so long at most."""
        ...

    def kill(self) -> None:
        """Ends it and all that it has started, without waiting for it."""
        ...

    def ask_stack(self) -> None:
        """Asks it for its stack, without waiting for it."""
        ...

    def stack(self) -> str:
        """Where it was when it was asked; empty when it is stopped and cannot say."""
        ...

    def output(self) -> str:
        """The end of what it printed."""
        ...


class ChildProcess:
    """A rank forked from this process; `log` is the file that both have open."""

    def __init__(self, process: Any, log: IO[bytes], whereabouts: Whereabouts) -> None:
        self._process = process
        self._log = log
        self._whereabouts = whereabouts
        self._asked_at = (0.0, 0)

    @property
    def pid(self) -> int:
        return self._process.pid

    def sighting(self) -> Sighting:
        return self._whereabouts.read()

    def ended(self) -> str:
        self._process.join(KILL_GRACE_S)
        code = self._process.exitcode
        return f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"exited with {code}"

    def join(self, timeout_s: float) -> None:
        self._process.join(timeout_s)

    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def ask_stack(self) -> None:
        self._asked_at = (time.monotonic(), os.fstat(self._log.fileno()).st_size)
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)

    def stack(self) -> str:
        """It prints its stacks into its log."""
        asked_at, size = self._asked_at
        time.sleep(max(0.0, asked_at + STACK_S - time.monotonic()))
        return self._printed(size)

    def output(self, lines: int = 15) -> str:
        return "\n".join(self._printed(0).splitlines()[-lines:])

    def _printed(self, since: int) -> str:
        # Not by seeking: the rank writes at the position that both share.
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size - since, since).decode(errors="replace").strip()


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
            left = deadline - time.monotonic()
            ready = wait(list(silent), timeout=max(0.0, min(LOOK_S, timeout_s / 5, left)))
            if not ready and not failures and (now := _counts(silent.values())) != seen:
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
        message = f"rank {rank.number} {rank.process.ended()} in {doing}{rank.where()}"
        return RankError(message, rank.number, rank.process.output())

    def _hung(self, silent: list[Rank], doing: str, timeout_s: float) -> RankError:
        """Names the ranks that are not waiting in a collective: they are what the others wait for."""
        for rank in silent:
            rank.process.ask_stack()
        stacks = {rank.number: rank.process.stack() for rank in silent}
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
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join(KILL_GRACE_S)
            rank.channel.close()


def _counts(ranks: Iterable[Rank]) -> dict[int, int]:
    return {rank.number: rank.process.sighting().count for rank in ranks}


def _waits(rank: Rank, stack: str) -> bool:
    """Whether it is inside a collective: by its own word, or on the stack of its training thread."""
    training_thread = stack.rpartition("Current thread")[2]
    return bool(rank.process.sighting().waiting) or "torch/distributed/" in training_thread


def _is_consequence(failure: RankError) -> bool:
    """Whether a rank failed only because its connection to another one broke."""
    return "onnection" in str(failure) or "roken pipe" in str(failure)
