"""Ranks on the nodes of a real cluster, whose processes torchrun has started: by hand, from Slurm's job
script, or in Kubernetes.

torchrun's rank 0 becomes the driver: it runs the harness as on any machine. Every process of torchrun's,
rank 0 too, holds a seat (`suite.testbeds.seats`), from which ranks are forked. What the driver and the
seats say to each other goes over connections of their own, never through a process group whose traffic is
measured.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from torch.distributed.rendezvous import rendezvous

from suite.errors import RankError
from suite.secrets import MASK, names_a_secret
from suite.testbeds.door import Address, Door
from suite.testbeds.ranks import LocalRanks, Raised, Rank
from suite.testbeds.seats import Place, Seat
from suite.testbeds.testbed import Program, Testbed
from suite.testbeds.whereabouts import Sighting

JOIN_TIMEOUT_S = 120.0
ASK_TIMEOUT_S = 30.0
PREPARE_TIMEOUT_S = 900.0
"""Long enough to compile DeepSpeed's helper and to tokenize a large text, once per node."""

NETWORK = ("NCCL_", "FI_", "GLOO_", "TORCH_NCCL_", "UCX_", "OFI_")
"""Prefixes of the environment variables that are recorded with a result; no other one is."""

NOISE_NOTE = "what else used the machines was watched on the first node only"
_KEY = "suite/door"


def network_settings(variables: Mapping[str, str]) -> dict[str, str]:
    """Those variables that set the network's libraries up, by name; secrets masked."""
    chosen = sorted(name for name in variables if name.startswith(NETWORK))
    return {name: MASK if names_a_secret(name) else variables[name] for name in chosen}


