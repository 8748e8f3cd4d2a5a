"""Ranks as processes of this host, forked from a parent that has already imported torch: what the
testbeds on one machine share.

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
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import NoReturn

import torch
import torch.distributed as dist

from suite.testbeds.devices import bound, stay_off_devices
from suite.testbeds.process import ChildProcess
from suite.testbeds.ranks import LocalRanks, Raised, Rank
from suite.testbeds.signals import ENDING, uninterrupted
from suite.testbeds.testbed import Program, RankContext
from suite.testbeds.whereabouts import Whereabouts

PR_SET_PDEATHSIG = 1

_FORK = multiprocessing.get_context("fork")


def stay_forkable() -> None:
    """Keeps this process from starting torch's thread pool, on which forked ranks would hang in their
    first parallel region. To be called before anything that may compute, imports of frameworks
    included; ranks set their own number of threads."""
    torch.set_num_threads(1)
    stay_off_devices()


@dataclass(frozen=True)
class Site:
    """Where the ranks of one run live, and how they find each other.

    Rank 0 serves the rendezvous at `address:port`, on `listener` when the parent has opened it
    already; `interface` carries the messages. `enter(rank)` is the first thing that a rank does in its
    own process, `device(rank)` says what it computes on and the process-group backend for that.
    `threads` is for torch, per rank.
    """

    ranks: int
    ranks_per_node: int
    threads: int
    address: str
    port: int
    interface: str
    device: Callable[[int], tuple[torch.device, str]]
    enter: Callable[[int], None] = lambda rank: None
    listener: socket.socket | None = None


@contextmanager
def forked_ranks(program: Program, site: Site, startup_timeout_s: float) -> Iterator[LocalRanks]:
    """Ranks running `program` at that site; all of them have ended when the context is left."""
    ranks = LocalRanks([])
    try:
        with uninterrupted():
            ranks = LocalRanks(_fork(program, site))
        ranks.answers("start-up", startup_timeout_s)
        yield ranks
        ranks.end()
    except BaseException:
        ranks.kill()
        raise


def _fork(program: Program, site: Site) -> list[Rank]:
    ranks: list[Rank] = []
    try:
        for number in range(site.ranks):
            ours, theirs = _FORK.Pipe()
            ranks.append(Rank(number, fork_rank(number, program, site, theirs), ours))
    except BaseException:
        LocalRanks(ranks).kill()
        raise
    finally:
        if site.listener is not None:
            site.listener.close()
    return ranks


def fork_rank(number: int, program: Program, site: Site, channel: Connection) -> ChildProcess:
    """One rank that answers on `channel` (closed here)."""
    # A file without a name: nothing has to be removed, whatever ends this process.
    log = tempfile.TemporaryFile()  # noqa: SIM115 (ChildProcess closes it)
    whereabouts = Whereabouts()
    process = _FORK.Process(
        target=_child,
        args=(number, program, site, channel, log.fileno(), whereabouts, os.getpid()),
        name=f"rank-{number}",
    )
    process.start()
    channel.close()
    return ChildProcess(process, log, whereabouts)


def _child(
    number: int,
    program: Program,
    site: Site,
    channel: Connection,
    log: int,
    whereabouts: Whereabouts,
    parent: int,
) -> NoReturn:
    """One rank, from fork to exit; never returns into the parent's code."""
    try:
        os.setsid()  # a session of its own, so that all it starts can be ended with it
        site.enter(number)
        _become_rank_process(log, parent)
        whereabouts.tell("joining the process group")
        context = _join(number, site, whereabouts)
        whereabouts.tell("building model and implementation")
        _serve(program, context, channel)
    except BaseException as error:
        # Not an error to report: the parent has gone away, or told us to end.
        if not isinstance(error, (EOFError, BrokenPipeError)):
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _join(number: int, site: Site, whereabouts: Whereabouts) -> RankContext:
    """Makes this process rank `number` of the process group."""
    os.environ.update(
        RANK=str(number),
        LOCAL_RANK=str(number % site.ranks_per_node),
        WORLD_SIZE=str(site.ranks),
        LOCAL_WORLD_SIZE=str(site.ranks_per_node),
        MASTER_ADDR=site.address,
        MASTER_PORT=str(site.port),
        GLOO_SOCKET_IFNAME=site.interface,
    )
    torch.set_num_threads(site.threads)
    device, backend = site.device(number)
    serves = number == 0
    store = dist.TCPStore(
        site.address,
        site.port,
        site.ranks,
        is_master=serves,
        timeout=timedelta(seconds=60),
        wait_for_workers=False,
        master_listen_fd=site.listener.detach() if serves and site.listener is not None else None,
    )
    dist.init_process_group(backend, store=store, rank=number, world_size=site.ranks, device_id=bound(device))
    return RankContext(number, site.ranks, site.ranks_per_node, device, whereabouts)


def _become_rank_process(log: int, parent: int) -> None:
    """Dies with its parent and is silent on the terminal: what libraries print goes to the rank's
    log. Not before `enter`: a change of user namespace makes the kernel forget the death signal."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before prctl took effect
        os._exit(1)
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    os.dup2(log, sys.__stdout__.fileno() if sys.__stdout__ else 1)
    os.dup2(log, sys.__stderr__.fileno() if sys.__stderr__ else 2)
    sys.stdout = os.fdopen(os.dup(log), "w", buffering=1)
    sys.stderr = os.fdopen(os.dup(log), "w", buffering=1)
    logging.getLogger().handlers.clear()
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)


def _serve(program: Program, context: RankContext, channel: Connection) -> None:
    """Builds the program's object, then answers calls until told to end (None)."""
    try:
        target = program(context)
    except Exception as error:
        channel.send(raised(error))
        raise
    channel.send(None)
    while (message := channel.recv()) is not None:
        method, arguments = message
        context.whereabouts.tell("")
        try:
            answer = getattr(target, method)(*arguments)
        except Exception as error:
            channel.send(raised(error))
            raise
        channel.send(answer)
    close = getattr(target, "close", None)
    if close is not None:
        close()


def raised(error: Exception) -> Raised:
    """What a caller is told of an exception in another process."""
    first = (str(error).strip().splitlines() or [""])[0]
    return Raised(f"{type(error).__name__}: {first}", traceback.format_exc())
