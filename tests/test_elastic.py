"""A training that loses ranks goes on with fewer of them, on the same loss curve; or later."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from suite.config import Config
from suite.config_load import load
from suite.errors import RankError, UsageError
from suite.harness import elastic
from suite.harness.elastic import Point, discard_checkpoints, train_elastically, with_fewer_ranks
from suite.harness.worker import StepMeasurement, Worker
from suite.impls.sharded import checkpoint, kept

SMALL = [
    "workload.data=synthetic",
    "workload.model.layers=2",
    "workload.model.hidden=32",
    "workload.model.heads=2",
    "workload.model.intermediate=32",
    "train.global_batch=12",
    "train.steps=8",
    "train.warmup=1",
    "train.checkpoint_every=3",
    "testbed.timeout_s=5",
]


def training(*words: str) -> Config:
    return load([*SMALL, "impl=zero3", "testbed.ranks=4", *words])


def harm(monkeypatch: pytest.MonkeyPatch, method: str, when: Callable[[Worker], bool], fault: int) -> None:
    """The last rank gets that signal at the beginning of that method."""
    original = getattr(Worker, method)

    def harmed(self: Worker, *arguments: object) -> object:
        if self._context.rank == self._context.world_size - 1 and when(self):
            os.kill(os.getpid(), fault)
        return original(self, *arguments)

    monkeypatch.setattr(Worker, method, harmed)


def test_a_curve_holds_the_steps_that_fp16_has_skipped(tmp_path: Path) -> None:
    points = [Point(0, 7.5, 1.25), Point(1, 7.4, math.inf), Point(2, 7.3, math.nan)]
    for point in points:
        elastic._keep(tmp_path, point)
    read = elastic._read_curve(tmp_path)
    assert read[0] == points[0] and [read[step].loss for step in range(3)] == [7.5, 7.4, 7.3]
    assert read[1].grad_norm is None


@pytest.fixture(scope="module")
def undisturbed() -> list[float]:
    return train_elastically(training()).losses


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(signal.SIGKILL, id="dies"),
        pytest.param(signal.SIGSTOP, id="hangs", marks=pytest.mark.slow),
    ],
)
def test_the_loss_curve_goes_on_after_a_rank_was_lost(
    undisturbed: list[float], monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    harm(monkeypatch, "step", lambda worker: worker._step == 7 and worker._context.world_size == 4, fault)
    record = train_elastically(training("testbed.min_ranks=2"))
    assert len(record.losses) == len(undisturbed) == 9
    assert record.losses == pytest.approx(undisturbed, rel=1e-4)
    assert record.losses[-1] < record.losses[0] - 0.01
    assert (record.world_size, record.config["testbed"]["ranks"]) == (3, 4)
    assert record.step_time_s.n == 2  # steps 7 to 9 were run by three ranks, the first to warm up
    assert "rank 3" in record.notes[0] and "went on with 3 ranks from the last checkpoint" in record.notes[0]


def test_a_rank_lost_while_saving_leaves_the_checkpoint_before(
    undisturbed: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write = checkpoint.write_tensors

    def killed(folder: Path, tensors: object, group: object) -> None:
        if "00000006" in folder.name and os.environ["RANK"] == "3":
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder, tensors, group)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "write_tensors", killed)
    record = train_elastically(training("testbed.min_ranks=3", f"out={tmp_path}"))
    assert record.losses == pytest.approx(undisturbed, rel=1e-4)
    assert "rank 3 was ended by SIGKILL in save (checkpoint step-00000006" in record.notes[0]
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert not list(folder.glob("*.partial"))
    discard_checkpoints(training("testbed.min_ranks=3", f"out={tmp_path}"))
    assert list(tmp_path.rglob("*")) == [tmp_path / "checkpoints"]


def test_an_interrupted_training_goes_on_where_it_was(
    undisturbed: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = training(f"out={tmp_path}")
    with monkeypatch.context() as patched:
        harm(patched, "step", lambda worker: worker._step == 7, signal.SIGKILL)
        with pytest.raises(RankError, match="rank 3 was ended by SIGKILL in step"):
            train_elastically(config)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    newest = kept.latest(folder)
    assert newest is not None and newest.name == "step-00000006"
    # The newest one is damaged meanwhile: the one before it serves.
    file = max(newest.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    seen: list[str] = []
    record = train_elastically(config, seen.append)
    removed = "checkpoint step-00000006 was damaged and is removed; step-00000003 served"
    assert removed in seen and record.notes[0] == removed
    assert "step 4/9" in seen and "step 3/9" not in seen
    assert record.losses == pytest.approx(undisturbed, rel=1e-4)


def test_what_cannot_be_read_or_is_of_another_version_is_not_removed(tmp_path: Path) -> None:
    config = training(f"out={tmp_path}", "train.steps=4")
    train_elastically(config)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    newest = kept.latest(folder)
    assert newest is not None
    file = newest / "training.json"
    file.write_text(file.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(UsageError, match=r"cannot be read: it has format 3, not 2"):
        train_elastically(config)
    file.unlink()
    file.mkdir()  # reading it is an OSError
    with pytest.raises(UsageError, match=r"cannot be read: Is a directory"):
        train_elastically(config)
    assert newest.exists()


def test_a_damaged_curve_is_refused_before_it_is_trained_on(tmp_path: Path) -> None:
    config = training(f"out={tmp_path}", "train.steps=4")
    train_elastically(config)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    (folder / "curve.jsonl").write_text("nonsense\n")
    seen: list[str] = []
    with pytest.raises(UsageError, match=r"curve\.jsonl is damaged"):
        train_elastically(config, seen.append)
    assert not any(text.startswith("step") for text in seen)


def test_without_permission_the_error_is_raised_and_nothing_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    harm(monkeypatch, "step", lambda worker: worker._step == 4, signal.SIGKILL)
    with pytest.raises(RankError, match="rank 3 was ended by SIGKILL in step"):
        train_elastically(training())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        (["testbed.ranks=4", "testbed.min_ranks=1"], [3, 2, 1]),
        (["testbed.ranks=6", "testbed.min_ranks=2"], [4, 3, 2]),  # 5 ranks cannot share out 12 samples
        (["testbed.ranks=4", "impl=mics", "impl.options.partition_size=2", "testbed.min_ranks=1"], [2]),
        (["testbed.nodes=4", "testbed.ranks_per_node=1", "testbed.min_ranks=2"], [3, 2]),
        (
            ["testbed.nodes=3", "testbed.ranks_per_node=2", "testbed.ranks=6", "testbed.min_ranks=1"],
            [4, 2, 1],
        ),
        (["testbed.ranks=4"], []),
    ],
)
def test_the_next_smaller_world_shares_out_the_same_batch(words: list[str], ranks: list[int]) -> None:
    config: Config | None = load([*SMALL, "impl=zero3", *words])
    found = []
    while (config := with_fewer_ranks(config)) is not None:
        found.append(config.world_size)
        assert config.global_batch == 12 and config.testbed.nodes is not None
        assert config.testbed.nodes * config.ranks_per_node == config.world_size
    assert found == ranks


def test_an_implementation_without_checkpoints_is_refused() -> None:
    with pytest.raises(UsageError, match="ddp has no checkpoints here; use impl=zero3"):
        train_elastically(training("impl=ddp"))


def test_fewer_ranks_need_checkpoints() -> None:
    with pytest.raises(UsageError, match=r"give train\.checkpoint_every"):
        load(["testbed.min_ranks=2"])


def test_the_step_is_what_is_timed() -> None:
    """Saving lies between steps."""
    record = train_elastically(training("testbed.ranks=2", "train.steps=3", "train.checkpoint_every=1"))
    assert record.step_time_s.n == 3 and record.bytes_sent_per_rank is None
    assert StepMeasurement.__doc__ is not None and "until the loss is known" in StepMeasurement.__doc__
