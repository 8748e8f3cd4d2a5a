"""Optimised ZeRO-3: the engine with one partition group, the world."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from torch import Tensor

from suite.impls.sharded import checkpoint, shard
from suite.impls.sharded.options import EngineOptions
from suite.impls.trace import Kind, Trace
from suite.impls.trainer import BuildModel, MicroBatch, Recipe, Topology, Trainer


class Zero3(Trainer):
    """Parameters, gradients and optimizer states sharded over the world (S1), or, where the options
    say so, over smaller partition groups.

    bf16 and fp16: weights are gathered and gradients sent in that dtype; a shard's gradients are
    added up in fp32; masters and AdamW states are fp32.
    """

    def __init__(
        self, build_model: BuildModel, recipe: Recipe, topology: Topology, options: EngineOptions
    ) -> None:
        super().__init__(recipe, topology)
        assert isinstance(options.partition_size, int), "resolve() fills in the partition size"
        self.partition_size = options.partition_size
        model = build_model()
        self.engine = shard(
            model,
            recipe.adamw(model.parameters()),
            precision=recipe.precision,
            clip=recipe.clip,
            partition_size=options.partition_size,
            ranks_per_node=topology.ranks_per_node,
            device=topology.device,  # where the model is moved unit by unit, never as a whole
            options=options,
        )

    def full_parameters(self) -> dict[str, Tensor]:
        return dict(self.engine.full_parameters())

    def _forward_backward(self, micro_batch: MicroBatch, last: bool) -> Tensor:
        loss = micro_batch.loss(self.engine.model)
        self.engine.backward(loss, last)
        return loss.detach()

    def _read_gradients(self) -> dict[str, Tensor]:
        return dict(self.engine.full_gradients())

    def _optimizer_step(self) -> tuple[Tensor | float, bool]:
        norm = self.engine.step()
        return norm, self.engine.skipped

    def save(self, folder: Path, position: int = 0) -> None:
        self.trace.at(f"checkpoint {folder.name}")
        saving = self._checkpointer.save(folder, position)
        with self.trace.span(Kind.WAIT, "all ranks' writing"):
            saving.wait()

    def load(self, folder: Path) -> int:
        return checkpoint.load(folder, self.engine)

    @cached_property
    def _checkpointer(self) -> checkpoint.Checkpointer:
        return checkpoint.Checkpointer(self.engine)

    def record_into(self, trace: Trace) -> None:
        super().record_into(trace)
        self.engine.record_into(trace)

    def settle(self) -> None:
        self.engine.finish_refresh()

    def memory_reads(self) -> dict[int, int]:
        return self.engine.memory_reads

    def details(self) -> dict[str, float]:
        statistics = self.engine.statistics
        return {
            "deciding_s": statistics.deciding_s,
            "gathered_bytes": float(statistics.gathered_bytes),
            "expected_inter_node_bytes": self.engine.expected_inter_node_bytes,
            "skipped_steps": float(statistics.skipped_steps),
        }

    def close(self) -> None:
        if "_checkpointer" in vars(self):  # made with the first save
            self._checkpointer.close()
        self.engine.close()
