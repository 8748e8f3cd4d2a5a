"""One rank's program for a timed run: builds the workload and the implementation, then steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from suite.config import Config, TrainConfig
from suite.harness import traffic
from suite.harness.launch import scale_of
from suite.harness.memory import PeakMemory
from suite.harness.peaks import peak_tflops
from suite.harness.timing import Stopwatch
from suite.impls import registry
from suite.impls.blocks import announce_blocks, block_stack
from suite.impls.trace import Log, Trace
from suite.impls.trainer import BuildModel, Recipe, Topology, Trainer
from suite.testbeds.network import INTERFACE
from suite.testbeds.testbed import RankContext
from suite.workloads.activations import activation_bytes
from suite.workloads.attention import attention_kernel
from suite.workloads.data import open_stream
from suite.workloads.models import build_model
from suite.workloads.pacing import PacedStep, Pacer


@dataclass(frozen=True)
class StepMeasurement:
    """One step on one rank; `seconds` from a barrier until the loss is known on the host: the host's,
    or on an accelerator its own (`host_s` is then the host's).

    `paced` says what went on meanwhile; None where nothing is paced.
    """

    seconds: float
    host_s: float
    paced: PacedStep | None
    loss: float
    grad_norm: float


@dataclass(frozen=True)
class Resources:
    """What a rank used so far; `connections` as of this moment (see `suite.harness.traffic`), none on an
    accelerator, whose messages take other ways; `memory_reads` (bytes by peer rank) and `details` as
    counted by the implementation itself, `allocator` by the accelerator's."""

    peak_memory_bytes: int
    connections: list[traffic.Connection]
    memory_reads: dict[int, int]
    details: dict[str, float]
    allocator: dict[str, float]


@dataclass(frozen=True)
class Device:
    """What a rank computes on, and how. `name` and `peak_tflops` are None on the CPU, the latter also
    for an accelerator that is not in the table of peaks."""

    name: str | None
    peak_tflops: float | None
    attention: str


def recipe_of(train: TrainConfig) -> Recipe:
    """What the configuration asks of every implementation."""
    return Recipe(
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
    return None if scale is None else Pacer(scale.block, trace, traffic.LinkCounter(INTERFACE).read)


def build_trainer(
    config: Config, recipe: Recipe, context: RankContext, pacer: Pacer | None, trace: Trace
) -> Trainer:
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
    if "auto" in config.impl.options.values():  # tracing takes a second, which others need not pay
        train = config.train
        activations = activation_bytes(
            config.workload.model, train.micro_batch, recipe.dtype, train.activation_checkpointing
        )
        recipe = replace(recipe, activation_bytes=activations)
    trainer = registry.build(config.impl.name, build_watched, recipe, topology, config.impl.options)
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
        self._trainer = build_trainer(config, recipe_of(config.train), context, self._pacer, self._trace)
        self._stopwatch = Stopwatch(context.device)
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
        if self._pacer is not None:
            self._pacer.start_step()
        self._stopwatch.start()
        result = self._trainer.train_step(batches)
        elapsed = self._stopwatch.stop()
        paced = None if self._pacer is None else self._pacer.end_step()
        return StepMeasurement(elapsed.seconds, elapsed.host_s, paced, result.loss, result.grad_norm)

    def traced_step(self) -> StepMeasurement:
        """One optimizer step with a log of what happens in it on this rank."""
        self._trace.restart()
        measured = self.step()
        self._trace.recording = False
        return measured

    def trace(self) -> Log:
        """Of the last traced step."""
        return self._trace.log

    def save(self, folder: Path, position: int) -> None:
        self._trainer.save(folder, position)

    def load(self, folder: Path) -> int:
        """Goes on from a checkpoint; returns how many steps it has behind it."""
        self._step = self._trainer.load(folder)
        return self._step

    def reset_peak_memory(self) -> None:
        self._memory.reset()

    def resources(self) -> Resources:
        self._trainer.settle()
        on_cpu = self._context.device.type == "cpu"
        connections = traffic.connections() if on_cpu else []
        return Resources(
            self._memory.read(),
            connections,
            self._trainer.memory_reads(),
            self._details(),
            self._memory.allocator(),
        )

    def device(self) -> Device:
        """Runs one block of the model to see what it computes with: not to be called while timing."""
        train, model, device = self._config.train, self._config.workload.model, self._context.device
        attention = attention_kernel(model, train.micro_batch, recipe_of(train).dtype, device)
        if device.type == "cpu":
            return Device(None, None, attention)
        name = torch.get_device_module(device).get_device_name(device)
        tf32 = torch.get_float32_matmul_precision() != "highest"
        return Device(name, peak_tflops(name, train.precision, tf32), attention)

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
