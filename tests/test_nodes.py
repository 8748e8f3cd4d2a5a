"""Nodes of a cluster: alike or refused, their clocks compared, a slow link found."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_torchrun_testbed import torchrun

from suite.errors import UsageError
from suite.harness import cluster_doctor
from suite.harness.nodes import Node, describe_node, differences, require_equal

NODE = Node("a", 512 * 2**30, {"version of torch": "2.13.0", "accelerators": "8 x H100"})


def other(name: str, **facts: str) -> Node:
    return replace(NODE, name=name, facts={**NODE.facts, **facts})


def test_equal_nodes_are_let_pass_although_their_memory_is_never_quite_equal() -> None:
    require_equal([NODE, replace(other("b"), memory_bytes=int(0.98 * NODE.memory_bytes))])


def test_a_node_that_differs_is_named_with_both_values_and_refused() -> None:
    nodes = [NODE, other("b"), other("c", **{"version of torch": "2.12.1", "accelerators": "7 x H100"})]
    with pytest.raises(UsageError) as caught:
        require_equal(nodes)
    message = str(caught.value)
    assert "version of torch: node 2 (c) has 2.12.1, most nodes have 2.13.0" in message
    assert "1 more" in message and "nothing is measured" in message
    assert len(differences(nodes)) == 2


def test_half_the_memory_is_a_difference() -> None:
    assert differences([NODE, replace(NODE, memory_bytes=NODE.memory_bytes // 2)]) == [
        "memory: between 256 and 512 GiB"
    ]


def test_a_description_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("FI_ACCESS_KEY", "do-not-tell")
    monkeypatch.setenv("WANDB_API_KEY", "do-not-tell")
    facts = describe_node().facts
    assert "NCCL_DEBUG=WARN" in facts["network settings"] and "do-not-tell" not in str(facts)


class SeatsWithClock:
    """Only what `clock_of` asks."""

    def __init__(self, ahead_s: float) -> None:
        self._ahead_s = ahead_s

    def ask(self, number: int, method: str, *arguments: Any) -> float:
        time.sleep(0.001)
        return time.time() + self._ahead_s


@pytest.mark.parametrize(("ahead_s", "ok"), [(0.0, True), (3.0, False), (-3.0, False)])
def test_clocks_that_disagree_are_found(ahead_s: float, ok: bool) -> None:
    clock = cluster_doctor.clock_of(SeatsWithClock(ahead_s), 1)  # type: ignore[arg-type]
    assert abs(clock.ahead_s - ahead_s) <= clock.uncertain_s + 0.002
    finding = cluster_doctor._clocks([NODE, other("b")], [cluster_doctor.Clock(0.0, 0.0), clock])
    assert finding.ok is ok and ("node 1 (b)" in finding.detail or ok)


def test_a_slow_pair_of_nodes_is_named() -> None:
    nodes = [NODE, other("b"), other("c"), other("d")]
    assert cluster_doctor._links(nodes, [1.0, 1.1, 0.9, 1.2], 2**26).ok
    slow = cluster_doctor._links(nodes, [1.0, 1.0, 4.0, 1.0], 2**26)
    assert not slow.ok and "c and d" in slow.remedy


@pytest.mark.slow
def test_the_doctor_measures_every_pair_of_nodes(tmp_path: Path) -> None:
    printed = torchrun("-m", "suite.cli", "doctor", "--cluster", folder=tmp_path, nodes=3, ranks_per_node=1)
    for what in ("3 nodes", "links between nodes", "slowest pair", "clocks"):
        assert what in printed


UNEQUAL = """
import os
from suite.cli import main
if os.environ["RANK"] == "1":
    os.environ["NCCL_ALGO"] = "Tree"
raise SystemExit(0 if main() == (2 if os.environ["RANK"] == "0" else 0) else 1)
"""


def test_nothing_is_measured_on_nodes_that_differ(tmp_path: Path) -> None:
    (tmp_path / "unequal.py").write_text(UNEQUAL)
    words = ["run", "impl=ddp", "testbed=torchrun", "--json", f"out={tmp_path}/out"]
    assert torchrun("unequal.py", *words, folder=tmp_path, nodes=2, ranks_per_node=1) == ""
    assert not (tmp_path / "out").exists()
