"""Models that are nobody's preset, trained by the engine and by plain torch side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from suite.impls.sharded import shard
from suite.impls.sharded.optimizer import NOT_ELEMENT_WISE
from suite.impls.sharded.options import EngineOptions
from suite.testbeds.testbed import RankContext

WIDTH = 12
STEPS = 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 2 * WIDTH)
        self.outer = nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.relu(self.inner(self.norm(x))))


class Stack(nn.Module):
    """A plain stack; the scenarios below change one thing each."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.last = nn.Linear(WIDTH, 3)

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


class Tied(Stack):
    """The same weight at both ends, and one that two blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(WIDTH, 5)
        self.first = nn.Embedding(5, WIDTH)
        self.last.weight = self.first.weight
        self.blocks[2].inner.weight = self.blocks[0].inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x.argmax(-1)))) * x


class CalledTwice(Stack):
    """Blocks that run several times in one forward."""

    def body(self, x: Tensor) -> Tensor:
        for index in (0, 1, 0, 2, 1):
            x = self.blocks[index](x)
        return x


class Frozen(Stack):
    """A frozen block in the middle, frozen parts of others, a frozen beginning."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in [*self.blocks[1].parameters(), *self.first.parameters()]:
            parameter.requires_grad_(False)
        self.blocks[2].norm.weight.requires_grad_(False)


class Unused(Stack):
    """Parameters that a step does not use: one in a block that runs, a block that never runs."""

    def __init__(self) -> None:
        super().__init__(4)
        self.blocks[0].spare = nn.Parameter(torch.ones(7))

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks[:3]:
            x = block(x)
        return x


