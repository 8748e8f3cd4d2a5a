"""The emulated cluster: links as slow as asked for, and nothing left behind, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from suite.config import Config
from suite.config_load import load
from suite.errors import RankError, UsageError
from suite.harness.check import check
from suite.harness.measure import measure
from suite.harness.timeline import Timeline
from suite.records import Record
from suite.testbeds import network
from suite.testbeds.emulated import EmulatedTestbed
from suite.testbeds.network import build_network, why_not
from suite.testbeds.ranks import LocalRanks
from suite.testbeds.testbed import RankContext

pytestmark = pytest.mark.skipif(
    why_not() is not None, reason=f"this host cannot build emulated networks: {why_not()}"
)

MBIT_S = 200
SMALL = [
    "testbed=emulated",
    "cluster=p3dn",
    "workload=bert-scale",
    "workload.model.layers=2",
    "testbed.nodes=2",
    "testbed.ranks_per_node=2",
    "testbed.dilation=4",
    "train.steps=3",
    "train.warmup=1",
]


AT_LEAST = 0.5
"""Of the link's rate: a busy machine may keep a transfer from filling it, nothing may exceed it."""


class Program:
    """Times messages between two ranks, and says where a rank is."""

    def __init__(self, context: RankContext) -> None:
        self._context = context

    def namespaces(self) -> tuple[str, str]:
        return os.readlink("/proc/self/ns/net"), os.readlink("/proc/self/ns/user")

    def transfer(self, mebibytes: float, source: int, target: int) -> float:
        """Seconds, on the receiving rank."""
        message = torch.zeros(int(mebibytes * 2**18))
        self._context.barrier()
        start = time.perf_counter()
        if self._context.rank == source:
            dist.send(message, target)
        elif self._context.rank == target:
            dist.recv(message, source)
        return time.perf_counter() - start

    def exchange(self, mebibytes: float) -> float:
        """Seconds in which every rank of node 0 has sent to, and received from, one of node 1."""
        half = self._context.world_size // 2
        peer = (self._context.rank + half) % self._context.world_size
        message, answer = torch.zeros(int(mebibytes * 2**18)), torch.empty(int(mebibytes * 2**18))
        self._context.barrier()
        start = time.perf_counter()
        works = [dist.irecv(answer, peer), dist.isend(message, peer)]
        for work in works:
            assert work is not None
            work.wait()
        return time.perf_counter() - start

    def fail(self) -> None:
        raise ValueError("planted failure")


@pytest.fixture(scope="module")
def ranks() -> Iterator[LocalRanks]:
    with EmulatedTestbed(2, 2, MBIT_S * 1e6).launch(Program, 60) as running:
        yield running


def mbit_s(mebibytes: float, seconds: float) -> float:
    return mebibytes * 2**20 * 8 / seconds / 1e6


def test_a_big_transfer_between_nodes_gets_the_bandwidth_of_the_link(ranks: LocalRanks) -> None:
    for source, target in ((0, 2), (3, 1)):
        seconds = ranks.call("transfer", 16, source, target, timeout_s=30)[target]
        assert AT_LEAST * MBIT_S < mbit_s(16, seconds) < 1.03 * MBIT_S


def test_the_ranks_of_a_node_share_its_link_which_carries_both_directions_at_once(ranks: LocalRanks) -> None:
    seconds = max(ranks.call("exchange", 8, timeout_s=30))
    assert AT_LEAST * MBIT_S < mbit_s(2 * 8, seconds) < 1.04 * MBIT_S


def test_inside_a_node_messages_do_not_use_the_link(ranks: LocalRanks) -> None:
    seconds = ranks.call("transfer", 16, 0, 1, timeout_s=30)[1]
    assert mbit_s(16, seconds) > 5 * MBIT_S


def test_ranks_live_in_their_nodes_and_this_process_stays_where_it_was(ranks: LocalRanks) -> None:
    ours = os.readlink("/proc/self/ns/net")
    nets = [net for net, _ in ranks.call("namespaces", timeout_s=30)]
    assert nets[0] == nets[1] != nets[2] == nets[3]
    assert ours not in nets and os.readlink("/proc/self/ns/net") == ours


