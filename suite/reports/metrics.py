"""One naming scheme for what is logged of a run, wherever it goes: W&B, TensorBoard."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from suite.records import Record

STEP = "train/step"
"""The axis of every other metric; counts from 1, warm-up included."""
LOSS = "train/loss"
GRAD_NORM = "train/grad_norm"
STEP_TIME = "perf/step_time_s"
SAMPLES = "perf/samples_per_s"
TFLOPS = "perf/model_tflops_per_gpu"

_LOGGED_APART = ("config", "losses", "grad_norms", "step_times_s")


def per_step(record: Record) -> list[dict[str, float]]:
    """A row per step; warm-up steps have a loss and a gradient norm but no time. What is no number (a
    record holds None for it) is left out. The curves of a run that was started anew for every round are those
    of the last one, to which the last of its times belong."""
    timed = min(len(record.step_times_s), len(record.losses) - record.config["train"]["warmup"])
    times, warmup = record.step_times_s[len(record.step_times_s) - timed :], len(record.losses) - timed
    rows = []
    for index, (loss, grad_norm) in enumerate(zip(record.losses, record.grad_norms, strict=True)):
        row: dict[str, float | None] = {STEP: index + 1, LOSS: loss, GRAD_NORM: grad_norm}
        if index >= warmup:
            row |= _speed(record, times[index - warmup])
        rows.append({key: value for key, value in row.items() if value is not None})
    return rows


def _speed(record: Record, seconds: float) -> dict[str, float | None]:
    """The record's rates belong to its median step."""
    share = record.step_time_s.median / seconds
    return {
        STEP_TIME: seconds,
        SAMPLES: record.samples_per_s * share,
        TFLOPS: record.model_tflops_per_gpu * share,
    }


def summary(record: Record) -> dict[str, Any]:
    """The record as it is; the curves and the configuration are logged as such."""
    return {key: value for key, value in asdict(record).items() if key not in _LOGGED_APART}