class OddShapes(Stack):
    """Zero-size, scalar, non-contiguous and prime-sized parameters, and a buffer that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.bent = nn.Parameter(torch.randn(WIDTH, 7).t())
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        x = self.body(self.first(x)) * self.scale
        return self.last(x) + (x @ self.bent.t()).sum(-1, keepdim=True) + self.empty.sum()


class Checkpointed(Stack):
    """Activation checkpointing, of both kinds."""

    reentrant = False

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class NoBlocks(nn.Module):
    """Nothing repeats: the whole model is one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 11), nn.Tanh(), nn.Linear(11, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class OrderChanges(Stack):
    """The blocks run in another order every time."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = 0

    def body(self, x: Tensor) -> Tensor:
        self.turn += 1
        order = [(index + self.turn) % len(self.blocks) for index in range(len(self.blocks))]
        for index in order:
            x = self.blocks[index](x)
        return x


def one_forward(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def two_forwards(model: nn.Module, batch: Tensor) -> Tensor:
    """Several forwards before one backward."""
    return one_forward(model, batch) + one_forward(model, 2 * batch)


def with_evaluation(model: nn.Module, batch: Tensor) -> Tensor:
    """An evaluation between forward and backward, and before."""
    with torch.no_grad():
        before = one_forward(model, batch)
    loss = one_forward(model, batch)
    with torch.no_grad():
        assert torch.equal(one_forward(model, batch), before)
    return loss


Loss = Callable[[nn.Module, Tensor], Tensor]
SCENARIOS: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "plain": (Stack, one_forward),
    "tied": (Tied, one_forward),
    "called twice": (CalledTwice, one_forward),
    "frozen": (Frozen, one_forward),
    "unused": (Unused, one_forward),
    "odd shapes": (OddShapes, one_forward),
    "checkpointed": (Checkpointed, one_forward),
    "checkpointed, reentrant": (CheckpointedReentrant, one_forward),
    "no blocks": (NoBlocks, one_forward),
    "order changes": (OrderChanges, one_forward),
    "two forwards": (Stack, two_forwards),
    "evaluation": (Stack, with_evaluation),
}
SETTINGS: dict[str, dict[str, float]] = {"AdamW": {"weight_decay": 0.1}, "SGD": {"momentum": 0.9}}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    name.lower(): partial(kind, lr=1e-2, **SETTINGS.get(name, {}))
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and kind is not torch.optim.Optimizer and not issubclass(kind, NOT_ELEMENT_WISE)
}
"""All of torch's element-wise ones."""


def batch_of(rank: int, step: int, micro_step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + 10 * step + micro_step)
    return torch.randn(4, 5, generator=generator)


def groups(model: nn.Module) -> list[dict]:
    """Two parameter groups with different weight decay, as transformers are trained."""
    decay = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    rest = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    return [{"params": decay}, {"params": rest, "weight_decay": 0.0, "lr": 5e-3}]


class Program:
    """One rank that trains a scenario both ways."""

    scenarios = SCENARIOS

    def __init__(self, context: RankContext) -> None:
        self._rank = context.rank
        self._size = context.world_size
        self._device = context.device

    def difference(
        self,
        scenario: str,
        optimizer: str,
        options: EngineOptions,
        micro_steps: int,
        clip: float | None,
        partition_size: int | None = None,
        ranks_per_node: int | None = None,
        last: str = "always",
    ) -> float:
        """Largest difference (relative where values exceed 1) of any parameter or gradient between
        the engine and plain torch, which sees all ranks' batches, over a few steps with a schedule.

        Ranks' and micro-steps' losses differ by orders of magnitude: one that is lost or counted
        twice shows.
        """
        kind, loss_of = self.scenarios[scenario]
        torch.manual_seed(7)
        plain = kind()
        sharded = copy.deepcopy(plain)
        make = OPTIMIZERS[optimizer]
        reference, ours = make(groups(plain)), make(groups(sharded))
        engine = shard(
            sharded,
            ours,
            clip=clip,
            partition_size=partition_size,
            ranks_per_node=ranks_per_node,
            device=self._device,
            options=options,
        )
        schedules = [torch.optim.lr_scheduler.ExponentialLR(item, 0.9) for item in (reference, ours)]
        worst = 0.0
        for step in range(STEPS):
            reference.zero_grad(set_to_none=False)
            for micro_step in range(micro_steps):
                for rank in range(self._size):
                    if isinstance(plain, OrderChanges):  # one turn per micro-step, not per rank
                        plain.turn = step * micro_steps + micro_step
                    loss = loss_of(plain, batch_of(rank, step, micro_step))
                    (weight(rank, micro_step) * loss).backward()
                loss = loss_of(sharded, batch_of(self._rank, step, micro_step).to(self._device))
                is_last = LAST[last](micro_steps - 1 - micro_step)
                engine.backward(weight(self._rank, micro_step) * loss, is_last)
            gradients = {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone().to_dense()
                for name, p in plain.named_parameters()
                if p.requires_grad
            }
            worst = max(worst, compare(dict(engine.full_gradients()), gradients))
            trained = [p for p in plain.parameters() if p.requires_grad]
            for parameter, gradient in zip(trained, gradients.values(), strict=True):
                parameter.grad = gradient
            norm = nn.utils.clip_grad_norm_(trained, clip or float("inf"))
            reference.step()
            worst = max(worst, abs(engine.step().item() - norm.item()) / norm.item())
            for schedule in schedules:
                schedule.step()
        parameters = {name: parameter.detach() for name, parameter in plain.named_parameters()}
        worst = max(worst, compare(dict(engine.full_parameters()), parameters))
        engine.close()
        return worst


LAST: dict[str, Callable[[int], bool]] = {
    "as it is": lambda left: left == 0,
    "always": lambda left: True,
    "never": lambda left: False,
}
"""What a user may tell `backward`, given the number of micro-steps that are left."""


def weight(rank: int, micro_step: int) -> float:
    return (rank + 1) * 10.0 ** (micro_step % 2)


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    assert all(ours[name].shape == theirs[name].shape for name in theirs)
    filled = [name for name in theirs if theirs[name].numel()]
    largest = max(theirs[name].abs().max().item() for name in filled)
    return max((ours[name] - theirs[name]).abs().max().item() for name in filled) / max(1.0, largest)
