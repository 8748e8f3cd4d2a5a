"""From a model's forward and autograd to events: which unit begins or ends what, and when.

All ranks must see the same events in the same order, whatever their data: they become collectives.
So a unit's backward does not end when all of its parameters have gradients (an expert that no token
of this rank has visited gets none), but where autograd leaves the unit. Autograd runs what was
computed last first, and adds up parameters' gradients before anything else; when it comes to what
had made a unit's first input, it is through with the unit.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from suite.impls.sharded.borrowed import BorrowedWeights
from suite.impls.sharded.schedule import Phase
from suite.impls.sharded.units import Unit


class Listener(Protocol):
    """The engine."""

    def happens(self, phase: Phase, unit: Unit) -> None:
        """A part of the schedule."""

    def fetch(self, unit: Unit) -> None:
        """Its weights are needed outside of the schedule."""

    def drop(self, unit: Unit) -> None:
        """And not any more."""

    def before_backward(self) -> None:
        """Autograd has begun."""

    def after_backward(self) -> None:
        """All units' backward has ended: the micro-step is over."""

    def backward_failed(self) -> None:
        """Autograd has raised."""


class Mode(Enum):
    """What a unit's forward is a part of."""

    TRAINING = "training"
    UNRECORDED = "unrecorded"
    """Training, but autograd does not look on: checkpointed (reentrant), or a teacher."""
    EVALUATION = "evaluation"
    RECOMPUTED = "recomputed"
    """In backward, and autograd sees it for the first time (checkpointed, reentrant)."""
    REPEATED = "repeated"
    """In backward, for what autograd had seen (checkpointed, not reentrant)."""

    @property
    def scheduled(self) -> bool:
        return self in (Mode.TRAINING, Mode.UNRECORDED)

    @property
    def leads_to_backward(self) -> bool:
        return self in (Mode.TRAINING, Mode.RECOMPUTED)


@dataclass
class Use:
    """Where a unit is between the begin of forward and the end of backward."""

    unit: Unit
    depth: int = 0
    """Calls of its modules that are in progress; they may be nested."""
    mode: Mode = Mode.EVALUATION
    calls: int = 0
    """Forwards that autograd has recorded since its backward last ended."""
    task: int | None = None
    """Which run of autograd its backward began in (a checkpointed one has its own); None: no backward."""


class ModelHooks:
    """Watches a model and tells the engine. `close` removes the hooks."""

    def __init__(self, model: nn.Module, units: Sequence[Unit], listener: Listener) -> None:
        self._model = model
        self._uses = [Use(unit) for unit in units]
        self._listener = listener
        self._training = 0
        """Units whose training forward is in progress."""
        self._in_backward = False
        self._tasks: set[int] = set()
        """Runs of autograd that are watched for their end."""
        self._round = 0
        """Number of the backward that runs, or comes next."""
        self._seen_training = False
        """Whether a whole training micro-step has been watched."""
        self._borrowed = BorrowedWeights(units, self._in_use, listener.fetch, self._lend)
        self._watching = 0
        self._handles = list(self._install())

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def run_backward(self, backward: Callable[[], None]) -> None:
        """Autograd's run, watched from its begin to its end."""
        self._begin_backward()
        try:
            backward()
        except BaseException:
            self._abandon()
            raise
        self._finish_backward()

    def find_failure(self) -> None:
        """Notices that a backward has raised which was not started by the engine."""
        if self._in_backward and torch._C._current_graph_task_id() == -1:
            self._abandon()

    # --- forward

    def _install(self) -> Iterator[RemovableHandle]:
        yield self._model.register_forward_pre_hook(lambda *_: self._watch_functions())
        yield self._model.register_forward_hook(lambda *_: self._unwatch_functions(), always_call=True)
        for use in self._uses:
            for module in _doors(use.unit, self._model):
                yield module.register_forward_pre_hook(self._enter(use), with_kwargs=True)
                yield module.register_forward_hook(self._exit(use), always_call=True)

    def _enter(self, use: Use) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: object, keywords: object) -> None:
            use.depth += 1
            if use.depth > 1:
                return
            use.mode = self._mode(use)
            if use.mode is Mode.TRAINING:
                self._training += 1
                if not use.calls:
                    self._watch_inputs(use, (arguments, keywords))
            use.calls += use.mode.leads_to_backward
            if use.mode.scheduled:
                self._listener.happens(Phase.FORWARD, use.unit)
            else:
                self._listener.fetch(use.unit)

        return hook

    def _exit(self, use: Use) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: object, output: object) -> None:
            if not use.depth:  # another hook raised before `_enter`
                return
            use.depth -= 1
            if use.depth:
                return
            if use.mode.leads_to_backward:
                self._watch_outputs(use, output)
            self._training -= use.mode is Mode.TRAINING
            if use.mode.scheduled:
                self._listener.happens(Phase.FORWARD_END, use.unit)
            elif use.mode is Mode.EVALUATION:
                self._listener.drop(use.unit)

        return hook

    def _mode(self, use: Use) -> Mode:
        self.find_failure()
        if self._in_backward:
            first = torch.is_grad_enabled() and not use.calls
            return Mode.RECOMPUTED if first else Mode.REPEATED
        if torch.is_grad_enabled():
            return Mode.TRAINING
        return Mode.UNRECORDED if self._training else Mode.EVALUATION

    # --- weights used outside of their unit

    def _watch_functions(self) -> None:
        if (not self._seen_training or self._borrowed.found) and not self._compiled():
            self._borrowed.__enter__()
            self._watching += 1

    def _unwatch_functions(self) -> None:
        if self._watching:
            self._borrowed.__exit__(None, None, None)
            self._watching -= 1

    def _compiled(self) -> bool:
        """What is compiled keeps to its own weights; it could not be traced under watch."""
        return any(use.unit.compiled for use in self._uses)

    def _in_use(self, unit: Unit) -> bool:
        return self._uses[unit.index].depth > 0

    def _lend(self, unit: Unit, result: object) -> None:
        if self._training:
            self._watch_outputs(self._uses[unit.index], result)

    # --- backward

    def _watch_outputs(self, use: Use, output: object) -> None:
        """The backward of a call begins with the first gradient of any of its outputs."""
        begun_in = -1

        def begin(ends: Sequence[Callable[[], None]], gradient: Tensor) -> None:
            nonlocal begun_in
            for end in ends:
                end()
            # A later gradient may be of a tensor that was only passed through.
            if begun_in != self._round:
                begun_in = self._round
                self._begin(use)

        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(begin, _ends_at(tensor)))

    def _watch_inputs(self, use: Use, inputs: object) -> None:
        """Of a micro-step's first call: that is the last that backward comes to. A leaf's gradient
        says nothing, it may be there before others."""

        def end() -> None:
            if use.task is not None:
                self._end(use)

        for tensor in tensors_in(inputs):
            if tensor.grad_fn is not None:
                if not hasattr(tensor, ENDS):
                    tensor.register_hook(lambda _: end())
                else:  # before the unit that put it out begins, so that not both are in memory
                    _ends_at(tensor).append(end)

    def _begin_backward(self) -> None:
        self._listener.before_backward()
        self._in_backward = True

    def _begin(self, use: Use) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError("backward with create_graph=True is not possible with sharded parameters")
        if not self._in_backward:  # somebody called `loss.backward()`
            self._begin_backward()
            Variable._execution_engine.queue_callback(self._finish_backward)
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            self._tasks.add(task)
            Variable._execution_engine.queue_callback(lambda: self._end_task(task))
        if use.task is None:
            use.task = task
            self._listener.happens(Phase.BACKWARD, use.unit)

    def _end(self, use: Use) -> None:
        use.calls, use.task = 0, None
        self._listener.happens(Phase.BACKWARD_END, use.unit)

    def _end_task(self, task: int) -> None:
        self._tasks.discard(task)
        for use in self._uses:
            if use.task == task:
                self._end(use)

    def _finish_backward(self) -> None:
        for use in self._uses:
            if use.task is not None or _has_gradients(use.unit):
                self._end(use)
        self._forget()
        self._seen_training = True
        self._listener.after_backward()

    def _abandon(self) -> None:
        self._forget()
        self._listener.backward_failed()

    def _forget(self) -> None:
        for use in self._uses:
            use.calls, use.task = 0, None
        self._in_backward = False
        self._tasks.clear()
        self._round += 1


