"""Checkpoints: the same training goes on in any world, whatever happened while they were written."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import signal
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_scenarios import WIDTH, Stack, Tied, Unused, batch_of, compare, groups, one_forward
from torch import nn

from suite.errors import RankError, UsageError
from suite.impls.sharded import Engine, checkpoint, kept, manifest, shard
from suite.impls.sharded.options import EngineOptions
from suite.testbeds.local import LocalTestbed
from suite.testbeds.testbed import RankContext

GLOBAL = 12
"""Batches per step, dealt out to however many ranks there are."""

Triple = tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]


class Dimensionless(Stack):
    """The last parameter of the optimizer is a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.last.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.last.scale


class Normalized(Stack):
    """With statistics that are not trained: two that are kept and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("passing", torch.zeros(3), persistent=False)
        self.register_buffer("bent", torch.zeros(4, 2).t())

    def body(self, x: torch.Tensor) -> torch.Tensor:
        self.passing += 1
        self.bent[0] += x.mean().item()
        return super().body(self.norm(x))


def make(kind: type[nn.Module] = Tied) -> Triple:
    torch.manual_seed(7)
    model = kind()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2, weight_decay=0.1)
    return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)


def make_unlike(kind: type[torch.optim.Optimizer], number: int, **settings: object) -> Triple:
    """Of whose two parameter groups only one has these settings, and so some states."""
    model, _, _ = make()
    parts = groups(model)
    parts[number] |= settings
    optimizer = kind(parts, lr=1e-2)  # type: ignore[call-arg]
    return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)


def train_plain(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: object, first: int, steps: int
) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad(set_to_none=False)
        for number in range(GLOBAL):
            (one_forward(model, batch_of(number, step, 0)) / GLOBAL).backward()
        optimizer.step()
        scheduler.step()  # type: ignore[attr-defined]


class Program:
    """One rank of a training that can be saved and continued."""

    def __init__(self, context: RankContext) -> None:
        self._rank, self._size = context.rank, context.world_size

    def start(
        self,
        partition_size: int,
        options: EngineOptions,
        precision: str = "fp32",
        build: Callable[[], Triple] = make,
    ) -> None:
        self._model, self._optimizer, self._scheduler = build()
        self._engine: Engine = shard(
            self._model,
            self._optimizer,
            precision=precision,
            partition_size=partition_size,
            ranks_per_node=1,
            options=options,
        )
        self._checkpointer = checkpoint.Checkpointer(self._engine)

    def train(self, first: int, steps: int) -> None:
        for step in range(first, first + steps):
            for number in range(self._rank, GLOBAL, self._size):
                self._engine.backward(one_forward(self._model, batch_of(number, step, 0)) / GLOBAL)
            self._engine.step()
            self._scheduler.step()

    def save(self, folder: Path, position: int) -> None:
        self._saving = self._checkpointer.save(folder, position, self._scheduler)

    def wait(self) -> None:
        self._saving.wait()

    def load(self, folder: Path) -> int:
        return checkpoint.load(folder, self._engine, self._scheduler)

    def problem_of_loading(self, folder: Path, absent: int) -> str:
        """On that rank's node the checkpoint cannot be seen."""
        try:
            checkpoint.load(folder / "elsewhere" if self._rank == absent else folder, self._engine)
        except UsageError as error:
            return str(error)
        return ""

    def parameters(self) -> dict[str, torch.Tensor]:
        return dict(self._engine.full_parameters())

    def buffers(self) -> dict[str, torch.Tensor]:
        return {name: buffer.clone() for name, buffer in self._model.named_buffers()}

    def loss_scale(self) -> float:
        assert self._engine.loss_scale is not None
        return self._engine.loss_scale.value

    def set_loss_scale(self, value: float) -> None:
        assert self._engine.loss_scale is not None
        self._engine.loss_scale.value = value

    def draw(self) -> float:
        return torch.rand(()).item()

    def limit_files(self, rank: int, size: int | None) -> None:
        """From now on no file of that rank may grow beyond `size` bytes: a disk that is full."""
        if self._rank == rank:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))

    def problem_of_waiting(self) -> str:
        try:
            self._saving.wait()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def save_again_and_again(self, folder: Path) -> None:
        for number in range(1, 1000):
            self.train(number, 1)
            self.save(folder / f"{number:04}", number)
            self._saving.wait()


