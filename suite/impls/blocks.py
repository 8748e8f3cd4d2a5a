"""Which modules of a model are its transformer blocks: the units that sharding methods gather."""

from __future__ import annotations

from torch import nn


def block_stack(model: nn.Module) -> nn.ModuleList:
    """The list that holds the model's transformer blocks, in the order in which they run; an empty
    one when the model is not a stack of any.

    It is the `ModuleList` with most parameters, which finds the encoder of every BERT-like model
    without knowing its class.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=_numel, default=nn.ModuleList())


def largest_block_numel(model: nn.Module) -> int:
    """Parameters of the largest transformer block; of the whole model when it has none."""
    return max((_numel(block) for block in block_stack(model)), default=_numel(model))


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