ENDS = "_units_that_end_here"


def _ends_at(tensor: Tensor) -> list[Callable[[], None]]:
    """What is to be done when this output's gradient is there: kept with the tensor, which comes to
    the next unit as its input."""
    if not hasattr(tensor, ENDS):
        setattr(tensor, ENDS, [])
    found: list[Callable[[], None]] = getattr(tensor, ENDS)
    return found


def _doors(unit: Unit, model: nn.Module) -> list[nn.Module]:
    """The modules through whose calls a unit's weights are used: its own and, for the root, those
    that hold parameters, because they are called from elsewhere, too (an encoder, embeddings)."""
    if unit.module is not model:
        return [unit.module]
    held = {id(slot.parameter) for slot in unit.slots}
    return [
        module
        for module in model.modules()
        if module is model or any(id(own) in held for own in module.parameters(recurse=False))
    ]


def _has_gradients(unit: Unit) -> bool:
    """Whether some have come that have not been reduced."""
    return any(slot.parameter.grad is not None for slot in unit.slots)


def cast_inputs(model: nn.Module, units: Sequence[Unit], dtype: torch.dtype) -> list[RemovableHandle]:
    """Has fp32 inputs of the model and of every unit brought to the dtype of the weights, the engine's
    `dtype`. Buffers keep theirs (positions need it), and a sum with one of them is fp32."""

    def cast(module: nn.Module, arguments: Any, keywords: Any) -> tuple[Any, Any]:
        return _cast(arguments, dtype), _cast(keywords, dtype)

    entries = {model, *(door for unit in units for door in _doors(unit, model))}
    return [entry.register_forward_pre_hook(cast, with_kwargs=True) for entry in entries]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The same object where nothing in it is fp32: a module may be handed a list to add to."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype is torch.float32 else value
    hugging_face = isinstance(value, dict) and dataclasses.is_dataclass(value)  # one of its models' outputs
    if type(value) is dict or hugging_face:
        parts = {key: _cast(part, dtype) for key, part in value.items()}
        if all(part is value[key] for key, part in parts.items()):
            return value
        return type(value)(**parts) if hugging_face else parts
    if type(value) in (tuple, list):
        items = [_cast(item, dtype) for item in value]
        return value if all(map(operator.is_, items, value)) else type(value)(items)
    return value


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors in a module's inputs or outputs: containers, dataclasses, and
    objects that hold tensors."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name, None))
    elif not isinstance(value, (nn.Module, type)):
        # A cache of keys and values, say; what it holds in turn may be anything.
        yield from (part for part in getattr(value, "__dict__", {}).values() if isinstance(part, Tensor))