def saved_in(
    folder: Path,
    world: int,
    partition_size: int,
    options: EngineOptions,
    steps: int = 3,
    build: Callable[[], Triple] = make,
) -> None:
    with LocalTestbed(world, world).launch(Program, 60) as ranks:
        ranks.call("start", partition_size, options, "fp32", build, timeout_s=30)
        ranks.call("train", 0, steps, timeout_s=30)
        ranks.call("save", folder, steps, timeout_s=30)
        ranks.call("train", steps, 1, timeout_s=30)  # goes on while it is being written
        ranks.call("wait", timeout_s=30)


def expected(steps: int, build: Callable[[], Triple] = make) -> dict[str, torch.Tensor]:
    model, optimizer, scheduler = build()
    train_plain(model, optimizer, scheduler, 0, steps)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


WORLD_SHARDED = EngineOptions(optimizer_sharding="world")


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((4, 2, EngineOptions()), (3, 3, EngineOptions())),
        ((3, 3, EngineOptions()), (4, 2, WORLD_SHARDED)),
        ((4, 2, WORLD_SHARDED), (2, 1, EngineOptions(contiguous_arenas=False))),
        ((2, 1, EngineOptions(coalesced=False)), (1, 1, EngineOptions())),
    ],
    ids=["mics to zero3", "zero3 to mics", "world-sharded to replicated", "to one rank"],
)
def test_a_checkpoint_continues_in_another_world(
    tmp_path: Path, saved: tuple[int, int, EngineOptions], loaded: tuple[int, int, EngineOptions]
) -> None:
    folder = tmp_path / "step-3"
    saved_in(folder, *saved)
    world, partition_size, options = loaded
    with LocalTestbed(world, world).launch(Program, 60) as ranks:
        ranks.call("start", partition_size, options, timeout_s=30)
        assert ranks.call("load", folder, timeout_s=30) == [3] * world
        ranks.call("train", 3, 3, timeout_s=30)
        for parameters in ranks.call("parameters", timeout_s=30):
            assert compare(parameters, expected(6)) < 2e-6


def test_plain_torch_and_the_engine_continue_each_other(tmp_path: Path) -> None:
    model, optimizer, scheduler = make()
    train_plain(model, optimizer, scheduler, 0, 2)
    checkpoint.save_plain(tmp_path / "plain", model, optimizer, 2, scheduler)
    with LocalTestbed(3, 3).launch(Program, 60) as ranks:
        ranks.call("start", 3, EngineOptions(), timeout_s=30)
        assert ranks.call("load", tmp_path / "plain", timeout_s=30)[0] == 2
        ranks.call("train", 2, 2, timeout_s=30)
        ranks.call("save", tmp_path / "sharded", 4, timeout_s=30)
        ranks.call("wait", timeout_s=30)
    model, optimizer, scheduler = make()
    assert checkpoint.load_plain(tmp_path / "sharded", model, optimizer, scheduler) == 4
    train_plain(model, optimizer, scheduler, 4, 2)
    assert compare({name: p.detach() for name, p in model.named_parameters()}, expected(6)) < 2e-6


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("kind", "setting"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"amsgrad": True})]
)
def test_states_that_only_one_parameter_group_has_are_continued(
    tmp_path: Path, kind: type[torch.optim.Optimizer], setting: dict[str, object], number: int
) -> None:
    """Some ranks own nothing of that group, and some nothing of the other."""
    build = partial(make_unlike, kind, number, **setting)
    saved_in(tmp_path / "a", 4, 2, WORLD_SHARDED, build=build)
    with LocalTestbed(3, 3).launch(Program, 60) as ranks:
        ranks.call("start", 3, EngineOptions(), "fp32", build, timeout_s=30)
        assert ranks.call("load", tmp_path / "a", timeout_s=30) == [3] * 3
        ranks.call("train", 3, 3, timeout_s=30)
        assert compare(ranks.call("parameters", timeout_s=30)[0], expected(6, build)) < 2e-6
    model, optimizer, scheduler = build()
    assert checkpoint.load_plain(tmp_path / "a", model, optimizer, scheduler) == 3
    train_plain(model, optimizer, scheduler, 3, 3)
    assert compare({name: p.detach() for name, p in model.named_parameters()}, expected(6, build)) < 2e-6


