from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from suite.config import ModelConfig, WorkloadConfig
from suite.impls.trainer import Recipe
from suite.workloads import data, models
from suite.workloads.data import MaskedLMBatch
from suite.workloads.reference import ReferenceRun, run_reference

SHAPE = ModelConfig(layers=2, hidden=32, heads=4, intermediate=48, vocab=400, seq_len=16)
STREAM = data.open_stream(WorkloadConfig("test", SHAPE, "synthetic"), seed=0)
BATCHES = [STREAM.global_batch(step, 8) for step in range(3)]


def build() -> nn.Module:
    return models.build_model(SHAPE, seed=0)


def test_the_run_is_plain_adamw_with_the_gradients_of_step_1() -> None:
    run = run_reference(build, Recipe(lr=1e-2), BATCHES)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    losses, first = [], {}
    for batch in BATCHES:
        optimizer.zero_grad()
        loss = batch.loss(model)
        loss.backward()
        first = first or {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    assert run.losses == pytest.approx(losses, rel=1e-6)
    assert run.gradients.keys() == first.keys() == run.parameters.keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(run.gradients[name], first[name], msg=name)
        torch.testing.assert_close(run.parameters[name], parameter.detach(), msg=name)


def test_gradients_of_micro_batches_add_up_to_those_of_the_reference() -> None:
    run = run_reference(build, Recipe(), BATCHES[:1])
    model = build()
    for rank in range(2):
        for part in STREAM.micro_batches(0, rank, world_size=2, micro_batch=2, micro_steps=2):
            part.loss(model).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(run.gradients[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_the_same_run_repeats_exactly() -> None:
    first, again = (run_reference(build, Recipe(), BATCHES) for _ in range(2))
    assert first.losses == again.losses
    for name, parameter in first.parameters.items():
        assert torch.equal(parameter, again.parameters[name]), name


def test_the_gradient_norm_is_that_before_clipping_and_clipping_takes_effect() -> None:
    free = run_reference(build, Recipe(), BATCHES)
    clipped = run_reference(build, Recipe(clip=1e-6), BATCHES)
    norm = torch.stack([g.norm() for g in free.gradients.values()]).norm().item()
    assert free.grad_norms[0] == pytest.approx(norm, rel=1e-5)
    assert clipped.grad_norms[0] == pytest.approx(norm, rel=1e-5)
    for name, gradient in free.gradients.items():
        assert torch.equal(gradient, clipped.gradients[name]), name
    # AdamW divides by the gradient's own size, so only eps shows that the gradient was smaller.
    assert any(not torch.equal(p, clipped.parameters[name]) for name, p in free.parameters.items())


def test_bf16_keeps_fp32_masters_and_stays_near_the_fp32_run() -> None:
    full = run_reference(build, Recipe(), BATCHES)
    low = run_reference(build, Recipe(precision="bf16"), BATCHES)
    assert {t.dtype for t in (*low.gradients.values(), *low.parameters.values())} == {torch.float32}
    assert low.losses == pytest.approx(full.losses, rel=2e-3)
    assert low.losses != full.losses
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    error = (low.gradients[name] - full.gradients[name]).norm() / full.gradients[name].norm()
    assert 1e-4 < error < 5e-2


def test_bf16_rounds_only_the_copy_that_computes() -> None:
    run = run_reference(build, Recipe(lr=1e-6, precision="bf16"), BATCHES)
    for name, initial in build().named_parameters():
        moved = (run.parameters[name] - initial.detach()).abs().max().item()
        # AdamW moves by about lr per step; rounding a master of 0.05 once would move it by 1e-4.
        assert moved < 5e-6, name


def test_a_tied_parameter_appears_once_under_its_first_name() -> None:
    run = run_reference(build, Recipe(), BATCHES[:1])
    assert "bert.embeddings.word_embeddings.weight" in run.gradients
    assert not any("decoder" in name for name in run.gradients)


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = models.build_model(SHAPE, seed=0)
        self.unused = nn.Linear(2, 2)

    def forward(self, input_ids: torch.Tensor) -> object:
        return self.used(input_ids=input_ids)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_unused_parameter_has_a_zero_gradient(precision: str) -> None:
    run = run_reference(WithUnused, Recipe(precision=precision), BATCHES[:1])
    assert not run.gradients["unused.weight"].any()


def test_a_saved_run_loads_as_it_was(tmp_path: Path) -> None:
    run = run_reference(build, Recipe(), BATCHES)
    run.save(tmp_path / "reference.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["reference.safetensors"]
    loaded = ReferenceRun.load(tmp_path / "reference.safetensors")
    assert (loaded.losses, loaded.grad_norms) == (run.losses, run.grad_norms)
    for kind in ("gradients", "parameters"):
        assert getattr(loaded, kind).keys() == getattr(run, kind).keys()
        for name, tensor in getattr(run, kind).items():
            assert torch.equal(getattr(loaded, kind)[name], tensor), name


def test_a_run_without_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        run_reference(build, Recipe(), [])


def test_the_batches_are_what_the_protocol_asks_for() -> None:
    assert all(isinstance(batch, MaskedLMBatch) for batch in BATCHES)
