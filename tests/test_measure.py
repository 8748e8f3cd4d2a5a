"""Measuring: implementations side by side, one failing without the others, noise seen and retried."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from suite.config import Config
from suite.config_load import load
from suite.errors import RankError, UsageError
from suite.harness import measure as measure_module
from suite.harness.measure import Failure, measure
from suite.harness.noise import Noise
from suite.harness.worker import Device, Resources, Worker
from suite.impls import registry
from suite.impls.trainer import MicroBatch, StepResult
from suite.records import Record

SMALL = ["workload.model.layers=2", "workload.model.hidden=64", "workload.model.intermediate=128"]
FAST = [*SMALL, "workload.data=synthetic", "train.steps=3", "train.warmup=1", "testbed.ranks=2"]


def configs(*names: str, more: Sequence[str] = ()) -> list[Config]:
    return [load([f"impl={name}", *FAST, *more]) for name in names]


def test_a_cohort_is_measured_on_the_same_training_and_differs_only_in_time() -> None:
    records = measure(configs("ddp", "fsdp2", more=["train.micro_steps=2"]))
    assert [record.impl for record in records if isinstance(record, Record)] == ["ddp", "fsdp2"]
    ddp, fsdp2 = records
    assert isinstance(ddp, Record) and isinstance(fsdp2, Record)
    assert ddp.losses == pytest.approx(fsdp2.losses, abs=1e-5)
    assert ddp.cohort == fsdp2.cohort and ddp.config_hash != fsdp2.config_hash
    assert len(ddp.step_times_s) == 3 == ddp.step_time_s.n
    assert len(ddp.losses) >= 4  # the warm-up step is in it
    assert ddp.evidence == "measured"
    assert ddp.samples_per_s == pytest.approx(2 * 2 * 2 / ddp.step_time_s.median)
    assert ddp.inter_node_bytes_per_node == 0
    # An all-reduce of fp32 gradients over two ranks sends each byte once.
    assert ddp.bytes_sent_per_rank == pytest.approx(4 * ddp.n_params, rel=0.02)
    assert ddp.peak_memory_bytes is not None and ddp.peak_memory_bytes > 4 * 4 * ddp.n_params
    assert ddp.env["packages"]["torch"] and ddp.config["impl"]["name"] == "ddp"


def test_the_floor_sends_nothing_but_its_loss() -> None:
    (record,) = measure(configs("floor"))
    assert isinstance(record, Record)
    assert record.bytes_sent_per_rank is not None and record.bytes_sent_per_rank < 1000


def test_activation_checkpointing_adds_hardware_flops_but_no_model_flops() -> None:
    (record,) = measure(configs("floor", more=["train.activation_checkpointing=true"]))
    assert isinstance(record, Record)
    assert record.hardware_tflops_per_gpu > 1.1 * record.model_tflops_per_gpu


def test_one_member_that_fails_leaves_the_others_to_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    original = registry.find("ddp").trainer

    def fails_in_its_third_step(*arguments: object) -> object:
        trainer = original(*arguments)  # type: ignore[arg-type]
        step, count = trainer.train_step, iter(range(100))

        def train_step(batches: Sequence[MicroBatch]) -> StepResult:
            if next(count) == 2:
                raise ArithmeticError("planted")
            return step(batches)

        monkeypatch.setattr(trainer, "train_step", train_step)
        return trainer

    entry = registry.find("ddp")
    monkeypatch.setitem(
        registry.IMPLEMENTATIONS,
        "ddp",
        type(entry)(entry.name, fails_in_its_third_step, entry.summary, entry.limits_on_cpu),  # type: ignore[arg-type]
    )
    failed, measured = sorted(measure(configs("ddp", "floor")), key=lambda item: isinstance(item, Record))
    assert isinstance(failed, Failure) and isinstance(failed.error, RankError)
    assert "ArithmeticError: planted" in str(failed.error)
    assert isinstance(measured, Record) and measured.impl == "floor" and measured.step_time_s.n == 3


def test_a_failure_does_not_keep_its_cohort_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    teams: list[weakref.ref[measure_module.Team]] = []

    def fails(team: measure_module.Team, say: object) -> None:
        teams.append(weakref.ref(team))
        raise RankError("rank 1 failed")

    monkeypatch.setattr(measure_module, "_warm_up", fails)
    gc.disable()  # it would find the cycles, some day
    try:
        (failure,) = measure(configs("floor"))
        assert isinstance(failure, Failure) and str(failure.error) == "rank 1 failed"
        assert [team() for team in teams] == [None]
    finally:
        gc.enable()


def test_a_busy_machine_is_measured_again_and_the_record_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy_at_first(before: object, after: object, attempts: int) -> Noise:
        return Noise(others=0.5 if attempts < 2 else 0.0, steal=0, ours=0.5, limit=0.1, attempts=attempts)

    monkeypatch.setattr(measure_module, "noise_between", busy_at_first)
    (record,) = measure(configs("floor"))
    assert isinstance(record, Record)
    assert record.noise["attempts"] == 2 and not record.noise["noisy"] and record.notes == []
    assert record.step_time_s.n == 3  # the noisy attempt's times are not among them

    monkeypatch.setattr(
        measure_module, "noise_between", lambda before, after, attempts: Noise(0.5, 0, 0.5, 0.1, attempts)
    )
    (record,) = measure(configs("floor"))
    assert isinstance(record, Record)
    assert record.noise["noisy"] and record.notes == [measure_module.NOISE_WARNING]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RankError("rank 1 was ended")])
def test_a_timeline_that_cannot_be_kept_loses_no_result(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object) -> Any:
        raise error

    monkeypatch.setattr(measure_module.Team, "timeline", fails)
    ddp, floor = measure(configs("ddp", "floor"))
    assert isinstance(ddp, Record) and isinstance(floor, Record)
    assert any(note.startswith("its timeline was not kept: ") for note in ddp.notes)


def test_configurations_that_train_differently_are_not_compared() -> None:
    cohort = [*configs("ddp"), *configs("floor", more=["train.seed=1"])]
    with pytest.raises(ValueError, match="may differ in their implementation only"):
        measure(cohort)


def test_a_member_with_wrong_input_is_left_out_before_its_ranks_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right, wrong = *configs("ddp"), *configs("hsdp", more=["impl.options.partition_size=3"])
    started, launch = [], measure_module.launch

    def noted(config: Config, *others: Any) -> Any:
        started.append(config.impl.name)
        return launch(config, *others)

    monkeypatch.setattr(measure_module, "launch", noted)
    record, failure = measure([right, wrong])
    assert isinstance(record, Record) and record.impl == "ddp" and started == ["ddp"]
    assert isinstance(failure, Failure) and isinstance(failure.error, UsageError)
    assert "partition_size=3 does not divide" in str(failure.error)


def test_the_share_of_the_peak_is_of_the_device_that_the_ranks_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "device", lambda worker: Device("Example 100", 2e-3, "flash_attention"))
    (record,) = measure(configs("floor", more=["train.activation_checkpointing=true"]))
    assert isinstance(record, Record)
    assert record.device == "Example 100" and record.attention == "flash_attention"
    assert record.mfu == pytest.approx(record.model_tflops_per_gpu / 2e-3)
    assert record.hfu == pytest.approx(record.hardware_tflops_per_gpu / 2e-3)
    assert record.hfu is not None and record.mfu is not None and record.hfu > record.mfu


def test_there_is_no_share_of_a_peak_where_ranks_have_different_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def device(worker: Worker) -> Device:
        return Device(f"Example {worker._context.rank}", 1.0, "flash_attention")

    monkeypatch.setattr(Worker, "device", device)
    (record,) = measure(configs("floor"))
    assert isinstance(record, Record) and record.mfu is None and record.hfu is None


def test_on_the_cpu_nothing_is_invented_about_a_device() -> None:
    (record,) = measure(configs("floor"))
    assert isinstance(record, Record)
    assert (record.device, record.peak_tflops, record.mfu, record.hfu) == (None, None, None, None)
    assert record.attention and "peak_reserved_bytes" not in record.details


def test_the_allocator_s_figures_are_the_worst_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    resources = Worker.resources

    def on_an_accelerator(worker: Worker) -> Resources:
        figures = {"peak_reserved_bytes": 100.0 * worker._context.rank, "alloc_retries": 1.0}
        return replace(resources(worker), allocator=figures)

    monkeypatch.setattr(Worker, "resources", on_an_accelerator)
    (record,) = measure(configs("floor"))
    assert isinstance(record, Record)
    assert record.details["peak_reserved_bytes"] == 100.0 and record.details["alloc_retries"] == 1.0
    assert record.details["host_step_s"] > 0
