"""How much memory the activations of a micro-batch take, found by tracing the model without computing."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from suite.config import ModelConfig
from suite.workloads.models import build_model


def activation_bytes(
    model: ModelConfig, micro_batch: int, dtype: torch.dtype, activation_checkpointing: bool
) -> int:
    """What autograd keeps from the forward of one micro-batch until its backward, per rank.

    Traced on fake tensors (which take the kernels of the CPU: fused attention) at one and two layers;
    all blocks are alike. With activation checkpointing it is the blocks' inputs, and one block
    recomputed.
    """
    one, two = (_saved(replace(model, layers=layers), micro_batch, dtype) for layers in (1, 2))
    block, rest = two - one, 2 * one - two
    if not activation_checkpointing:
        return rest + model.layers * block
    block_input = micro_batch * model.seq_len * model.hidden * dtype.itemsize
    return rest + block + model.layers * block_input


def _saved(model: ModelConfig, micro_batch: int, dtype: torch.dtype) -> int:
    """Bytes of the distinct storages that a forward saves for backward, weights not counted."""
    with FakeTensorMode():
        built = build_model(model, seed=0, activation_checkpointing=False)
        for parameter in built.parameters():  # `.to` cannot swap fake parameters
            parameter.data = parameter.data.to(dtype)
        tokens = torch.zeros(micro_batch, model.seq_len, dtype=torch.int64)
        weights = {parameter.untyped_storage()._cdata for parameter in built.parameters()}
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = built(input_ids=tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    del loss
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)
