"""Floating-point operations of one forward and backward pass, counted from the model's shape.

Only matrix multiplications are counted (a multiply-add is two operations): normalisation, softmax,
activation functions, embedding look-ups and the optimizer are memory traffic rather than arithmetic.
A backward pass costs twice its forward: one product for the input's gradient, one for the weight's.
Kernels may do more, such as the attention scores that a fused backward computes again; that is
their own affair and is not credited to the hardware count either.
"""

from __future__ import annotations

from suite.config import ModelConfig


def model_flops(model: ModelConfig, samples: int) -> float:
    """What the mathematics needs for `samples` sequences of `seq_len` tokens, forward and backward."""
    return 3.0 * samples * (model.layers * block_forward_flops(model) + head_forward_flops(model))


def hardware_flops(model: ModelConfig, samples: int, activation_checkpointing: bool) -> float:
    """What is executed: `model_flops`, and with checkpointing every block's forward once more."""
    recomputed = model.layers * block_forward_flops(model) if activation_checkpointing else 0.0
    return model_flops(model, samples) + samples * recomputed


def block_forward_flops(model: ModelConfig) -> float:
    """Forward of one transformer block over one sequence."""
    projections = 4 * model.hidden**2
    attention = 2 * model.seq_len * model.hidden
    feed_forward = 2 * model.hidden * model.intermediate
    return 2.0 * model.seq_len * (projections + attention + feed_forward)


def head_forward_flops(model: ModelConfig) -> float:
    """Forward of the language-model head over one sequence; it predicts every token, masked or not."""
    return 2.0 * model.seq_len * (model.hidden**2 + model.hidden * model.vocab)
