"""The engine with what users bring: their models, their training loops, and their mistakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from engine_scenarios import WIDTH, Program, Stack, batch_of, compare, one_forward
from torch import Tensor, nn
from user_models import MODELS, ListsInAList, Positions, gpt2, image_loss, t5, tokens_of, vit

from suite.errors import UsageError
from suite.impls.sharded import DTYPES, Engine, shard
from suite.impls.sharded.options import EngineOptions
from suite.testbeds.local import LocalTestbed
from suite.testbeds.ranks import LocalRanks
from suite.testbeds.testbed import RankContext

POISON = EngineOptions(poison=True)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


class Sometimes(Stack):
    """Raises when it is told to: in a block's forward, or in its backward."""

    where = ""

    def body(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            if number == 1 and self.where == "forward":
                raise ArithmeticError("told to")
            x = block(x)
            if number == 1 and self.where == "backward":
                x.register_hook(self.refuse)
        return x

    @staticmethod
    def refuse(gradient: Tensor) -> None:
        raise ArithmeticError("told to")


class UserProgram(Program):
    scenarios = MODELS

    def __init__(self, context: RankContext) -> None:
        super().__init__(context)
        self._partition = 2 if self._size == 4 else self._size

    def _pair(
        self,
        kind: Callable[[], nn.Module] = Stack,
        precision: str = "fp32",
        units: Callable[[Any], list[nn.Module]] | None = None,
    ) -> tuple[Engine, nn.Module, torch.optim.SGD]:
        """The same model twice: sharded, and plain with its optimizer."""
        torch.manual_seed(7)
        model = kind()
        torch.manual_seed(7)
        plain = kind()
        engine = shard(
            model,
            sgd(model),
            precision=precision,
            partition_size=self._partition,
            options=POISON,
            unit_modules=None if units is None else units(model),
        )
        return engine, plain, sgd(plain)

    def _batches(self, step: int) -> list[Tensor]:
        return [batch_of(rank, step, 0) for rank in range(self._size)]

    def _plain_step(self, plain: nn.Module, optimizer: torch.optim.Optimizer, step: int, times: int) -> None:
        optimizer.zero_grad()
        for batch in self._batches(step):
            (times * one_forward(plain, batch)).backward()
        optimizer.step()

    def _difference(self, engine: Engine, plain: nn.Module) -> float:
        ours = dict(engine.full_parameters())
        engine.close()
        return compare(ours, {n: p.detach() for n, p in plain.named_parameters()})

    def backward_twice(self, through_the_engine: bool) -> float:
        """`retain_graph`, then another backward through the same graph."""
        engine, plain, optimizer = self._pair()
        for step in range(3):
            loss = one_forward(engine.model, batch_of(self._rank, step, 0))
            if through_the_engine:
                engine.backward(loss, last=False, retain_graph=True)
                engine.backward(loss)
            else:
                loss.backward(retain_graph=True)
                loss.backward()
            engine.step()
            self._plain_step(plain, optimizer, step, 2)
        return self._difference(engine, plain)

    def units_within_units(self) -> tuple[list[str], float]:
        """Blocks and parts of them as units: who owns what, and whether it trains."""
        engine, plain, optimizer = self._pair(
            units=lambda model: [*model.blocks, *(block.inner for block in model.blocks)]
        )
        for step in range(3):
            engine.backward(one_forward(engine.model, batch_of(self._rank, step, 0)))
            engine.step()
            self._plain_step(plain, optimizer, step, 1)
        owned = [
            f"{unit.name}: {' '.join(sorted(slot.name for slot in unit.slots))}" for unit in engine.units
        ]
        return owned, self._difference(engine, plain)

    def lists_in_a_list(self) -> tuple[list[str], int, int]:
        """Names of the units, the most that is gathered at a time, and the whole model's size (bytes)."""
        model = ListsInAList(8)
        engine = shard(model, sgd(model), options=EngineOptions(poison=True, prefetch_mb=0, coalesce_mb=0))
        for step in range(3):
            engine.backward(one_forward(model, batch_of(self._rank, step, 0)))
            engine.step()
        whole = sum(unit.nbytes for unit in engine.units)
        return [unit.name for unit in engine.units], engine.statistics.peak_gathered_bytes, whole

    def compiled_list(self) -> str:
        model = ListsInAList()
        options = EngineOptions(compile=True)
        return message_of(lambda: shard(model, sgd(model), unit_modules=[*model.blocks], options=options))

    def foreign_unit(self) -> str:
        model = Stack()
        return message_of(lambda: shard(model, sgd(model), unit_modules=[nn.Linear(2, 2)]))

    def retried(self, where: str, through_the_engine: bool) -> float:
        """A step that raises in the second of two micro-steps is begun over."""
        engine, plain, optimizer = self._pair(Sometimes)
        model: Any = engine.model
        for step in range(4):
            if step in (0, 2):
                engine.backward(one_forward(model, batch_of(self._rank, step, 0)), last=False)
                model.where = where
                try:
                    loss = one_forward(model, batch_of(self._rank, step, 0))
                    engine.backward(loss) if through_the_engine else loss.backward()
                    raise AssertionError("it should have raised")
                except ArithmeticError:
                    model.where = ""
                engine.zero_grad()
            engine.backward(one_forward(model, batch_of(self._rank, step, 0)))
            engine.step()
            self._plain_step(plain, optimizer, step, 1)
        return self._difference(engine, plain)

    def step_after_a_failure(self) -> str:
        engine, _, _ = self._pair(Sometimes)
        model: Any = engine.model
        model.where = "backward"
        loss = one_forward(model, batch_of(self._rank, 0, 0))
        try:
            engine.backward(loss)
        except ArithmeticError:
            return message_of(engine.step)
        return "it should have raised"

    def out_of_habit(self) -> float:
        """A loop that clears gradients as it would in plain torch."""
        engine, plain, optimizer = self._pair()
        for step in range(3):
            engine.optimizer.zero_grad()
            engine.backward(one_forward(engine.model, batch_of(self._rank, step, 0)))
            engine.optimizer.zero_grad(set_to_none=False)  # in the wrong place
            engine.step()
            engine.optimizer.zero_grad()
            engine.model.zero_grad()
            self._plain_step(plain, optimizer, step, 1)
        return self._difference(engine, plain)

    def cleared_in_the_wrong_place(self) -> float:
        """Between backward and step, where plain torch would lose the gradients."""
        engine, plain, optimizer = self._pair()
        for step in range(3):
            engine.backward(one_forward(engine.model, batch_of(self._rank, step, 0)))
            engine.optimizer.zero_grad(set_to_none=False)
            engine.step()
            self._plain_step(plain, optimizer, step, 1)
        return self._difference(engine, plain)

    def forward_without_backward(self) -> float:
        """Its weights must not be taken for those after the step."""
        engine, plain, optimizer = self._pair()
        for step in range(3):
            engine.backward(one_forward(engine.model, batch_of(self._rank, step, 0)))
            one_forward(engine.model, batch_of(self._rank, step, 1))
            engine.step()
            self._plain_step(plain, optimizer, step, 1)
        return self._difference(engine, plain)

    def input_gradients(self) -> float:
        """`autograd.grad` towards inputs, and an input that wants a gradient."""
        engine, plain, optimizer = self._pair()
        worst = 0.0
        for step in range(3):
            batch = batch_of(self._rank, step, 0).requires_grad_(True)
            (ours,) = torch.autograd.grad(one_forward(engine.model, batch), batch)
            (theirs,) = torch.autograd.grad(one_forward(plain, batch), batch)
            worst = max(worst, (ours - theirs).abs().max().item())
            engine.backward(one_forward(engine.model, batch))
            engine.step()
            self._plain_step(plain, optimizer, step, 1)
        return max(worst, self._difference(engine, plain))

    def generates(self, kind: str, own_prompt: bool, precision: str) -> bool:
        """Whether evaluation between steps writes what the plain model writes."""
        engine, plain, _ = self._pair({"gpt2": gpt2, "t5": t5}[kind], precision)
        plain.to(DTYPES[precision])
        tokens = tokens_of(batch_of(self._rank if own_prompt else 0, 0, 0)).clamp(min=3)
        arguments = {"max_new_tokens": 6, "do_sample": False, "synced_gpus": own_prompt}
        engine.backward(engine.model(input_ids=tokens, labels=tokens).loss)
        engine.model.eval(), plain.eval()
        theirs: Any = plain
        ours: Any = engine.model
        before = torch.equal(ours.generate(tokens, **arguments), theirs.generate(tokens, **arguments))
        engine.step()
        with torch.no_grad():
            for name, value in list(engine.full_parameters()):
                plain.get_parameter(name).copy_(value)
        after = torch.equal(ours.generate(tokens, **arguments), theirs.generate(tokens, **arguments))
        engine.close()
        return before and after

    def in_low_precision(self, kind: str, precision: str) -> list[float]:
        """Losses of a model whose inputs or buffers are fp32, on one batch again and again."""
        build, loss_of = {"vit": (vit, image_loss), "positions": (Positions, one_forward)}[kind]
        engine, _, _ = self._pair(build, precision)
        found = []
        while len(found) < 5:
            loss = loss_of(engine.model, batch_of(self._rank, 0, 0)).float()
            engine.backward(loss / self._size)
            engine.step()
            if not engine.skipped:  # fp16 finds its scale first
                found.append(loss.item())
        return found

    def refused(self, what: str) -> str:
        engine, _, _ = self._pair(precision="fp16" if what == "unscaled" else "fp32")
        model: Any = engine.model
        batch = batch_of(self._rank, 0, 0)
        batch = batch.half() if what == "unscaled" else batch
        attempts: dict[str, Callable[[], object]] = {
            "state dict": model.state_dict,
            "load state dict": lambda: model.load_state_dict({}),
            "double backward": lambda: torch.autograd.grad(
                one_forward(model, batch.requires_grad_(True)), batch, create_graph=True
            ),
            "unscaled": lambda: one_forward(model, batch).backward(),
        }
        return message_of(attempts[what])

    def changed_meanwhile(self, trained: bool, through_the_engine: bool) -> str:
        """A parameter that is trained or frozen while the model is sharded, and the other afterwards."""
        torch.manual_seed(7)
        model = Stack()
        model.blocks[1].norm.requires_grad_(trained)
        engine = shard(model, sgd(model))
        model.blocks[1].norm.requires_grad_(not trained)
        loss = one_forward(model, batch_of(self._rank, 0, 0))
        return message_of(partial(engine.backward, loss) if through_the_engine else loss.backward)

    def with_optimizer(self, name: str) -> str:
        model = Stack()
        matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        optimizer = getattr(torch.optim, name)(matrices)
        return message_of(lambda: shard(model, optimizer))

    def after_a_step(self) -> str:
        model = Stack()
        optimizer = torch.optim.Adagrad(model.parameters())
        one_forward(model, batch_of(0, 0, 0)).backward()
        optimizer.step()
        return message_of(lambda: shard(model, optimizer))

    def of_integers(self) -> str:
        model = Stack()
        model.table = nn.Parameter(torch.arange(WIDTH), requires_grad=False)
        return message_of(lambda: shard(model, sgd(model)))


def message_of(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except (RuntimeError, ValueError, UsageError) as error:
        return str(error)
    return "nothing was raised"


@pytest.fixture(scope="module", params=[3, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[LocalRanks]:
    with LocalTestbed(request.param, request.param).launch(UserProgram, 60) as running:
        yield running


@pytest.mark.parametrize("model", MODELS)
def test_a_user_s_model_trains_as_in_plain_torch(ranks: LocalRanks, model: str) -> None:
    partition = 2 if len(ranks.pids()) == 4 else None
    answers = ranks.call("difference", model, "sgd", POISON, 2, 0.5, partition, 1, timeout_s=60)
    assert max(answers) < 5e-5


def test_a_unit_within_a_unit_owns_its_own_parameters(ranks: LocalRanks) -> None:
    for owned, difference in ranks.call("units_within_units", timeout_s=60):
        assert "blocks.0.inner: blocks.0.inner.bias blocks.0.inner.weight" in owned
        assert len(owned) == 7 and difference < 1e-5


def test_what_is_called_in_a_list_of_lists_is_gathered_one_by_one(ranks: LocalRanks) -> None:
    names, peak, whole = ranks.call("lists_in_a_list", timeout_s=60)[0]
    assert names[:3] == ["root", "blocks.0.0", "blocks.0.1"] and len(names) == 17
    assert peak < whole / 2


def test_a_list_cannot_be_compiled(ranks: LocalRanks) -> None:
    answer = ranks.call("compiled_list", timeout_s=60)[0]
    assert answer == "compile=true: unit blocks.0 is a ModuleList, which has no forward to compile"


def test_a_unit_that_is_not_in_the_model_is_refused(ranks: LocalRanks) -> None:
    assert "a Linear is not a part of the model" in ranks.call("foreign_unit", timeout_s=60)[0]


@pytest.mark.parametrize("through_the_engine", [True, False])
def test_two_backwards_through_one_graph_add_up(ranks: LocalRanks, through_the_engine: bool) -> None:
    assert max(ranks.call("backward_twice", through_the_engine, timeout_s=60)) < 1e-5


@pytest.mark.parametrize("through_the_engine", [True, False])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_raised_can_be_repeated(ranks: LocalRanks, where: str, through_the_engine: bool) -> None:
    assert max(ranks.call("retried", where, through_the_engine, timeout_s=60)) < 1e-5


def test_incomplete_gradients_are_not_stepped_with(ranks: LocalRanks) -> None:
    assert "call engine.zero_grad()" in ranks.call("step_after_a_failure", timeout_s=60)[0]


def test_clearing_gradients_as_in_plain_torch_does_no_harm(ranks: LocalRanks) -> None:
    assert max(ranks.call("out_of_habit", timeout_s=60)) < 1e-5


def test_clearing_gradients_of_the_optimizer_reaches_no_sums(ranks: LocalRanks) -> None:
    assert max(ranks.call("cleared_in_the_wrong_place", timeout_s=60)) < 1e-5


def test_weights_gathered_before_a_step_are_not_used_after_it(ranks: LocalRanks) -> None:
    assert max(ranks.call("forward_without_backward", timeout_s=60)) < 1e-5


def test_gradients_of_inputs_are_plain_torch_s(ranks: LocalRanks) -> None:
    assert max(ranks.call("input_gradients", timeout_s=60)) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("own_prompt", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_generate_writes_what_the_plain_model_writes(
    ranks: LocalRanks, kind: str, own_prompt: bool, precision: str
) -> None:
    assert all(ranks.call("generates", kind, own_prompt, precision, timeout_s=60))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["vit", "positions"])
def test_what_is_fp32_in_a_model_in_low_precision_is_cast(
    ranks: LocalRanks, kind: str, precision: str
) -> None:
    low = ranks.call("in_low_precision", kind, precision, timeout_s=60)[0]
    full = ranks.call("in_low_precision", kind, "fp32", timeout_s=60)[0]
    assert low[-1] == pytest.approx(full[-1], rel=0.02) and full[-1] < full[0]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("state dict", "use engine.full_parameters()"),
        ("load state dict", "use engine.full_parameters()"),
        ("double backward", "create_graph=True is not possible"),
        ("unscaled", "call engine.backward(loss)"),
    ],
)
def test_what_cannot_be_right_is_refused(ranks: LocalRanks, what: str, message: str) -> None:
    assert all(message in answer for answer in ranks.call("refused", what, timeout_s=60))


@pytest.mark.parametrize("through_the_engine", [True, False])
@pytest.mark.parametrize(("trained", "change"), [(False, "was frozen"), (True, "was trained")])
def test_a_parameter_that_is_frozen_or_thawed_later_is_named(
    ranks: LocalRanks, trained: bool, change: str, through_the_engine: bool
) -> None:
    for message in ranks.call("changed_meanwhile", trained, through_the_engine, timeout_s=60):
        assert f"blocks.1.norm.weight {change} when the model was sharded" in message


@pytest.mark.parametrize("name", ["LBFGS", "Adafactor", "Muon", "SparseAdam"])
def test_optimizers_that_need_whole_parameters_are_refused(ranks: LocalRanks, name: str) -> None:
    assert "looks at whole parameters" in ranks.call("with_optimizer", name, timeout_s=60)[0]


def test_an_optimizer_that_has_stepped_is_refused(ranks: LocalRanks) -> None:
    assert "shard the model before the first step" in ranks.call("after_a_step", timeout_s=60)[0]


def test_parameters_that_are_no_real_numbers_are_refused(ranks: LocalRanks) -> None:
    assert "parameter table is torch.int64" in ranks.call("of_integers", timeout_s=60)[0]
