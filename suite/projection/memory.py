"""What a rank has to hold, and whether it fits: model states, activations, buffers, what is lost."""

from __future__ import annotations

from dataclasses import dataclass

from suite.config import ModelConfig
from suite.projection.assumptions import Assumptions
from suite.projection.compute import HALF, Kernels
from suite.projection.hardware import GIB, Hardware
from suite.projection.layout import Layout

FP32 = 4
ADAM = 2 * FP32
"""Bytes of AdamW's two moments."""


@dataclass(frozen=True)
class States:
    """How many ranks share each kind of model state, and bytes per element of it.

    `buffers` are bytes that the method sets aside: buckets, what is gathered at a time.
    `half`: weights are computed with in half precision, beside fp32 masters with the optimizer.
    """

    weights: int
    gradients: int
    optimizer: int
    gradient_bytes: int
    buffers: float
    half: bool = True

    def nbytes(self, parameters: int) -> float:
        """Weights, gradients, both moments and in half precision fp32 masters; without the buffers."""
        weights = HALF / self.weights + FP32 / self.optimizer if self.half else FP32 / self.weights
        per_element = weights + self.gradient_bytes / self.gradients + ADAM / self.optimizer
        return parameters * per_element


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank; `margin` is what fragmentation, the driver and the libraries take."""

    states: float
    activations: float
    buffers: float
    margin: float
    limit: float

    @property
    def total(self) -> float:
        return self.states + self.activations + self.buffers + self.margin

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


def memory_of(
    model: ModelConfig,
    layout: Layout,
    states: States,
    micro_batch: int,
    checkpointing: bool,
    kernels: Kernels,
    hardware: Hardware,
    given: Assumptions,
) -> Memory:
    """The most that a step needs at a time."""
    held = states.nbytes(layout.total)
    activations = activation_bytes(model, micro_batch, checkpointing, kernels)
    lost = given.value("fragmentation") * (activations + states.buffers)
    fixed = given.value("runtime_gib") * GIB
    return Memory(held, activations, states.buffers, lost + fixed, hardware.memory_bytes)


def activation_bytes(model: ModelConfig, micro_batch: int, checkpointing: bool, kernels: Kernels) -> float:
    """Of a transformer trained in half precision: 34 bytes per hidden element of a block and, unless
    attention is fused, 5 per attention score (Korthikanti et al., 2022), twice of both in fp32; with
    checkpointing only the blocks' inputs, and one block at work. The head's logits and their gradient
    are there in fp32."""
    tokens, size = micro_batch * model.seq_len, kernels.element_bytes
    scores = 0.0 if kernels.fused else 5.0 * tokens * model.seq_len * model.heads
    block = size / HALF * (34.0 * tokens * model.hidden + scores)
    logits = ((HALF if size == HALF else 0) + 2 * FP32) * tokens * model.vocab
    if not checkpointing:
        return model.layers * block + logits
    return model.layers * size * tokens * model.hidden + max(block, logits)