@pytest.mark.parametrize("kind", [Unused, Dimensionless])
def test_parameters_without_states_or_dimensions_are_continued(tmp_path: Path, kind: type[nn.Module]) -> None:
    build = partial(make, kind)
    model, optimizer, scheduler = build()
    train_plain(model, optimizer, scheduler, 0, 3)
    checkpoint.save_plain(tmp_path / "a", model, optimizer, 3, scheduler)
    model, optimizer, scheduler = build()
    assert checkpoint.load_plain(tmp_path / "a", model, optimizer, scheduler) == 3
    train_plain(model, optimizer, scheduler, 3, 3)
    assert compare({name: p.detach() for name, p in model.named_parameters()}, expected(6, build)) < 2e-6
    with LocalTestbed(3, 3).launch(Program, 60) as ranks:
        ranks.call("start", 3, EngineOptions(), "fp32", build, timeout_s=30)
        assert ranks.call("load", tmp_path / "a", timeout_s=30) == [3] * 3
        assert compare(ranks.call("parameters", timeout_s=30)[0], expected(3, build)) == 0
        ranks.call("train", 3, 3, timeout_s=30)
        ours, theirs = ranks.call("parameters", timeout_s=30)[0], expected(6, build)
        never = [name for name in ours if "spare" in name or "blocks.3" in name]  # decay in the engine alone
        assert compare(ours | {name: theirs[name] for name in never}, theirs) < 2e-6


def test_buffers_are_continued(tmp_path: Path) -> None:
    build = partial(make, Normalized)
    with LocalTestbed(3, 3).launch(Program, 60) as ranks:
        ranks.call("start", 3, EngineOptions(), "fp32", build, timeout_s=30)
        ranks.call("train", 0, 2, timeout_s=30)
        before = ranks.call("buffers", timeout_s=30)[0]
        ranks.call("save", tmp_path / "sharded", 2, timeout_s=30)
        ranks.call("train", 2, 1, timeout_s=30)
        ranks.call("wait", timeout_s=30)
    model, optimizer, scheduler = build()
    checkpoint.load_plain(tmp_path / "sharded", model, optimizer, scheduler)
    kept_ones = before.keys() - {"passing"}
    assert {"norm.running_mean", "norm.num_batches_tracked", "bent"} <= kept_ones
    assert all(torch.equal(model.get_buffer(name), before[name]) for name in kept_ones)
    assert not torch.equal(model.get_buffer("passing"), before["passing"])
    checkpoint.save_plain(tmp_path / "plain", model, optimizer, 2, scheduler)
    with LocalTestbed(2, 2).launch(Program, 60) as ranks:
        ranks.call("start", 2, EngineOptions(), "fp32", build, timeout_s=30)
        ranks.call("load", tmp_path / "plain", timeout_s=30)
        for buffers in ranks.call("buffers", timeout_s=30):
            assert all(torch.equal(buffers[name], before[name]) for name in kept_ones)


