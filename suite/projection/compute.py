"""How long one GPU computes: matrix products by their shape, everything else by the bytes it touches."""

from __future__ import annotations

from dataclasses import dataclass

from suite.config import ModelConfig
from suite.projection.assumptions import Assumptions
from suite.projection.hardware import Hardware

HALF = 2
"""Bytes of a bf16 or fp16 number."""
ELEMENT_BYTES = {"bf16": HALF, "fp16": HALF, "fp32": 2 * HALF}
"""Of a weight, an activation, and a gradient on its way, by `train.precision`."""


@dataclass(frozen=True)
class Kernels:
    """How the kernels compute: bytes of an element, and how often a forward's attention scores go
    through memory outside matrix products (0: attention is fused, and they never get there)."""

    element_bytes: int = HALF
    score_passes: float = 0.0

    @property
    def fused(self) -> bool:
        return self.score_passes == 0


@dataclass(frozen=True)
class Pass:
    """Seconds of a unit's forward and backward; the backward without any recomputation."""

    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class Costs:
    """One micro-step of one rank: any of the equal blocks, and what the root does around them."""

    block: Pass
    embedding: Pass
    head: Pass


def kernels_of(precision: str, hardware: Hardware, given: Assumptions, fused: bool | None = None) -> Kernels:
    """`fused` None: attention as it was in the software of that GPU's time."""
    passes = given.value("score_passes", hardware.gpu) if fused is None else given.value("score_passes")
    return Kernels(ELEMENT_BYTES[precision], 0.0 if fused else passes)


def compute_costs(
    model: ModelConfig, micro_batch: int, hardware: Hardware, kernels: Kernels, given: Assumptions
) -> Costs:
    """A roofline: products at the rate their shape allows, the rest at memory speed.

    `hidden_passes` and `score_passes` count how often kernels read or write a tensor of the size of
    the hidden states, or of the attention scores, in a forward; a backward has twice of everything.
    """
    tokens, size = micro_batch * model.seq_len, kernels.element_bytes
    hidden_bytes = size * tokens * model.hidden
    score_bytes = size * tokens * model.seq_len * model.heads
    attention = (
        _fused_attention(model, micro_batch, hardware, given)
        if kernels.fused
        else _attention(model, micro_batch, hardware, size)
    )
    products = (
        4 * _product(tokens, model.hidden, model.hidden, hardware, size)
        + 2 * _product(tokens, model.intermediate, model.hidden, hardware, size)
        + attention
    )
    wide = model.intermediate / model.hidden
    touched = (given.value("hidden_passes") + given.value("wide_passes") * wide) * hidden_bytes
    touched += kernels.score_passes * score_bytes
    block = products + touched / hardware.memory_bytes_s
    logits = tokens * model.vocab
    head = _product(tokens, model.hidden, model.hidden, hardware, size)
    head += _product(tokens, model.vocab, model.hidden, hardware, size)
    head += given.value("logit_passes") * 4 * logits / hardware.memory_bytes_s
    embedding = 8 * hidden_bytes / hardware.memory_bytes_s
    return Costs(*(Pass(forward, 2 * forward) for forward in (block, embedding, head)))


def optimizer_s(parameters: float, hardware: Hardware, given: Assumptions) -> float:
    """AdamW, norm and cast of this many parameters: nothing but memory traffic."""
    return parameters * given.value("optimizer_bytes") / hardware.memory_bytes_s


def _product(m: float, n: float, k: float, hardware: Hardware, size: int) -> float:
    """Seconds of an (m x k) by (k x n) product: a dimension of few tiles leaves the GPU partly idle."""
    filled = 1.0 / (1.0 + hardware.tile * (1 / m + 1 / n + 1 / k))
    return max(
        2.0 * m * n * k / (hardware.flops_s * filled),
        size * (m * k + k * n + m * n) / hardware.memory_bytes_s,
    )


def _attention(model: ModelConfig, micro_batch: int, hardware: Hardware, size: int) -> float:
    """Scores and their product with the values: many small products, batched over samples and heads."""
    batch = micro_batch * model.heads
    seq, width = model.seq_len, model.hidden / model.heads
    touched = 2 * size * batch * (seq * seq + 2 * seq * width)
    return max(_attention_flops(model, micro_batch) / hardware.flops_s, touched / hardware.memory_bytes_s)


def _fused_attention(model: ModelConfig, micro_batch: int, hardware: Hardware, given: Assumptions) -> float:
    """One kernel that keeps the scores on the chip, and computes at its own share of the products' rate."""
    rate = hardware.flops_s * given.value("fused_attention")
    return _attention_flops(model, micro_batch) / rate


def _attention_flops(model: ModelConfig, micro_batch: int) -> float:
    return 2 * 2.0 * micro_batch * model.seq_len**2 * model.hidden
