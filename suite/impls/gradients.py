"""The gradients of parameters that torch itself shards or replicates: reading, norm, clipping."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """As it is; zeros for a parameter that no loss reached, as in the reference run."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Scales the gradients down to an L2 norm of `limit` where they exceed it; None only measures.

    Returns the norm before clipping, on the device. Collective when the parameters are DTensors: the
    norm is then that of all shards of one replica.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in with_gradient if parameter.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if limit is not None:
        clip_grads_with_norm_(with_gradient, limit, norm)
    return norm
