"""Names, options and packages are refused in one clear line, before anything starts."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from suite.config_load import load
from suite.errors import UsageError
from suite.harness.worker import model_builder, recipe_of
from suite.impls import registry
from suite.impls.trainer import Topology
from suite.testbeds.local import LocalTestbed
from suite.testbeds.testbed import RankContext


def parse(name: str, world_size: int = 8, ranks_per_node: int = 4, **options: Any) -> Any:
    return registry.parse_options(name, options, world_size, ranks_per_node)


def require(name: str) -> None:
    try:
        registry.require(name)
    except UsageError as error:
        pytest.skip(str(error))


def pretend_packages(monkeypatch: pytest.MonkeyPatch, **found: ModuleSpec | None) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found[name] if name in found else real(name, *rest)
    )


def test_every_entry_is_found_by_its_own_name_and_says_what_it_is() -> None:
    assert {"floor", "ddp", "deepspeed-mics", "fairscale-fsdp"} <= set(registry.IMPLEMENTATIONS)
    for name in registry.IMPLEMENTATIONS:
        item = registry.find(name)
        assert item.name == name and item.summary and item.limits_on_cpu.endswith(".")


def test_importing_the_registry_imports_no_optional_package() -> None:
    optional = "{'deepspeed', 'fairscale', 'transformers'}"
    code = f"import sys, suite.impls.registry; print({optional} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fspd2", {}, "unknown implementation 'fspd2'; did you mean 'fsdp2'?"),
        (
            "hsdp",
            {"partition_sice": 2},
            "option of hsdp 'partition_sice'; did you mean 'partition_size'?",
        ),
        ("ddp", {"partition_size": 2}, "ddp has no options"),
        ("hsdp", {"partition_size": "two"}, "bad value for impl.options.partition_size"),
        (
            "hsdp",
            {"partition_size": 3},
            "size=3 does not divide the 8 ranks; use one of 1, 2, 4, 8",
        ),
        ("hsdp", {"partition_size": 0}, "partition_size=0 does not divide"),
        ("hsdp", {"partition_size": 16}, "partition_size=16 does not divide"),
        ("deepspeed-mics", {"partition_size": 4, "hierarchical": True}, "several nodes"),
        ("deepspeed-mics", {"partition_size": 2, "hierarchical": True}, "several nodes"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    if name in registry.IMPLEMENTATIONS:
        require(name)
    with pytest.raises(UsageError) as refused:
        parse(name, **options)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_partition_group_is_a_node_where_there_are_several_and_otherwise_half_of_the_world() -> None:
    assert parse("hsdp", 8, 4).partition_size == 4
    assert parse("hsdp", 8, 8).partition_size == 4
    assert parse("hsdp", 1, 1).partition_size == 1
    assert parse("hsdp", 8, 4, partition_size=2).partition_size == 2


def test_hierarchical_gathering_over_whole_nodes_is_accepted() -> None:
    require("deepspeed-mics")
    assert parse("deepspeed-mics", 8, 2, partition_size=4, hierarchical=True).hierarchical


def test_options_are_typed_whatever_the_command_line_made_of_them() -> None:
    assert parse("hsdp", partition_size="2").partition_size == 2


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_packages(monkeypatch, fairscale=None)
    with pytest.raises(UsageError) as refused:
        parse("fairscale-sdp")
    assert (
        str(refused.value)
        == "impl=fairscale-sdp needs fairscale; pip install 'sharded-training-suite[baselines]'"
    )
    registry.require("ddp")


def test_a_deepspeed_without_mics_costs_deepspeed_mics_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = ModuleSpec("deepspeed", None, origin=str(tmp_path / "deepspeed" / "__init__.py"))
    pretend_packages(monkeypatch, deepspeed=package)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.19.8")
    with pytest.raises(UsageError) as refused:
        registry.require("deepspeed-mics")
    assert str(refused.value) == (
        "DeepSpeed 0.19.8 has no MiCS (removed after 0.19.6); install deepspeed==0.19.6"
    )
    registry.require("deepspeed-zero3")


class DtypeProbe:
    """A micro-batch that notes in which dtype the model computed."""

    def __init__(self, vocab: int) -> None:
        self.input_ids = torch.randint(0, vocab, (1, 16))
        self.dtype: torch.dtype | None = None

    def loss(self, model: nn.Module) -> Tensor:
        logits = model(input_ids=self.input_ids).logits
        self.dtype = logits.dtype
        return logits.float().square().mean()


class Probing:
    """One rank's program: a single training step with `DtypeProbe`."""

    def __init__(self, context: RankContext, impl: str, precision: str) -> None:
        model = ("layers=1", "hidden=32", "intermediate=32", "vocab=300", "seq_len=16")
        words = [f"workload.model.{word}" for word in model]
        config = load([f"impl={impl}", f"train.precision={precision}", *words])
        topology = Topology(context.rank, context.world_size, context.ranks_per_node, context.device)
        self._probe = DtypeProbe(300)
        self._trainer = registry.build(impl, model_builder(config), recipe_of(config.train), topology)

    def dtype_of_logits(self) -> torch.dtype | None:
        self._trainer.train_step([self._probe])
        return self._probe.dtype


@pytest.mark.parametrize("impl", registry.IMPLEMENTATIONS)
def test_bf16_computes_in_bf16_everywhere(impl: str) -> None:
    """A framework that quietly stays in fp32 passes every comparison with the reference."""
    require(impl)
    registry.preload(impl)
    with LocalTestbed(2, 2).launch(lambda context: Probing(context, impl, "bf16"), 100) as ranks:
        assert ranks.call("dtype_of_logits", timeout_s=100) == [torch.bfloat16] * 2
