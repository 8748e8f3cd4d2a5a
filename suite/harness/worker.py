"""One rank's program for a timed run: builds the workload and the implementation, then steps."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from suite.config import Config, TrainConfig
from suite.harness import traffic
from suite.harness.launch import scale_of
from suite.harness.memory import PeakMemory
from suite.impls import registry
from suite.impls.blocks import announce_blocks, block_stack
from suite.impls.trace import Span, Trace
from suite.impls.trainer import BuildModel, Recipe, Topology, Trainer
from suite.testbeds.testbed import RankContext
from suite.workloads.activations import activation_bytes
from suite.workloads.data import open_stream
from suite.workloads.models import build_model
from suite.workloads.pacing import Pacer


@dataclass(frozen=True)
class StepMeasurement:
    """One step on one rank; `seconds` from a barrier until the loss is known on the host.

    `computing_s` is the part of it in which the training thread did not wait for messages: it worked,
    or spent the modelled time of a paced block. None where nothing is paced.
    """

    seconds: float
    computing_s: float | None
    loss: float
    grad_norm: float


@dataclass(frozen=True)
class Resources:
    """What a rank used so far; `connections` as of this moment (see `suite.harness.traffic`),
    `details` as counted by the implementation itself."""

    peak_memory_bytes: int
    connections: list[traffic.Connection]
    details: dict[str, float]


def recipe_of(train: TrainConfig, activation_bytes: int | None = None) -> Recipe:
    """What the configuration asks of every implementation."""
    return Recipe(
        activation_bytes=activation_bytes,
        lr=train.lr,
        weight_decay=train.weight_decay,
        precision=train.precision,
        clip=train.clip,
        micro_steps=train.micro_steps,
    )


def model_builder(config: Config) -> BuildModel:
    """Builds the configured model with the same weights on every rank."""
    train, model = config.train, config.workload.model
    return lambda: build_model(model, train.seed, train.activation_checkpointing)


def make_pacer(config: Config, trace: Trace) -> Pacer | None:
    """What slows this rank's blocks down to the device that the testbed emulates, if it does."""
    scale = scale_of(config)
    return None if scale is None else Pacer(scale.block, trace)


def build_trainer(config: Config, context: RankContext, pacer: Pacer | None, trace: Trace) -> Trainer:
    """The configured implementation on this rank, training a paced model when there is a pacer; what it
    does goes into `trace`."""
    build = model_builder(config)

    def build_watched() -> nn.Module:
        model = build()
        if pacer is not None:
            pacer.pace(block_stack(model))
        announce_blocks(model, trace)
        return model

    topology = Topology(context.rank, context.world_size, context.ranks_per_node, context.device)
    activations = None
    if "auto" in config.impl.options.values():  # tracing takes a second, which others need not pay
        train = config.train
        activations = activation_bytes(
            config.workload.model,
            train.micro_batch,
            recipe_of(train).dtype,
            train.activation_checkpointing,
        )
    trainer = registry.build(
        config.impl.name,
        build_watched,
        recipe_of(config.train, activations),
        topology,
        config.impl.options,
    )
    trainer.record_into(trace)
    return trainer


class Worker:
    """Answers the calls of `suite.harness.measure` on one rank."""

    def __init__(self, config: Config, context: RankContext) -> None:
        self._config = config
        self._context = context
        self._memory = PeakMemory(context.device)
        self._stream = open_stream(config.workload, config.train.seed)
        self._trace = Trace(context.whereabouts.tell)
        self._pacer = make_pacer(config, self._trace)
        self._trainer = build_trainer(config, context, self._pacer, self._trace)
        self._step = 0

    def step(self) -> StepMeasurement:
        """One optimizer step. Making the batch is not part of the time."""
        train = self._config.train
        batches = self._stream.micro_batches(
            self._step,
            self._context.rank,
            self._context.world_size,
            train.micro_batch,
            train.micro_steps,
        )
        batches = [batch.to(self._context.device) for batch in batches]
        self._step += 1
        self._context.barrier()
        _synchronize(self._context.device)
        if self._pacer is not None:
            self._pacer.start_step()
        start = time.perf_counter()
        result = self._trainer.train_step(batches)
        _synchronize(self._context.device)
        seconds = time.perf_counter() - start
        computing_s = None if self._pacer is None else self._pacer.end_step()
        return StepMeasurement(seconds, computing_s, result.loss, result.grad_norm)

    def traced_step(self) -> list[Span]:
        """One optimizer step, and what happened in it on this rank."""
        self._trace.recording = True
        self.step()
        self._trace.recording = False
        return self._trace.spans

    def save(self, folder: Path, position: int) -> None:
        self._trainer.save(folder, position)

    def load(self, folder: Path) -> int:
        """Goes on from a checkpoint; returns how many steps it has behind it."""
        self._step = self._trainer.load(folder)
        return self._step

    def reset_peak_memory(self) -> None:
        self._memory.reset()

    def resources(self) -> Resources:
        return Resources(self._memory.read(), traffic.connections(), self._details())

    def _details(self) -> dict[str, float]:
        if self._pacer is None:
            return self._trainer.details()
        paced = {
            "paced_host_s": self._pacer.modelled_s,
            "pacing_overshoot_host_s": self._pacer.overshoot_s,
        }
        return {**self._trainer.details(), **paced}

    def partition_size(self) -> int | None:
        return self._trainer.partition_size

    def notes(self) -> list[str]:
        return self._trainer.notes

    def close(self) -> None:
        self._trainer.close()


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
