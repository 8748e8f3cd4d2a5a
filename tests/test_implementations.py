"""Every registered implementation against the single-process reference, and that the check can fail."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch

from suite.config import Config
from suite.config_load import load
from suite.errors import UsageError
from suite.harness.check import References, check, check_all
from suite.impls import registry
from suite.records import CheckRecord

METHODS = [name for name in registry.IMPLEMENTATIONS if name != "floor"]
MODEL = [f"workload.model.{key}" for key in ("layers=2", "hidden=64", "intermediate=128", "vocab=512")]


def configuration(impl: str, *words: str) -> Config:
    """A small model on real text; tied embeddings, unequal numbers of masked tokens."""
    return load([f"impl={impl}", *MODEL, "workload.model.seq_len=32", "testbed.ranks_per_node=2", *words])


def require(impl: str) -> None:
    try:
        registry.require(impl)
    except UsageError as error:
        pytest.skip(str(error))


def assert_ok(config: Config) -> None:
    require(config.impl.name)
    result = check(config)
    assert result.ok, {key: (getattr(result, key), limit) for key, limit in result.tolerance.items()}


@pytest.mark.parametrize("impl", METHODS)
def test_fp32_training_is_the_reference_s(impl: str) -> None:
    """With everything on at once: accumulation, clipping, activation checkpointing, two nodes."""
    words = ["testbed.ranks=4", "train.micro_steps=4", "train.micro_batch=1", "train.clip=0.5"]
    assert_ok(configuration(impl, *words, "train.activation_checkpointing=true"))


@pytest.mark.parametrize("impl", METHODS)
def test_bf16_training_errs_no_more_than_bf16_itself(impl: str) -> None:
    assert_ok(configuration(impl, "testbed.ranks=2", "train.precision=bf16"))


@pytest.fixture(scope="module")
def references() -> Iterator[References]:
    with References() as shared:
        yield shared


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("impl", METHODS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_combination_is_the_reference_s(references: References, impl: str, ranks: int) -> None:
    require(impl)
    configs = [
        configuration(
            impl,
            f"testbed.ranks={ranks}",
            f"testbed.ranks_per_node={1 if ranks == 3 else min(ranks, 2)}",
            f"train.precision={precision}",
            f"train.micro_steps={micro_steps}",
            f"train.clip={clip}",
            f"train.activation_checkpointing={checkpointing}",
        )
        for precision, micro_steps, clip, checkpointing in product(
            ["fp32", "bf16"], [1, 4], ["null", "0.5"], ["false", "true"]
        )
    ]
    wrong = [describe(found) for found in check_all(configs, references) if not found.ok]
    assert not wrong, f"{len(wrong)} of {len(configs)}: {wrong}"


def describe(found: CheckRecord) -> str:
    """What is beyond its limit, in which configuration."""
    excess = [
        f"{key} {value:.2e} > {limit:.2e}"
        for key, limit in found.tolerance.items()
        if not (value := getattr(found, key)) <= limit
    ]
    return f"{found.config['impl']} {found.config['train']}: {', '.join(excess)}"


def test_roberta_is_checked_like_bert() -> None:
    assert_ok(configuration("ddp", "workload=roberta-tiny", "testbed.ranks=2"))


def test_replicas_that_start_from_different_weights_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal gradients and plausible losses, and yet every rank trains a model of its own."""
    entry = registry.find("ddp")

    def from_different_weights(build_model, recipe, topology, options):  # type: ignore[no-untyped-def]
        trainer = entry.trainer(build_model, recipe, topology, options)
        with torch.no_grad():  # after DDP's own broadcast
            for parameter in trainer._parameters.values():
                parameter.add_(1e-3 * topology.rank)
        return trainer

    changed = type(entry)("ddp", from_different_weights, entry.summary, entry.limits_on_cpu)
    monkeypatch.setitem(registry.IMPLEMENTATIONS, "ddp", changed)
    result = check(configuration("ddp", "testbed.ranks=2"))
    assert not result.ok
    assert result.max_replica_diff > 5e-4
    assert result.max_replica_diff > result.tolerance["max_replica_diff"]


def test_gradients_that_are_not_synchronised_are_caught() -> None:
    result = check(configuration("floor", "testbed.ranks=2"))
    assert not result.ok and result.max_rel_grad_diff > 0.1


def test_a_single_lost_micro_step_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry.find("ddp")

    def loses_the_second_micro_step(build_model, recipe, topology, options):  # type: ignore[no-untyped-def]
        trainer = entry.trainer(build_model, recipe, topology, options)
        step = trainer.train_step
        monkeypatch.setattr(trainer, "train_step", lambda batches: step([*batches[:1], *batches[2:]]))
        return trainer

    changed = type(entry)("ddp", loses_the_second_micro_step, entry.summary, entry.limits_on_cpu)
    monkeypatch.setitem(registry.IMPLEMENTATIONS, "ddp", changed)
    result = check(configuration("ddp", "testbed.ranks=2", "train.micro_steps=4"))
    assert not result.ok and result.max_rel_grad_diff > 1e-2
