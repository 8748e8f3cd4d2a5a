"""Ranks in processes that torchrun has started: the same harness, the same failures by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from suite.config import CONFIGS

ROOT = CONFIGS.parent
SMALL = ["workload.model.layers=1", "workload.model.hidden=64", "workload.data=synthetic"]


def torchrun(*words: str, folder: Path, nodes: int = 1, ranks_per_node: int = 2, timeout: float = 110) -> str:
    """Runs `nodes` torchruns as on as many machines; returns what was printed on stdout."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}"]
    command += [f"--nproc-per-node={ranks_per_node}", "--rdzv-backend=c10d", f"--rdzv-id={folder.name}"]
    command += [f"--rdzv-endpoint=127.0.0.1:{_free_port()}", "--local-addr=127.0.0.1", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NCCL_DEBUG": "WARN", "WANDB_API_KEY": "secret"}
    running = [
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(nodes)
    ]
    try:
        printed = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), printed[0][1][-3000:]
    return "".join(out for out, _ in printed)


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_the_same_command_runs_on_two_nodes_that_torchrun_has_started(tmp_path: Path) -> None:
    words = ["run", "impl=zero3", "testbed=torchrun", "train.steps=2", "train.warmup=1", "--json", *SMALL]
    record = json.loads(torchrun("-m", "suite.cli", *words, folder=tmp_path, nodes=2, ranks_per_node=1))
    assert (record["testbed"], record["evidence"]) == ("torchrun", "measured")
    assert (record["world_size"], record["nodes"], record["ranks_per_node"]) == (2, 2, 1)
    assert record["inter_node_bytes_per_node"] == record["bytes_sent_per_rank"] > 0
    assert record["env"]["network"]["NCCL_DEBUG"] == "WARN" and "secret" not in json.dumps(record)


FAILING = """
import os, signal, sys, time
import torch.distributed as dist
from suite.errors import RankError
from suite.testbeds.testbed import RankContext
from suite.testbeds.torchrun import TorchrunTestbed, join

class Program:
    def __init__(self, context: RankContext) -> None:
        self._context = context
    def rank(self) -> int:
        return self._context.rank
    def raise_on(self, rank: int) -> None:
        if self._context.rank == rank:
            raise ValueError("planted failure")
        self._context.barrier()
    def die_on(self, rank: int) -> None:
        if self._context.rank == rank:
            print("last words")
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self._context.barrier()
    def hang_on(self, rank: int) -> None:
        if self._context.rank == rank:
            time.sleep(60)
        self._context.barrier()

if __name__ == "__main__":
    import failing
    with join() as seats:
        if seats is not None:
            testbed = TorchrunTestbed(seats, {})
            for method, rank in (("raise_on", 1), ("die_on", 2), ("hang_on", 3)):
                try:
                    with testbed.launch(failing.Program, 30) as ranks:
                        assert ranks.call("rank", timeout_s=30) == [0, 1, 2, 3]
                        ranks.call(method, rank, timeout_s=5)
                except RankError as error:
                    print(f"{error.rank}|{error}|{error.details!r}")
"""


def test_a_failure_on_any_node_is_named_and_the_next_ranks_start_afresh(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    lines = torchrun("failing.py", folder=tmp_path, nodes=2).strip().splitlines()
    raised, died, hung = (line.split("|") for line in lines)
    assert raised[0] == "1" and "rank 1 failed in raise_on: ValueError: planted failure" in raised[1]
    assert "raise ValueError" in raised[2]
    assert died[0] == "2" and "rank 2 was ended by SIGKILL in die_on" in died[1] and "last words" in died[2]
    assert hung[0] == "3" and "rank 3 made no progress for 5 s in hang_on" in hung[1]
    assert "in hang_on" in hung[2]


@pytest.mark.parametrize("words", [["impl=ddp", "testbed=torchrun"]])
def test_without_torchrun_the_error_says_what_to_write(words: list[str], capsys) -> None:
    from suite.cli import main

    assert main(["run", *words, *SMALL]) == 2
    assert "torchrun --nproc-per-node=" in capsys.readouterr().err
