"""The engine with Hugging Face models, models on the meta device, fp16, and its memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engine_scenarios import Checkpointed, CheckpointedReentrant, Frozen, Stack, Tied, batch_of, one_forward
from torch import Tensor, nn
from user_models import clip_text, gpt2, llama, t5

from suite.config import ModelConfig
from suite.errors import UsageError
from suite.impls.sharded import Engine, shard
from suite.impls.sharded.export import save_pretrained
from suite.impls.sharded.options import EngineOptions
from suite.impls.sharded.schedule import Op
from suite.testbeds.local import LocalTestbed
from suite.testbeds.ranks import LocalRanks
from suite.testbeds.testbed import RankContext
from suite.workloads.models import PAD_TOKEN_ID, build_model

SMALL = ModelConfig(layers=3, hidden=32, heads=4, intermediate=64, vocab=97, seq_len=16)
TOKENS = torch.arange(2 * 16).view(2, 16) % 97


class Wrapped(nn.Module):
    """A Hugging Face model inside of one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = gpt2()
        self.head = nn.Linear(16, 3)


META: dict[str, tuple[Callable[[], nn.Module], list[str] | None]] = {
    "t5": (t5, None),
    "gpt2": (gpt2, None),
    "gpt2, units inside what initialises them": (gpt2, ["transformer.h.0.attn.c_proj"]),
    "gpt2, wrapped": (Wrapped, None),
    "clip": (clip_text, None),
    "tied": (Tied, None),
}
"""How to build it, and the names of the units that are not the default ones."""


def alike(ours: Tensor, theirs: Tensor) -> bool:
    """Whether mean and spread are the same as far as so few samples tell."""
    spreads, few = [values.std(correction=0) for values in (ours, theirs)], theirs.numel() ** -0.5
    same_mean = (ours.mean() - theirs.mean()).abs() <= 6 * few * max(spreads) + 1e-7
    same_spread = max(spreads) - min(spreads) <= (0.1 + 3 * few) * max(spreads) + 1e-7
    return bool(same_mean and same_spread)