class Seats:
    """The driver's end of all seats, in rank order."""

    def __init__(self, channels: list[Connection], ranks_per_node: int, door: Door) -> None:
        self._channels = channels
        self.ranks_per_node = ranks_per_node
        self.door = door
        self._teams = 0
        self.places: list[Place] = self.call("place", timeout_s=ASK_TIMEOUT_S)

    def __len__(self) -> int:
        return len(self._channels)

    @property
    def nodes(self) -> int:
        return len(self) // self.ranks_per_node

    def name_team(self) -> str:
        self._teams += 1
        return f"team-{self._teams}"

    def call(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        """That method of every seat, all at once. Raises RankError, naming the first seat that fails."""
        for channel in self._channels:
            with suppress(OSError):  # found when it does not answer
                channel.send((method, arguments))
        deadline = time.monotonic() + timeout_s
        answers: list[Any] = []
        failures: list[RankError] = []
        for number in range(len(self)):  # all are heard: no answer may be left for a later call
            try:
                answers.append(self._answer(number, method, deadline))
            except RankError as error:
                failures.append(error)
        if failures:
            raise failures[0]
        return answers

    def ask(self, number: int, method: str, *arguments: Any, timeout_s: float = ASK_TIMEOUT_S) -> Any:
        """That method of one seat. Raises RankError."""
        with suppress(OSError):
            self._channels[number].send((method, arguments))
        return self._answer(number, method, time.monotonic() + timeout_s)

    def _answer(self, number: int, method: str, deadline: float) -> Any:
        channel = self._channels[number]
        try:
            if not channel.poll(max(0.0, deadline - time.monotonic())):
                channel.close()  # a late answer must not be taken for that of a later call
                raise RankError(f"rank {number}: its node did not answer ({method})", number)
            answer = channel.recv()
        except (EOFError, OSError) as error:
            channel.close()
            raise RankError(f"rank {number}: its node was lost ({method})", number) from error
        if isinstance(answer, Raised):
            message = f"rank {number} failed in {method}: {answer.message}"
            raise RankError(message, number, answer.traceback, answer.message.partition(":")[0])
        return answer

    def addresses(self) -> list[str]:
        """Of each seat's node, as the other nodes see it. The driver's own node may know itself by a
        loopback address only; then the others tell."""
        elsewhere = [place for place in self.places if place.machine != self.places[0].machine]
        if not elsewhere:
            return [place.address for place in self.places]
        seen = elsewhere[0].driver
        return [seen if place.machine == self.places[0].machine else place.address for place in self.places]


@contextmanager
def join() -> Iterator[Seats | None]:
    """To be entered by every process that torchrun has started: the driver gets all seats, the others get
    None when the driver has finished. Raises RankError when seats stay empty."""
    store, rank, world = next(iter(rendezvous("env://", timeout=timedelta(seconds=JOIN_TIMEOUT_S))))
    ranks_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    host = os.environ["MASTER_ADDR"]  # torchrun's own name for the node of rank 0
    if rank != 0:
        found = json.loads(store.get(_KEY))
        Seat(rank, world, ranks_per_node, Address(host, **found)).serve()
        yield None
        return
    door = Door()
    seat = Seat(0, world, ranks_per_node, Address(host, door.port, door.token))
    process = multiprocessing.get_context("fork").Process(target=_sit, args=(seat, door), name="seat-0")
    process.start()
    store.set(_KEY, json.dumps({"port": door.port, "token": door.token}))
    channels = door.receive("seat", world, JOIN_TIMEOUT_S)
    try:
        missing = [number for number in range(world) if number not in channels]
        if missing:
            raise RankError(
                f"rank {missing[0]} cannot reach rank 0 at {host} (of {world} ranks {len(missing)} cannot)",
                missing[0],
            )
        yield Seats([channels[number] for number in range(world)], ranks_per_node, door)
    finally:
        for channel in channels.values():
            channel.close()
        door.close()
        process.join()


def _sit(seat: Seat, door: Door) -> None:
    door.close()
    seat.serve()


class RemoteProcess:
    """A rank's process on some node (`suite.testbeds.process.Process`): its seat is asked. What cannot be
    asked any more is said so instead of raised: it is needed while a failure is being told."""

    def __init__(self, seats: Seats, number: int, team: str, pid: int) -> None:
        self._seats = seats
        self._number = number
        self._team = team
        self.pid = pid

    def _ask(self, method: str, *arguments: Any) -> Any:
        return self._seats.ask(self._number, "of", self._team, method, *arguments)

    def _tell(self, method: str) -> str:
        try:
            return self._ask(method)
        except RankError as error:
            return f"({error})"

    def ended(self) -> str:
        try:
            return self._ask("ended")
        except RankError:
            return "was lost with its node"

    def join(self, timeout_s: float) -> None:
        with suppress(RankError):
            self._ask("join", timeout_s)

    def kill(self) -> None:
        """Nothing to do: `TorchrunRanks.kill` has told all seats at once."""

    def sighting(self) -> Sighting:
        try:
            return self._ask("sighting")
        except RankError:
            return Sighting(0, "", "")

    def ask_for_stack(self) -> None:
        with suppress(RankError):
            self._ask("ask_for_stack")

    def stack(self) -> str:
        return self._tell("stack")

    def output(self) -> str:
        return self._tell("output")

    def close(self) -> None:
        """Nothing to do, as in `kill`."""


class TorchrunRanks(LocalRanks):
    """Running ranks on several machines; `pids` are those on the driver's, which alone watches its
    processors."""

    def __init__(self, ranks: list[Rank], seats: Seats, team: str) -> None:
        super().__init__(ranks)
        self._seats = seats
        self._team = team

    def pids(self) -> list[int]:
        places = self._seats.places
        return [
            pid
            for pid, place in zip(super().pids(), places, strict=True)
            if place.machine == places[0].machine
        ]

    def _ask(self, ranks: Sequence[Rank], method: str) -> list[Any]:
        try:
            answers = self._seats.call("of", self._team, method, timeout_s=ASK_TIMEOUT_S)
        except RankError:  # a node was lost: each is asked alone, and says so
            return super()._ask(ranks, method)
        return [answers[rank.number] for rank in ranks]

    def kill(self) -> None:
        if self._ended:
            return
        with suppress(RankError):  # of a node that was lost; the others have been told all the same
            self._seats.call("discard", self._team, timeout_s=ASK_TIMEOUT_S)
        super().kill()


class TorchrunTestbed(Testbed):
    """One rank per seat; `environment` (NCCL_*, FI_*) is the cluster's, for the ranks, `nodes` what its
    nodes have in common, for the records."""

    evidence = "measured"

    def __init__(
        self, seats: Seats, environment: Mapping[str, str], nodes: Mapping[str, Any] | None = None
    ) -> None:
        self._seats = seats
        self._environment = dict(environment)
        self._nodes = dict(nodes or {})

    def everywhere(self, function: Callable[[], None]) -> None:
        function()
        self._seats.call("run", function, timeout_s=PREPARE_TIMEOUT_S)

    def conditions(self) -> dict[str, Any]:
        """The nodes, and the settings of the network's libraries that reached the ranks."""
        network = network_settings({**self._environment, **os.environ})
        return {"nodes": self._nodes, "network": network}

    def notes(self) -> list[str]:
        machines = {place.machine for place in self._seats.places}
        return [NOISE_NOTE] if len(machines) > 1 else []

    @contextmanager
    def launch(self, program: Program, startup_timeout_s: float) -> Iterator[TorchrunRanks]:
        """`program` must be picklable: it travels to the nodes."""
        seats, team = self._seats, self._seats.name_team()
        ranks = TorchrunRanks([], seats, team)
        try:
            ranks = TorchrunRanks(self._start(team, program), seats, team)
            ranks.answers("start-up", startup_timeout_s)
            yield ranks
        except BaseException:
            ranks.kill()
            raise
        ranks.end()

    def _start(self, team: str, program: Program) -> list[Rank]:
        seats = self._seats
        port = seats.call("open", timeout_s=ASK_TIMEOUT_S)[0]
        pids = seats.call(
            "fork", team, program, port, seats.addresses(), self._environment, timeout_s=ASK_TIMEOUT_S
        )
        channels = seats.door.receive(team, len(seats), ASK_TIMEOUT_S)
        for number in range(len(seats)):
            if number not in channels:
                raise RankError(f"rank {number} was started but did not call", number)
        return [
            Rank(number, RemoteProcess(seats, number, team, pid), channels[number])
            for number, pid in enumerate(pids)
        ]
