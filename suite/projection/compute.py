"""How long one GPU computes: matrix products by their shape, everything else by the bytes it touches."""

from __future__ import annotations

from dataclasses import dataclass

from suite.config import ModelConfig
from suite.projection.assumptions import Assumptions
from suite.projection.hardware import Hardware

HALF = 2
"""Bytes of a bf16 or fp16 number."""


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


def compute_costs(model: ModelConfig, micro_batch: int, hardware: Hardware, given: Assumptions) -> Costs:
    """A roofline: products at the rate their shape allows, the rest at memory speed.

    `hidden_passes` and `score_passes` count how often kernels read or write a tensor of the size of
    the hidden states, or of the attention scores, in a forward; a backward has twice of everything.
    """
    tokens = micro_batch * model.seq_len
    hidden_bytes = HALF * tokens * model.hidden
    score_bytes = HALF * tokens * model.seq_len * model.heads
    products = (
        4 * _product(tokens, model.hidden, model.hidden, hardware)
        + 2 * _product(tokens, model.intermediate, model.hidden, hardware)
        + _attention(model, micro_batch, hardware)
    )
    wide = model.intermediate / model.hidden
    touched = (given.value("hidden_passes") + given.value("wide_passes") * wide) * hidden_bytes + given.value(
        "score_passes"
    ) * score_bytes
    block = products + touched / hardware.memory_bytes_s
    logits = tokens * model.vocab
    head = _product(tokens, model.hidden, model.hidden, hardware)
    head += _product(tokens, model.vocab, model.hidden, hardware)
    head += given.value("logit_passes") * 4 * logits / hardware.memory_bytes_s
    embedding = 8 * hidden_bytes / hardware.memory_bytes_s
    return Costs(*(Pass(forward, 2 * forward) for forward in (block, embedding, head)))


def optimizer_s(parameters: float, hardware: Hardware, given: Assumptions) -> float:
    """AdamW, norm and cast of this many parameters: nothing but memory traffic."""
    return parameters * given.value("optimizer_bytes") / hardware.memory_bytes_s


def _product(m: float, n: float, k: float, hardware: Hardware) -> float:
    """Seconds of an (m x k) by (k x n) product: a dimension of few tiles leaves the GPU partly idle."""
    filled = 1.0 / (1.0 + hardware.tile * (1 / m + 1 / n + 1 / k))
    return max(
        2.0 * m * n * k / (hardware.flops_s * filled),
        HALF * (m * k + k * n + m * n) / hardware.memory_bytes_s,
    )


def _attention(model: ModelConfig, micro_batch: int, hardware: Hardware) -> float:
    """Scores and their product with the values: many small products, batched over samples and heads."""
    batch = micro_batch * model.heads
    seq, width = model.seq_len, model.hidden / model.heads
    flops = 2 * 2.0 * batch * seq * seq * width
    touched = 2 * HALF * batch * (seq * seq + 2 * seq * width)
    return max(flops / hardware.flops_s, touched / hardware.memory_bytes_s)