class Watched(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest tensor that is made outside the meta device, in elements."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, Tensor) and not result.is_meta:
            self.largest = max(self.largest, result.numel())
        return result


class Program:
    def __init__(self, context: RankContext) -> None:
        self._rank, self._size = context.rank, context.world_size

    def train_and_export(self, folder: Path) -> dict[str, Tensor]:
        model = build_model(SMALL, seed=0)
        engine = shard(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        self._hugging_face_step(engine)
        save_pretrained(engine, folder)
        return dict(engine.full_parameters())

    def _hugging_face_step(self, engine: Engine) -> float:
        loss = engine.model(input_ids=TOKENS, labels=TOKENS).loss / self._size
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    def meta_hugging_face(self) -> tuple[list[float], dict[str, Tensor], int]:
        """Losses of a model that was built on meta, its first parameters, and the largest tensor made."""
        with torch.device("meta"):
            model = build_model(SMALL, seed=0)
        torch.manual_seed(3 + self._rank)  # ranks that would draw different weights
        with Watched() as watched:
            engine = shard(model, torch.optim.AdamW(model.parameters(), lr=1e-2), device=torch.device("cpu"))
        parameters = dict(engine.full_parameters())
        return [self._hugging_face_step(engine) for _ in range(3)], parameters, watched.largest

    def meta_statistics(self, kind: str, partition_size: int) -> tuple[list[str], dict[str, Tensor]]:
        """Of a model that was built on meta: parameters that are not distributed as in one that was
        not, and all of its parameters."""
        build, parts = META[kind]
        with torch.device("meta"):
            model = build()
        torch.manual_seed(3 + self._rank)
        engine = shard(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            partition_size=partition_size,
            unit_modules=parts and [model.get_submodule(name) for name in parts],
            device=torch.device("cpu"),
        )
        ours = dict(engine.full_parameters())
        torch.manual_seed(0)
        theirs = build().named_parameters()
        return [name for name, values in theirs if not alike(ours[name], values.detach())], ours

    def meta_tags(self) -> bool:
        """Whether what a model has noted at a parameter is still there."""
        with torch.device("meta"):
            model = Stack()
        model.first.weight.no_decay = True
        shard(model, torch.optim.SGD(model.parameters(), lr=0.1), device=torch.device("cpu"))
        return getattr(model.first.weight, "no_decay", False)

    def meta_buffers(self, kind: str) -> bool:
        """Whether buffers come out as in a model that was never on meta."""
        bert = partial(build_model, SMALL, seed=0)
        build = {"bert": bert, "llama": llama, "t5": t5, "clip": clip_text}[kind]
        with torch.device("meta"):
            model = build()
        shard(model, torch.optim.SGD(model.parameters(), lr=0.1), device=torch.device("cpu"))
        expected = dict(build().named_buffers())
        return all(torch.equal(buffer, expected[name]) for name, buffer in model.named_buffers())

    def meta_buffer_without_initialisation(self) -> str:
        class Masked(nn.Linear):
            def __init__(self) -> None:
                super().__init__(3, 3)
                self.register_buffer("mask", torch.ones(3))

        with torch.device("meta"):
            model = Masked()
        try:
            shard(model, torch.optim.SGD(model.parameters(), lr=1.0), device=torch.device("cpu"))
        except UsageError as error:
            return str(error)
        return "nothing was raised"

    def meta_without_initialisation(self, kind: str) -> str:
        class Bare(Stack):
            def __init__(self) -> None:
                super().__init__()
                self.lonely = nn.Parameter(torch.zeros(3))

        class Forgetful(nn.Linear):  # its reset_parameters is that of a Linear
            def __init__(self) -> None:
                super().__init__(3, 3)
                self.lonely = nn.Parameter(torch.zeros(3))

        with torch.device("meta"):
            model = {"no reset_parameters": Bare, "one that forgets it": Forgetful}[kind]()
        try:
            shard(model, torch.optim.SGD(model.parameters(), lr=1.0), device=torch.device("cpu"))
        except UsageError as error:
            return str(error)
        return "nothing was raised"

    def fp16(self, overflow_on: int) -> list[tuple[bool, float, bool]]:
        """(skipped, loss scale after it, parameters changed) per step; in step 1 one rank overflows."""
        torch.manual_seed(0)
        model = Stack()
        engine = shard(model, torch.optim.AdamW(model.parameters(), lr=1e-2), precision="fp16")
        found = []
        for step in range(3):
            before = dict(engine.full_parameters())
            loss = one_forward(model, batch_of(self._rank, step, 0).half())
            factor = 1e6 if step == 1 and self._rank == overflow_on else 1e-3
            engine.backward(loss.float() * factor)
            engine.step()
            after = dict(engine.full_parameters())
            changed = any(not torch.equal(before[name], after[name]) for name in before)
            assert engine.loss_scale is not None
            found.append((engine.skipped, engine.loss_scale.value, changed))
        return found

    def losses(self) -> list[float]:
        """Of 50 steps with everything that could be in another order the next time."""
        torch.manual_seed(0)
        model = build_model(SMALL, seed=0)
        engine = shard(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-2),
            clip=0.1,
            partition_size=2,
            ranks_per_node=1,
        )
        found = []
        for step in range(50):
            tokens = (TOKENS + step + self._rank) % 97
            loss = engine.model(input_ids=tokens, labels=tokens).loss
            engine.backward(loss / self._size)
            engine.step()
            found.append(loss.item())
        parameters = torch.cat([value.flatten() for _, value in engine.full_parameters()])
        everyone = [torch.empty_like(parameters) for _ in range(self._size)]
        dist.all_gather(everyone, parameters)
        assert all(torch.equal(one, other) for one, other in itertools.pairwise(everyone))
        return found

    def peak_gathered(self, blocks: int, prefetch: int) -> tuple[int, int, int]:
        """(peak, bytes of one block, bytes of the root unit), `prefetch` blocks ahead at most."""
        torch.manual_seed(0)
        model = Stack(blocks)
        sizes = [sum(p.numel() for p in module.parameters()) * 4 for module in (model, model.blocks[0])]
        options = EngineOptions(prefetch_mb=prefetch * 1.3 * sizes[1] / 2**20, coalesce_mb=0)
        engine = shard(model, torch.optim.SGD(model.parameters(), lr=0.1), options=options)
        for step in range(3):
            engine.backward(one_forward(model, batch_of(self._rank, step, 0)))
            engine.step()
        block = engine.units[1].nbytes
        return engine.statistics.peak_gathered_bytes, block, engine.units[0].nbytes

    def gathers_in_time(self, reentrant: bool) -> list[str]:
        """Blocks that are gathered only when they are needed, by what is to be done in a micro-step."""
        torch.manual_seed(0)
        model = CheckpointedReentrant() if reentrant else Checkpointed()
        engine = shard(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for step in range(2):
            engine.backward(one_forward(model, batch_of(self._rank, step, 0)))
            engine.step()
        schedule = engine.scheduler.schedule
        assert schedule is not None
        blocks = [event for event in schedule.events if event.phase.needs_weights and event.unit]
        assert [event.unit for event in blocks] == [1, 2, 3, 3, 2, 1]
        return [
            f"{event.phase.value} of {event.unit}"
            for event, actions in zip(schedule.events, schedule.actions, strict=True)
            if event.unit and any(act.op is Op.GATHER and event.unit in act.units for act in actions)
        ]

    def frozen_is_released(self) -> bool:
        """Whether a frozen block's weights are gone while the backward of earlier blocks still runs."""
        torch.manual_seed(0)
        model = Frozen()
        for parameter in model.first.parameters():
            parameter.requires_grad_(True)
        engine = shard(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
        frozen = next(unit for unit in engine.units if unit.module is model.blocks[1])
        seen = []
        model.blocks[0].norm.register_full_backward_hook(
            lambda *_: seen.append(any(bucket.allocated for bucket in frozen.buckets))
        )
        for step in range(2):
            engine.backward(one_forward(model, batch_of(self._rank, step, 0)))
            engine.step()
        return seen == [False, False]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[LocalRanks]:
    with LocalTestbed(request.param, request.param).launch(Program, 60) as running:
        yield running


def test_the_exported_model_is_loaded_by_from_pretrained(ranks: LocalRanks, tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    trained = ranks.call("train_and_export", tmp_path, timeout_s=60)[0]
    assert len(list(tmp_path.glob("*.safetensors"))) == SMALL.layers + 1, "one file per unit"
    loaded, report = BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert loaded.config.hidden_size == SMALL.hidden
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trained[name]), name


def test_a_model_on_meta_is_initialised_shard_by_shard_alike_on_all_ranks(ranks: LocalRanks) -> None:
    answers = ranks.call("meta_hugging_face", timeout_s=60)
    total = sum(value.numel() for value in answers[0][1].values())
    for losses, parameters, largest in answers:
        assert losses == answers[0][0] and losses[-1] < losses[0]
        assert all(torch.equal(value, answers[0][1][name]) for name, value in parameters.items())
        assert largest < 0.6 * total, "a rank held most of the model at once"
    norms = [value for name, value in answers[0][1].items() if name.endswith("LayerNorm.weight")]
    assert norms and all(torch.equal(value, torch.ones_like(value)) for value in norms)
    embedding = answers[0][1]["bert.embeddings.position_embeddings.weight"]
    assert 0.015 < embedding.std().item() < 0.025, "not the model's own initialisation"
    tokens = answers[0][1]["bert.embeddings.word_embeddings.weight"]
    assert not tokens[PAD_TOKEN_ID].any(), "set again by the output layer that is tied to it"


@pytest.mark.parametrize("partition_size", [1, 2])
@pytest.mark.parametrize("kind", META)
def test_weights_on_meta_are_distributed_as_if_they_had_not_been_there(
    ranks: LocalRanks, kind: str, partition_size: int
) -> None:
    answers = ranks.call("meta_statistics", kind, partition_size, timeout_s=60)
    for different, parameters in answers:
        assert different == []
        assert all(torch.equal(value, answers[0][1][name]) for name, value in parameters.items())


def test_what_a_model_notes_at_its_parameters_outlives_meta(ranks: LocalRanks) -> None:
    assert all(ranks.call("meta_tags", timeout_s=60))


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "clip"])
def test_buffers_on_meta_come_out_as_if_they_had_not_been_there(ranks: LocalRanks, kind: str) -> None:
    assert all(ranks.call("meta_buffers", kind, timeout_s=60))


def test_a_meta_buffer_that_nothing_fills_is_named(ranks: LocalRanks) -> None:
    answer = ranks.call("meta_buffer_without_initialisation", timeout_s=60)[0]
    assert "buffer mask of Masked is on the meta device" in answer


@pytest.mark.parametrize("kind", ["no reset_parameters", "one that forgets it"])
def test_a_meta_parameter_that_nothing_initialises_is_named(ranks: LocalRanks, kind: str) -> None:
    answer = ranks.call("meta_without_initialisation", kind, timeout_s=60)[0]
    assert "parameter lonely is on the meta device" in answer


def test_an_fp16_overflow_on_one_rank_skips_the_step_on_all(ranks: LocalRanks) -> None:
    for answer in ranks.call("fp16", len(ranks.pids()) - 1, timeout_s=60):
        assert answer == [(False, 2.0**16, True), (True, 2.0**15, False), (False, 2.0**15, True)]


def test_two_identical_runs_have_bitwise_the_same_losses(ranks: LocalRanks) -> None:
    assert ranks.call("losses", timeout_s=60) == ranks.call("losses", timeout_s=60)


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_no_more_is_gathered_than_the_units_in_flight(ranks: LocalRanks, prefetch: int) -> None:
    peak, block, root = ranks.call("peak_gathered", 8, prefetch, timeout_s=60)[0]
    # The root, the block that is computed, those ahead, and a neighbour that is released after.
    assert peak <= root + (1 + max(prefetch, 1)) * block


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_are_gathered_ahead(ranks: LocalRanks, reentrant: bool) -> None:
    assert ranks.call("gathers_in_time", reentrant, timeout_s=60)[0] == []


def test_a_frozen_unit_is_released_before_the_end_of_backward(ranks: LocalRanks) -> None:
    assert all(ranks.call("frozen_is_released", timeout_s=60))
