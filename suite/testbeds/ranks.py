"""The caller's end of running ranks: calls, failures by name, ending them."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from suite.errors import RankError

KILL_GRACE_S = 5.0
FAILURE_GRACE_S = 0.5


@dataclass(frozen=True)
class Raised:
    """A rank's answer when its program raised."""

    message: str
    traceback: str


class Process(Protocol):
    """A rank's process, as its parent sees it; on another machine its parent is asked."""

    @property
    def pid(self) -> int: ...

    def ended(self) -> str:
        """How it came to its end; called when its channel is closed."""
        ...

    def join(self, timeout_s: float) -> None:
        """Waits until it is gone, so long at most."""
        ...

    def kill(self) -> None:
        """Ends it and all that it has started, without waiting for it."""
        ...

    def stack(self) -> str:
        """Where it is right now."""
        ...

    def output(self) -> str:
        """The end of what it printed."""
        ...


class ChildProcess:
    """A rank forked from this process."""

    def __init__(self, process: Any, log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> str:
        self._process.join(KILL_GRACE_S)
        code = self._process.exitcode
        return f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"exited with {code}"

    def join(self, timeout_s: float) -> None:
        self._process.join(timeout_s)

    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def stack(self) -> str:
        """Asks it to print its stacks and reads them from its log."""
        before = self._log.stat().st_size
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
        time.sleep(0.2)
        return self._log.read_text(errors="replace")[before:].strip()

    def output(self, lines: int = 15) -> str:
        return "\n".join(self._log.read_text(errors="replace").strip().splitlines()[-lines:])


@dataclass(frozen=True)
class Rank:
    """The caller's end of one rank."""

    number: int
    process: Process
    channel: Connection


class LocalRanks:
    """Running ranks that answer over a channel each (see `suite.testbeds.testbed.Ranks`)."""

    def __init__(self, ranks: list[Rank]) -> None:
        self._ranks = ranks

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
        while silent:
            ready = wait(list(silent), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
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
            raise min(failures, key=_is_consequence)
        if silent:
            raise self._hung(list(silent.values()), doing, timeout_s)
        return [answers[rank.number] for rank in self._ranks]

    def _receive(self, rank: Rank, doing: str) -> Any:
        try:
            answer = rank.channel.recv()
        except (EOFError, ConnectionResetError):
            return self._died(rank, doing)
        if isinstance(answer, Raised):
            message = f"rank {rank.number} failed in {doing}: {answer.message}"
            return RankError(message, rank.number, answer.traceback)
        return answer

    def _died(self, rank: Rank, doing: str) -> RankError:
        message = f"rank {rank.number} {rank.process.ended()} in {doing}"
        return RankError(message, rank.number, rank.process.output())

    def _hung(self, silent: list[Rank], doing: str, timeout_s: float) -> RankError:
        """Names the ranks that are not waiting in a collective: they are what the others wait for."""
        stacks = {rank.number: rank.process.stack() for rank in silent}
        culprits = [number for number, stack in stacks.items() if "torch/distributed/" not in stack]
        number = (culprits or sorted(stacks))[0]
        others = ", ".join(str(other) for other in sorted(stacks) if other != number)
        waiting = f" (also silent: rank {others})" if others else ""
        return RankError(
            f"rank {number} did not answer within {timeout_s:g} s in {doing}{waiting}",
            number,
            "\n".join(f"--- rank {other}\n{stack}" for other, stack in sorted(stacks.items())),
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
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join(KILL_GRACE_S)
            rank.channel.close()


def _is_consequence(failure: RankError) -> bool:
    """Whether a rank failed only because its connection to another one broke."""
    return "onnection" in str(failure) or "roken pipe" in str(failure)