def test_a_checkpoint_from_before_buffers_were_kept_is_read(tmp_path: Path) -> None:
    """Nor did it say which parameter has which of the optimizer's states: all had all of them."""
    model, optimizer, scheduler = make(Normalized)
    train_plain(model, optimizer, scheduler, 0, 1)
    checkpoint.save_plain(tmp_path / "a", model, optimizer, 1, scheduler)
    training = json.loads((tmp_path / "a" / manifest.TRAINING).read_text())
    del training["buffers"], training["stateful"]
    (tmp_path / "a" / manifest.TRAINING).write_text(json.dumps(training))
    again, other, its_scheduler = make(Normalized)
    assert checkpoint.load_plain(tmp_path / "a", again, other, its_scheduler) == 1
    assert compare(dict(again.named_parameters()), dict(model.named_parameters())) == 0
    assert len(other.state) == len(optimizer.state)
    assert not again.get_buffer("norm.running_mean").any()


def test_milestones_are_continued(tmp_path: Path) -> None:
    """A mapping from steps, whose numbers JSON would make text."""

    def build() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])

    def rates(steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            found += scheduler.get_last_lr()
        return found

    model = Stack()
    optimizer, scheduler = build()
    undisturbed = rates(5)
    optimizer, scheduler = build()
    assert rates(1) == undisturbed[:1]
    checkpoint.save_plain(tmp_path / "a", model, optimizer, 1, scheduler)
    optimizer, scheduler = build()
    checkpoint.load_plain(tmp_path / "a", model, optimizer, scheduler)
    assert rates(4) == undisturbed[1:] == pytest.approx([0.1, 0.1, 0.01, 0.01])
    assert scheduler.state_dict()["milestones"] == Counter([2, 4])


class Recorder:
    """Of a scheduler's kind, whose state goes on changing."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"seen": [1]}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def test_a_scheduler_s_state_is_that_of_the_moment_and_json() -> None:
    _, optimizer, _ = make()
    recorder = Recorder()
    training = checkpoint._training([], optimizer, 0, recorder)
    recorder.state["seen"].append(2)
    assert training.scheduler == {"seen": [1]}
    recorder.state["seen"].append(torch.ones(()))
    with pytest.raises(
        UsageError, match="the scheduler's state holds a Tensor, which cannot be saved as JSON"
    ):
        checkpoint._training([], optimizer, 0, recorder)


def test_random_state_and_loss_scale_are_continued(tmp_path: Path) -> None:
    with LocalTestbed(2, 2).launch(Program, 60) as ranks:
        ranks.call("start", 2, EngineOptions(), "fp16", timeout_s=30)
        ranks.call("set_loss_scale", 1024.0, timeout_s=30)
        ranks.call("train", 0, 1, timeout_s=30)
        ranks.call("save", tmp_path / "a", 1, timeout_s=30)
        ranks.call("wait", timeout_s=30)
        numbers = ranks.call("draw", timeout_s=30)
    with LocalTestbed(2, 2).launch(Program, 60) as ranks:
        ranks.call("start", 1, EngineOptions(), "fp16", timeout_s=30)
        ranks.call("load", tmp_path / "a", timeout_s=30)
        assert ranks.call("loss_scale", timeout_s=30) == [1024.0, 1024.0]
        assert ranks.call("draw", timeout_s=30) == numbers


def test_a_kill_at_any_moment_of_a_save_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    """Again and again: one rank, any one, is killed at a random moment of saving in a loop."""
    chance = random.Random(0)
    for attempt in range(4):
        folder = tmp_path / f"run-{attempt}"
        with pytest.raises(RankError, match="SIGKILL"), LocalTestbed(3, 3).launch(Program, 60) as ranks:
            ranks.call("start", 3, EngineOptions(), timeout_s=30)
            victim = chance.choice(ranks.pids())
            delay = 0.4 + chance.random() * 0.3
            threading.Timer(delay, os.kill, (victim, signal.SIGKILL)).start()
            ranks.call("save_again_and_again", folder, timeout_s=30)
        newest = kept.latest(folder)
        assert newest is not None, "nothing was saved before the kill: allow it more time"
        model, optimizer, scheduler = make()
        position = checkpoint.load_plain(newest, model, optimizer, scheduler)
        assert newest.name == f"{position:04}"
        model_expected, *rest = make()
        train_plain(model_expected, *rest, 1, position)
        parameters = {name: p.detach() for name, p in model_expected.named_parameters()}
        assert compare({name: p.detach() for name, p in model.named_parameters()}, parameters) < 1e-5
        # What the kill left half-written is not taken for a checkpoint, and not in the way of the next.
        checkpoint.save_plain(folder / f"{position + 1:04}", model, optimizer, position + 1, scheduler)
        assert kept.latest(folder) == folder / f"{position + 1:04}"


def truncate(folder: Path) -> None:
    file = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])


def scribble(folder: Path) -> None:
    file = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def lose_a_file(folder: Path) -> None:
    max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size).unlink()


def damage_json(folder: Path) -> None:
    (folder / manifest.TRAINING).write_text("{")


def other_format(folder: Path) -> None:
    content = json.loads((folder / manifest.TRAINING).read_text())
    (folder / manifest.TRAINING).write_text(json.dumps(content | {"format": 99}))


def flip_a_bit(folder: Path) -> None:
    file = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # of a tensor: nothing but a checksum can tell
    file.write_bytes(content)


def changed(**values: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / manifest.TRAINING).read_text())
        (folder / manifest.TRAINING).write_text(json.dumps(content | values))

    damage.__name__ = "changed " + ", ".join(values)
    return damage


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        scribble,
        flip_a_bit,
        lose_a_file,
        damage_json,
        other_format,
        changed(groups=[{"params": []}, {}]),
        changed(groups=[{"lr": "fast"}, {}]),
        changed(states={"exp_avg": "yes"}),
        changed(states={}),
        changed(position="three"),
        changed(files={"../../elsewhere": [1, 2]}),
        changed(files={"a": []}),
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    model, optimizer, scheduler = make()
    train_plain(model, optimizer, scheduler, 0, 1)
    checkpoint.save_plain(tmp_path / "a", model, optimizer, 1, scheduler)
    damage(tmp_path / "a")
    with pytest.raises(UsageError, match="checkpoint") as caught:
        checkpoint.load_plain(tmp_path / "a", model, optimizer)
    assert len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    model, optimizer, _ = make(Stack)
    checkpoint.save_plain(tmp_path / "a", model, optimizer)
    other, its_optimizer, _ = make(Tied)
    with pytest.raises(UsageError, match="cannot be loaded"):
        checkpoint.load_plain(tmp_path / "a", other, its_optimizer)


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    model, optimizer, _ = make()
    checkpoint.save_plain(tmp_path / "a", model, optimizer)
    with pytest.raises(UsageError, match="exists already"):
        checkpoint.save_plain(tmp_path / "a", model, optimizer)


def test_nothing_in_a_checkpoint_is_pickled_and_nothing_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, scheduler = make()
    checkpoint.save_plain(tmp_path / "a", model, optimizer, 1, scheduler)
    assert {path.suffix for path in (tmp_path / "a").iterdir()} == {".safetensors", ".json"}

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "executed",))  # type: ignore[return-value]

    # Where torch.distributed.checkpoint itself keeps pickles, and what torch.load would take.
    for name in (".metadata", "__0_0.distcp", "model.pt"):
        (tmp_path / "a" / name).write_bytes(pickle.dumps(Evil()))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something is unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert checkpoint.load_plain(tmp_path / "a", model, optimizer, scheduler) == 1
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("fused", [False, True])
def test_a_checkpoint_does_not_carry_the_choice_of_the_optimizer_s_kernel(
    tmp_path: Path, fused: bool
) -> None:
    """The device that continues may have another one than the device that saved."""
    model, optimizer, scheduler = make()
    for group in optimizer.param_groups:
        group["fused"] = not fused
    train_plain(model, optimizer, scheduler, 0, 2)
    checkpoint.save_plain(tmp_path / "saved", model, optimizer, 2, scheduler)
    again, other, its_scheduler = make()
    for group in other.param_groups:
        group["fused"] = fused
    assert checkpoint.load_plain(tmp_path / "saved", again, other, its_scheduler) == 2
    assert [group["fused"] for group in other.param_groups] == [fused, fused]
    for parts in ((model, optimizer, scheduler), (again, other, its_scheduler)):
        train_plain(*parts, 2, 2)
    assert compare(dict(again.named_parameters()), dict(model.named_parameters())) < 1e-6


def test_a_checkpoint_that_lost_the_file_of_one_rank_is_refused_by_all(tmp_path: Path) -> None:
    """Its tensors' sizes can still be read off the other ranks' files: what is missing must not stay
    what it was before."""
    saved_in(tmp_path / "a", 3, 3, EngineOptions(), steps=1)
    first = min((tmp_path / "a").glob("*.safetensors"))
    first.unlink()
    with pytest.raises(
        RankError, match=f"UsageError: checkpoint .* cannot be loaded: {first.name} is missing"
    ):
        with LocalTestbed(3, 3).launch(Program, 60) as ranks:
            ranks.call("start", 3, EngineOptions(), timeout_s=30)
            ranks.call("load", tmp_path / "a", timeout_s=30)
    training = json.loads((tmp_path / "a" / manifest.TRAINING).read_text())
    del training["files"][first.name]  # as if it had never been there
    (tmp_path / "a" / manifest.TRAINING).write_text(json.dumps(training))
    model, optimizer, scheduler = make()
    with pytest.raises(UsageError, match=r"it holds [0-9]+ of the [0-9]+ elements wanted of|does not hold"):
        checkpoint.load_plain(tmp_path / "a", model, optimizer, scheduler)


@pytest.mark.parametrize("absent", [0, 1])
def test_a_checkpoint_that_one_node_does_not_see_is_refused_by_all(tmp_path: Path, absent: int) -> None:
    model, optimizer, scheduler = make()
    checkpoint.save_plain(tmp_path / "a", model, optimizer, 1, scheduler)
    with LocalTestbed(2, 2).launch(Program, 60) as ranks:
        ranks.call("start", 2, EngineOptions(), timeout_s=30)
        for problem in ranks.call("problem_of_loading", tmp_path / "a", absent, timeout_s=20):
            assert f"cannot be loaded: it is not there, or not complete (rank {absent})" in problem


@pytest.mark.parametrize("full", [0, 2], ids=["on the first rank", "on another rank"])
def test_a_disk_that_is_full_fails_the_save_on_all_ranks_and_leaves_nothing(
    tmp_path: Path, full: int
) -> None:
    with LocalTestbed(3, 3).launch(Program, 60) as ranks:
        ranks.call("start", 3, EngineOptions(), timeout_s=30)
        ranks.call("train", 0, 1, timeout_s=30)
        ranks.call("save", tmp_path / "a", 1, timeout_s=30)
        ranks.call("wait", timeout_s=30)
        ranks.call("limit_files", full, 600, timeout_s=30)
        ranks.call("save", tmp_path / "b", 2, timeout_s=30)
        for problem in ranks.call("problem_of_waiting", timeout_s=30):
            assert problem.startswith(f"OutputError: checkpoint {tmp_path / 'b'} cannot be written: ")
            assert "File too large" in problem and "\n" not in problem
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        # With room again, the same ranks go on.
        ranks.call("limit_files", full, None, timeout_s=30)
        ranks.call("save", tmp_path / "b", 2, timeout_s=30)
        ranks.call("wait", timeout_s=30)
    assert kept.latest(tmp_path) == tmp_path / "b"
