"""The smallest partition that fits: the arithmetic, the trace behind it, and a run that uses it."""

from __future__ import annotations

import pytest
import torch

from suite.config import ModelConfig
from suite.config_load import load
from suite.errors import UsageError
from suite.impls.sharded.memory import GIB, ModelSize, model_size, plan_memory, smallest_partition
from suite.workloads.activations import activation_bytes
from suite.workloads.models import build_model, n_params

TEN_BILLION = ModelSize((82_000_000, *[78_700_000] * 127))


def plans(limit_gb: float, parts: int = 1):  # type: ignore[no-untyped-def]
    sizes = [1, 2, 4, 8, 16, 32, 64]
    return [
        plan_memory(TEN_BILLION, size, parts, torch.bfloat16, 16 * 2**20, 2 * GIB, limit_gb * GIB)
        for size in sizes
    ]


def test_model_states_are_what_mixed_precision_adamw_holds() -> None:
    """fp32 master, gradient and two moments, bf16 copy: 18 bytes an element."""
    plan = plans(40)[3]
    assert plan.states == pytest.approx(18 * TEN_BILLION.numel / 8)


def test_the_smallest_group_that_fits_is_taken() -> None:
    small, large = smallest_partition(plans(40)), smallest_partition(plans(16))
    assert small.fits and large.fits
    assert not plans(40)[[1, 2, 4, 8, 16, 32, 64].index(small.partition_size) - 1].fits
    assert large.partition_size > small.partition_size


def test_dividing_the_optimizer_among_replicas_makes_room() -> None:
    assert plans(40, parts=8)[3].states < 0.6 * plans(40)[3].states


def test_a_model_that_fits_nowhere_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(UsageError, match=r"partition_size=64: .* does not fit into"):
        smallest_partition(plans(1))


def test_units_hold_every_parameter_once() -> None:
    shape = ModelConfig(layers=3, hidden=32, heads=4, intermediate=64, vocab=97, seq_len=16)
    with torch.device("meta"):
        assert model_size(build_model(shape, 0)).numel == n_params(shape)


def test_the_traced_activations_are_what_a_real_forward_saves() -> None:
    shape = ModelConfig(layers=5, hidden=32, heads=4, intermediate=64, vocab=97, seq_len=16)
    model = build_model(shape, 0)
    kept: dict[int, int] = {}
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.zeros(3, 16, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    assert loss.requires_grad
    traced = activation_bytes(shape, 3, torch.float32, activation_checkpointing=False)
    assert traced == pytest.approx(sum(kept.values()), rel=0.05)
    assert activation_bytes(shape, 3, torch.float32, activation_checkpointing=True) < 0.5 * traced


def test_auto_is_chosen_and_noted_in_a_run() -> None:
    from suite.harness.measure import measure
    from suite.records import Record

    words = ["impl=mics", "impl.options.partition_size=auto", "impl.options.device_memory_gb=0.023"]
    config = load([*words, "testbed.ranks=4", "testbed.ranks_per_node=2", "train.steps=1", "train.warmup=1"])
    (record,) = measure([config])
    assert isinstance(record, Record)
    assert record.partition_size == 2
    assert record.notes[0].startswith("partition_size=2: ")
