"""Which modules of a model are its transformer blocks: the units that sharding methods gather."""

from __future__ import annotations

from torch import nn


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks in the order in which they run; empty when the model is not a stack of any.

    They are the children of the `ModuleList` that holds most parameters, which finds the encoder
    of every BERT-like model without knowing its class.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(stacks, key=_numel)) if stacks else []


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
