from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from suite import config, config_load
from suite.config import ModelConfig
from suite.errors import UsageError
from suite.workloads import models

PUBLISHED_BILLIONS = {
    "bert-10b": 10.08,
    "bert-15b": 15.0,
    "bert-20b": 20.3,
    "bert-50b": 50.3,
    "bert-100b": 101.1,
    "bert-175b": 174.5,
    "roberta-10b": 10.1,
    "roberta-15b": 15.1,
    "roberta-20b": 20.4,
    "roberta-50b": 52.0,
    "roberta-100b": 101.3,
    "roberta-175b": 174.8,
}

SHAPES = [
    ModelConfig(family=family, layers=2, hidden=32, heads=4, intermediate=48, vocab=300, seq_len=16)
    for family in models.FAMILIES
]


def preset(name: str) -> ModelConfig:
    return config_load.load([f"workload={name}"]).workload.model


def test_every_promised_preset_is_there_and_names_itself() -> None:
    small = {f"{family}-{size}" for family in models.FAMILIES for size in ("tiny", "small")}
    assert small | set(PUBLISHED_BILLIONS) <= set(config.presets("workloads"))
    for name in config.presets("workloads"):
        assert config_load.load([f"workload={name}"]).workload.name == name


@pytest.mark.parametrize("name", sorted(PUBLISHED_BILLIONS))
def test_a_large_preset_has_its_published_size_on_the_meta_device(name: str) -> None:
    model = preset(name)
    built = sum(p.numel() for p in models.meta_model(model).parameters())
    assert models.n_params(model) == built
    assert built / 1e9 == pytest.approx(PUBLISHED_BILLIONS[name], abs=0.06)
    assert model.seq_len == (2048 if "175b" in name else 512)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.family)
def test_the_counted_parameters_are_those_of_the_built_model(shape: ModelConfig) -> None:
    built = models.build_model(shape, seed=0)
    assert models.n_params(shape) == sum(p.numel() for p in built.parameters())
    assert {p.device.type for p in models.meta_model(shape).parameters()} == {"meta"}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.family)
def test_embedding_and_decoder_are_one_parameter(shape: ModelConfig) -> None:
    built = models.build_model(shape, seed=0)
    assert built.get_input_embeddings().weight is built.get_output_embeddings().weight  # type: ignore[operator]


def test_equal_seeds_build_equal_weights_and_others_do_not() -> None:
    first, again, other = (models.build_model(SHAPES[0], seed) for seed in (3, 3, 4))
    for (name, a), b in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_building_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    models.build_model(SHAPES[0], seed=1)
    assert torch.equal(torch.rand(4), expected)


def test_inside_the_meta_device_a_model_takes_no_memory() -> None:
    with torch.device("meta"):
        inside = models.build_model(SHAPES[0], seed=1)
    assert all(parameter.is_meta for parameter in inside.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.family)
def test_a_forward_pass_repeats_exactly_in_training_mode(shape: ModelConfig, checkpointing: bool) -> None:
    built = models.build_model(shape, seed=0, activation_checkpointing=checkpointing)
    tokens = torch.randint(4, shape.vocab, (2, shape.seq_len))
    assert built.training
    assert torch.equal(built(input_ids=tokens).logits, built(input_ids=tokens).logits)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.family)
def test_every_position_of_a_full_sequence_has_an_embedding_of_its_own(shape: ModelConfig) -> None:
    built = models.build_model(shape, seed=0)
    table = built.get_submodule(f"{shape.family}.embeddings.position_embeddings")
    assert isinstance(table, nn.Embedding)
    tokens = torch.randint(4, shape.vocab, (1, shape.seq_len))
    built(input_ids=tokens).logits.sum().backward()
    assert table.weight.grad is not None
    used = table.weight.grad.abs().sum(dim=1) > 0
    assert used.sum() == shape.seq_len
    assert used[-1]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.family)
def test_checkpointing_recomputes_the_blocks_and_changes_no_gradient(shape: ModelConfig) -> None:
    tokens = torch.randint(4, shape.vocab, (2, shape.seq_len))
    gradients, calls = [], []
    for checkpointing in (False, True):
        built = models.build_model(shape, seed=0, activation_checkpointing=checkpointing)
        block = built.get_submodule(f"{shape.family}.encoder.layer.0.intermediate")
        count: list[int] = []
        block.register_forward_hook(lambda *_, count=count: count.append(1))
        built(input_ids=tokens).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in built.named_parameters()})
        calls.append(len(count))
    assert calls == [1, 2]
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


@pytest.mark.parametrize("use", [models.n_params, models.meta_model])
def test_an_unknown_family_is_refused_with_the_closest_one(use: Callable[[ModelConfig], object]) -> None:
    with pytest.raises(UsageError, match="did you mean 'roberta'"):
        use(ModelConfig(family="robert"))