def holders(namespaces: set[str]) -> list[str]:
    """Processes that are in one of these namespaces or hold a descriptor of one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [process / "ns/net", *(process / "fd").iterdir()]
            if any(os.readlink(link) in namespaces for link in links):
                found.append(process.name)
        except OSError:
            continue
    return found


def nobody_holds(namespaces: set[str]) -> bool:
    """The kernel removes a namespace that nobody holds; ended processes let go of theirs a moment
    after the signal was sent."""
    deadline = time.monotonic() + 10
    while holders(namespaces) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not holders(namespaces)


def namespaces_of(running: LocalRanks) -> set[str]:
    return {net for net, _ in running.call("namespaces", timeout_s=30)}


def test_no_namespace_outlives_a_run() -> None:
    with EmulatedTestbed(2, 1, 1e8).launch(Program, 60) as running:
        namespaces = namespaces_of(running)
        assert len(holders(namespaces)) == 3  # both ranks and this process
    assert nobody_holds(namespaces)


def test_no_namespace_outlives_a_run_that_failed() -> None:
    with pytest.raises(RankError, match="planted failure"):
        with EmulatedTestbed(2, 1, 1e8).launch(Program, 60) as running:
            namespaces = namespaces_of(running)
            running.call("fail", timeout_s=30)
    assert nobody_holds(namespaces)


def test_no_namespace_outlives_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from suite.testbeds.emulated import EmulatedTestbed\n"
        "class Program:\n"
        "    def __init__(self, context): pass\n"
        "    def here(self): return os.readlink('/proc/self/ns/net')\n"
        "with EmulatedTestbed(3, 1, 1e8).launch(Program, 60) as ranks:\n"
        "    print(*ranks.call('here', timeout_s=30), flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    namespaces = set(parent.stdout.readline().split())
    assert len(namespaces) == 3 and len(holders(namespaces)) == 4
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert nobody_holds(namespaces)


UNPRIVILEGED = """
import ctypes, multiprocessing.popen_fork, os, torch, torch.distributed as dist
from suite.testbeds.emulated import EmulatedTestbed
from suite.testbeds.forked import stay_forkable
stay_forkable()
# What is imported on demand has to be in memory before the files become unreadable.
dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
dist.destroy_process_group()
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable, like a program that was started by that user
class Program:
    def __init__(self, context): self.rank = context.rank
    def sum(self):
        value = torch.tensor(self.rank + 1)
        dist.all_reduce(value)
        open('/proc/self/clear_refs', 'w').write('5')
        return value.item(), os.readlink('/proc/self/ns/net'), os.readlink('/proc/self/ns/user')
with EmulatedTestbed(2, 1, 1e8).launch(Program, 60) as ranks:
    (one, net_one, user_one), (two, net_two, user_two) = ranks.call('sum', timeout_s=30)
assert one == two == 3 and net_one != net_two
assert user_one == user_two != os.readlink('/proc/self/ns/user')
print('works')
"""


def test_it_works_without_privileges_in_a_user_namespace_of_its_own(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-Ur", "true"], capture_output=True).returncode != 0:
        pytest.skip("this host does not let users create user namespaces")
    script = tmp_path / "unprivileged.py"
    script.write_text(UNPRIVILEGED)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, cwd="/tmp"
    )
    assert done.stdout == "works\n", done.stderr


def test_a_host_that_cannot_says_why_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "INTERFACE", "a name that is too long for an interface")
    with pytest.raises(UsageError, match=r"cannot build its network here: .*name") as caught:
        build_network(2, 1e8)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="needs the command 'ip'; install iproute2"):
        build_network(2, 1e8)


def configs(*names: str) -> list[Config]:
    return [load([*SMALL, f"impl={name}"]) for name in names]


def test_a_record_is_undilated_and_says_what_was_emulated() -> None:
    kept: list[tuple[Record, Timeline]] = []
    floor, zero3 = measure(configs("floor", "zero3"), keep=lambda *item: kept.append(item))
    assert isinstance(floor, Record) and isinstance(zero3, Record)
    assert [record for record, _ in kept] == [floor, zero3]
    for record, timeline in kept:  # of the last timed step, on a clock that its ranks share
        ends = [span.end_s for spans in timeline.spans for span in spans]
        assert len(timeline.spans) == record.world_size
        assert 0.5 < max(ends) / record.step_times_s[-1] < 1.1
    for record in (floor, zero3):
        assert record.evidence == "emulated" and record.details["dilation"] == 4
        assert record.noise["busy_limit"] == 0.6
        paced_s = record.details["paced_host_s"] / 4
        assert paced_s == pytest.approx(2 * 3 * record.details["block_forward_s"])
        assert record.step_time_s.min > paced_s
        assert record.exposed_comm_s is not None
        assert 0 <= record.exposed_comm_s < record.step_time_s.max - paced_s
        # Half of the V100's peak is what the blocks alone would reach.
        assert record.model_tflops_per_gpu == pytest.approx(62.5 * paced_s / record.step_time_s.median)
    assert zero3.exposed_comm_s is not None and floor.exposed_comm_s is not None
    assert zero3.exposed_comm_s > floor.exposed_comm_s
    link_bytes_s = zero3.details["emulated_link_mbit_per_s"] * 4 * 1e6 / 8
    assert zero3.inter_node_bytes_per_node is not None
    assert zero3.step_time_s.min > 0.97 * zero3.inter_node_bytes_per_node / link_bytes_s


def test_what_is_sent_beside_the_blocks_is_counted_by_the_link_itself() -> None:
    """Only an implementation that gathers ahead sends while its blocks compute."""
    ahead, blocking = measure(
        [
            load([*SMALL, "impl=zero3"]),
            load([*SMALL, "impl=zero3", "impl.options.fine_grained_sync=false"]),
        ]
    )
    assert isinstance(ahead, Record) and isinstance(blocking, Record)
    shares = [record.details["sent_while_computing_share"] for record in (ahead, blocking)]
    assert 0 <= shares[1] < shares[0] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "hsdp", "fairscale-sdp", "fairscale-fsdp", "zero3"])
def test_paced_blocks_on_a_slow_network_train_like_the_reference(name: str) -> None:
    found = check(
        load([*SMALL, f"impl={name}", "train.micro_steps=2", "train.activation_checkpointing=true"])
    )
    assert found.ok, found
