"""Which modules of a model are its transformer blocks: the units that sharding methods gather."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from suite.impls.trace import Trace


def block_stack(model: nn.Module) -> nn.ModuleList:
    """The list that holds the model's transformer blocks, in the order in which they run; an empty
    one when the model is not a stack of any.

    It is the `ModuleList` with most parameters, which finds the encoder of every BERT-like model
    without knowing its class.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=_numel, default=nn.ModuleList())


def announce_blocks(model: nn.Module, trace: Trace) -> None:
    """From now on `trace` is told whenever a block's forward, recomputation or backward begins, whatever an
    implementation then makes of the model."""
    names = {module: name for name, module in model.named_modules()}
    for block in block_stack(model):
        _announce(block, names[block], trace)


def _announce(block: nn.Module, name: str, trace: Trace) -> None:
    forward, again, backward = f"forward of {name}", f"recomputation of {name}", f"backward of {name}"

    def before(module: nn.Module, arguments: Any) -> None:
        # Inside a running backward pass a forward is a recomputation.
        trace.at(forward if torch._C._current_graph_task_id() == -1 else again)

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        for tensor in _differentiable(output):
            tensor.register_hook(lambda gradient: trace.at(backward))

    block.register_forward_pre_hook(before)
    block.register_forward_hook(after)


def _differentiable(output: Any) -> Iterator[Tensor]:
    for value in output if isinstance(output, tuple) else (output,):
        if isinstance(value, Tensor) and value.requires_grad:
            yield value


def largest_block_numel(model: nn.Module) -> int:
    """Parameters of the largest transformer block; of the whole model when it has none."""
    return max((_numel(block) for block in block_stack(model)), default=_numel(model))


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
