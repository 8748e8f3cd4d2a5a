"""Models as users bring them: Hugging Face's of every kind, experts, adapters, unusual outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from engine_scenarios import WIDTH, Block, Loss, Stack, one_forward, with_evaluation
from torch import Tensor, nn

VOCAB = 29
LENGTH = 6


def tokens_of(batch: Tensor) -> Tensor:
    """[4, LENGTH] token ids that depend on the batch."""
    return (batch.repeat(1, 2)[:, :LENGTH].abs() * 1000).long() % VOCAB


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=1, eos_token_id=2))


def gpt2_checkpointed(reentrant: bool) -> nn.Module:
    model: Any = gpt2()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return T5ForConditionalGeneration(T5Config(**sizes, **ends, dropout_rate=0.0))


def t5_checkpointed(reentrant: bool) -> nn.Module:
    model: Any = t5()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def llama() -> nn.Module:
    """Rotary position buffers, grouped keys, an output layer of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def mixtral() -> nn.Module:
    """Experts, and a loss on what the routers inside the blocks have put out."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, **experts))


def clip_text() -> nn.Module:
    """Its embeddings own a buffer alone, and set the weights of the modules inside them."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    return CLIPTextModel(CLIPTextConfig(**sizes, **ends, intermediate_size=24, max_position_embeddings=32))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=3)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return ViTForImageClassification(config)


def language_loss(model: nn.Module, batch: Tensor) -> Tensor:
    tokens = tokens_of(batch)
    return model(input_ids=tokens, labels=tokens).loss


def any_length_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Another number of sequences, of another length, on every rank and in every micro-step."""
    tokens = tokens_of(batch)
    rows, length = 1 + int(tokens.sum()) % 4, 2 + int(tokens.max()) % (LENGTH - 1)
    tokens = tokens[:rows, :length]
    return model(input_ids=tokens, labels=tokens).loss * rows


def image_loss(model: nn.Module, batch: Tensor) -> Tensor:
    images = batch.repeat(1, 13)[:, :64].view(4, 1, 8, 8)
    return model(pixel_values=images, labels=torch.tensor([0, 1, 2, 0])).loss


def summary_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Encoder and decoder see different texts."""
    tokens = tokens_of(batch)
    return model(input_ids=tokens, labels=tokens.flip(1)[:, :4].contiguous()).loss


def embeddings_loss(model: Any, batch: Tensor) -> Tensor:
    """Embeddings are looked up outside of the model's own forward."""
    tokens = tokens_of(batch)
    return model(inputs_embeds=model.get_input_embeddings()(tokens), labels=tokens).loss


class Experts(nn.Module):
    """A batch visits both of two experts, or only one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor, chosen: set[int]) -> Tensor:
        return x + sum(torch.tanh(self.experts[number](x)) for number in sorted(chosen))


class MixtureOfExperts(Stack):
    """Whether all of a block is used differs from rank to rank, block to block and step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Experts() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        choice = int(x.abs().sum() * 1000)
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            x = block(x, {choice >> 2 * number & 1, choice >> 2 * number + 1 & 1})
        return self.last(x)


@dataclass
class BlockOutput:
    hidden: Tensor
    norms: dict[str, list[Tensor]]


class UnusualBlock(Block):
    """Returns a dataclass of containers; also hands its input through."""

    def forward(self, x: Any) -> Any:
        hidden = x.hidden if isinstance(x, BlockOutput) else x
        y = super().forward(hidden)
        return BlockOutput(y, {"norms": [y.norm(), hidden]})


class UnusualOutputs(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(UnusualBlock() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        output, extra = self.first(x), torch.zeros(())
        for block in self.blocks:
            output = block(output)
            extra = extra + output.norms["norms"][0] + 0.1 * output.norms["norms"][1].sum()
        return self.last(output.hidden) + 0.01 * extra


class Adapter(nn.Module):
    """A frozen layer with a trainable addition of low rank."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, 2, bias=False)
        self.up = nn.Linear(2, frozen.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


class LowRankAdapted(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        for block in self.blocks:
            block.inner, block.outer = Adapter(block.inner), Adapter(block.outer)


class UsesOthersWeights(Stack):
    """The root multiplies with blocks' weights, before and after they run, and in a list."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + torch.tanh(x @ self.blocks[1].inner.weight.t()) @ self.blocks[1].outer.weight.t()
        x = self.body(x)
        x = x + nn.functional.linear(x, self.blocks[2].norm.weight * torch.eye(WIDTH))
        return self.last(x * torch.cat([self.blocks[0].norm.weight, self.blocks[0].norm.bias])[:WIDTH])


class ListsInAList(Stack):
    """Blocks that are lists of their two halves, and never called themselves."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__(0)
        halves = (nn.ModuleList([nn.Linear(WIDTH, WIDTH), Block()]) for _ in range(blocks))
        self.blocks = nn.ModuleList(halves)

    def body(self, x: Tensor) -> Tensor:
        for mix, block in self.blocks:
            x = block(x + torch.tanh(mix(x)))
        return x


class UsesOthersStatistics(Stack):
    """The root takes two results at once from a block's weight, and backward needs the weight for both."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.blocks[1].inner.weight, dim=0)
        return self.last(self.body(self.first(x) * (1 + variance) + mean))


class Positions(Stack):
    """Adds a buffer before the blocks, and before what the root owns after them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.linspace(0, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.first(x) + self.positions)
        return self.last(x + self.positions)


class SameBlockTwice(Stack):
    """One block at two places of the list."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.blocks[0], self.blocks[1], self.blocks[0]])


class OnlyBlocks(nn.Module):
    """The model itself owns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(5, WIDTH), Block(), nn.Linear(WIDTH, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class SparseGradients(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(VOCAB, WIDTH, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(tokens_of(x))))


class WatchedTeacher(Stack):
    """Its own blocks, without gradients, in the middle of a training forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with torch.no_grad():
            target = self.body(x)
        return self.last(self.body(x) - 0.5 * target)


Kind = Callable[[], nn.Module]
MODELS: dict[str, tuple[Kind, Loss]] = {
    "gpt2": (gpt2, language_loss),
    "gpt2, checkpointed": (partial(gpt2_checkpointed, False), language_loss),
    "gpt2, checkpointed, reentrant": (partial(gpt2_checkpointed, True), language_loss),
    "gpt2, any length": (gpt2, any_length_loss),
    "gpt2, own embeddings": (gpt2, embeddings_loss),
    "t5": (t5, summary_loss),
    "t5, checkpointed": (partial(t5_checkpointed, False), summary_loss),
    "t5, checkpointed, reentrant": (partial(t5_checkpointed, True), summary_loss),
    "llama": (llama, language_loss),
    "mixtral": (mixtral, language_loss),
    "vit": (vit, image_loss),
    "mixture of experts": (MixtureOfExperts, one_forward),
    "unusual outputs": (UnusualOutputs, one_forward),
    "low-rank adapters": (LowRankAdapted, one_forward),
    "others' weights": (UsesOthersWeights, one_forward),
    "others' weights, evaluated": (UsesOthersWeights, with_evaluation),
    "others' statistics": (UsesOthersStatistics, one_forward),
    "lists in a list": (ListsInAList, one_forward),
    "same block twice": (SameBlockTwice, one_forward),
    "only blocks": (OnlyBlocks, one_forward),
    "sparse gradients": (SparseGradients, one_forward),
    "teacher": (WatchedTeacher, one_forward),
}
