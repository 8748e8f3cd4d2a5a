"""Ranks as processes of this host, forked from a parent that has already imported torch.

Forking makes a start cost milliseconds instead of seconds per rank. The parent must not have run
torch on several threads before (`stay_forkable`): a forked OpenMP pool hangs.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from suite.errors import RankError
from suite.testbeds.testbed import Program, RankContext, Testbed

LOOPBACK = "127.0.0.1"
KILL_GRACE_S = 5.0
FAILURE_GRACE_S = 0.5
PR_SET_PDEATHSIG = 1


def stay_forkable() -> None:
    """Keeps this process from starting torch's thread pool, on which forked ranks would hang in their
    first parallel region. To be called before anything that may compute, imports of frameworks
    included; ranks set their own number of threads."""
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Raised:
    """A rank's answer when its program raised."""

    message: str
    traceback: str


class Rank:
    """The parent's end of one rank."""

    def __init__(self, number: int, process: Any, channel: Connection, log: Path) -> None:
        self.number = number
        self.process = process
        self.channel = channel
        self.log = log

    def stack(self) -> str:
        """Where the rank is right now: asks it to print its stacks and reads them from its log."""
        before = self.log.stat().st_size
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        return self.log.read_text(errors="replace")[before:].strip()

    def output(self, lines: int = 15) -> str:
        """The end of what the rank printed."""
        return "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-lines:])


class LocalRanks:
    """Running ranks on this host (see `suite.testbeds.testbed.Ranks`)."""

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
        rank.process.join(KILL_GRACE_S)
        code = rank.process.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"exited with {code}"
        return RankError(f"rank {rank.number} {how} in {doing}", rank.number, rank.output())

    def _hung(self, silent: list[Rank], doing: str, timeout_s: float) -> RankError:
        """Names the ranks that are not waiting in a collective: they are what the others wait for."""
        stacks = {rank.number: rank.stack() for rank in silent}
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
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.process.pid, signal.SIGKILL)
        for rank in self._ranks:
            rank.process.join(KILL_GRACE_S)
            rank.channel.close()


class LocalTestbed(Testbed):
    """`ranks` processes on this host; `ranks_per_node` only tells the topology."""

    evidence = "measured"

    def __init__(self, ranks: int, ranks_per_node: int, threads: int | None = None) -> None:
        self.ranks = ranks
        self.ranks_per_node = ranks_per_node
        self.threads = threads or max(1, (os.cpu_count() or 1) // ranks)

    @contextmanager
    def launch(self, program: Program, startup_timeout_s: float) -> Iterator[LocalRanks]:
        with tempfile.TemporaryDirectory(prefix="suite-ranks-") as folder:
            ranks = LocalRanks(self._fork(program, Path(folder)))
            try:
                ranks.answers("start-up", startup_timeout_s)
                yield ranks
            except BaseException:
                ranks.kill()
                raise
            ranks.end()

    def _fork(self, program: Program, folder: Path) -> list[Rank]:
        fork = multiprocessing.get_context("fork")
        # The listening socket is made here, on a port that the kernel picks, and inherited by
        # rank 0: nobody can take the port between choosing and using it.
        listener = socket.create_server((LOOPBACK, 0), backlog=max(128, 4 * self.ranks))
        ranks: list[Rank] = []
        try:
            for number in range(self.ranks):
                ours, theirs = fork.Pipe()
                log = folder / f"rank-{number}.log"
                log.touch()
                process = fork.Process(
                    target=self._child,
                    args=(number, program, theirs, listener, log, os.getpid()),
                    name=f"rank-{number}",
                )
                process.start()
                theirs.close()
                ranks.append(Rank(number, process, ours, log))
        except BaseException:
            LocalRanks(ranks).kill()
            raise
        finally:
            listener.close()
        return ranks

    def _child(
        self,
        number: int,
        program: Program,
        channel: Connection,
        listener: socket.socket,
        log: Path,
        parent: int,
    ) -> NoReturn:
        """One rank, from fork to exit; never returns into the parent's code."""
        try:
            _become_rank_process(log, parent)
            context = self._context(number, listener)
            _serve(program, context, channel)
        except BaseException as error:
            # Not an error to report: the parent has gone away, or told us to end.
            if not isinstance(error, (EOFError, BrokenPipeError)):
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)

    def _context(self, number: int, listener: socket.socket) -> RankContext:
        port = listener.getsockname()[1]
        os.environ.update(
            RANK=str(number),
            LOCAL_RANK=str(number % self.ranks_per_node),
            WORLD_SIZE=str(self.ranks),
            LOCAL_WORLD_SIZE=str(self.ranks_per_node),
            MASTER_ADDR=LOOPBACK,
            MASTER_PORT=str(port),
            GLOO_SOCKET_IFNAME="lo",
        )
        torch.set_num_threads(self.threads)
        device, backend = _device(number)
        store = dist.TCPStore(
            LOOPBACK,
            port,
            self.ranks,
            is_master=number == 0,
            timeout=timedelta(seconds=60),
            wait_for_workers=False,
            master_listen_fd=listener.detach() if number == 0 else None,
        )
        dist.init_process_group(backend, store=store, rank=number, world_size=self.ranks)
        return RankContext(number, self.ranks, self.ranks_per_node, device)


def _is_consequence(failure: RankError) -> bool:
    """Whether a rank failed only because its connection to another one broke."""
    return "onnection" in str(failure) or "roken pipe" in str(failure)


def _device(number: int) -> tuple[torch.device, str]:
    """This rank's device and the process-group backend for it."""
    if torch.cuda.is_available():
        device = torch.device("cuda", number % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device, "cuda:nccl,cpu:gloo"
    return torch.device("cpu"), "gloo"


def _become_rank_process(log: Path, parent: int) -> None:
    """A session of its own (so that all it starts can be ended with it), dying with its parent,
    silent on the terminal: what libraries print goes to the rank's log."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before prctl took effect
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, sys.__stdout__.fileno() if sys.__stdout__ else 1)
    os.dup2(output, sys.__stderr__.fileno() if sys.__stderr__ else 2)
    sys.stdout = os.fdopen(os.dup(output), "w", buffering=1)
    sys.stderr = os.fdopen(os.dup(output), "w", buffering=1)
    logging.getLogger().handlers.clear()
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)


def _serve(program: Program, context: RankContext, channel: Connection) -> None:
    """Builds the program's object, then answers calls until told to end (None)."""
    try:
        target = program(context)
    except Exception as error:
        channel.send(_raised(error))
        raise
    channel.send(None)
    while (message := channel.recv()) is not None:
        method, arguments = message
        try:
            answer = getattr(target, method)(*arguments)
        except Exception as error:
            channel.send(_raised(error))
            raise
        channel.send(answer)
    close = getattr(target, "close", None)
    if close is not None:
        close()


def _raised(error: Exception) -> Raised:
    first = (str(error).strip().splitlines() or [""])[0]
    return Raised(f"{type(error).__name__}: {first}", traceback.format_exc())
