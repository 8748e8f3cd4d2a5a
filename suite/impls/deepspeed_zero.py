"""DeepSpeed's ZeRO stages 1 to 3."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from torch import Tensor, nn

from suite.impls.blocks import largest_block_numel
from suite.impls.deepspeed_build import import_deepspeed
from suite.impls.options import Options
from suite.impls.trainer import BuildModel, MicroBatch, Recipe, Topology, Trainer

LARGE = 1_000_000_000
"""DeepSpeed's `stage3_max_reuse_distance` and `stage3_max_live_parameters`, unless it is told otherwise:
elements, beyond which its defaults release parameters."""
STAGE3_SIZES = "stage-3 sizes scaled to models below 1e9 parameters: the defaults hardly release any"


class DeepSpeedZero(Trainer):
    """`deepspeed.initialize` around a client `torch.optim.AdamW`, with DeepSpeed's own defaults for
    everything but the stage-3 sizes (see `stage3_sizes`).

    bf16 is DeepSpeed's `bf16.enabled`: weights are computed and, in stage 3, gathered in bf16;
    gradients are accumulated over micro-steps and reduced in bf16; masters and states are fp32 and
    start from the rounded weights.
    """

    def __init__(
        self,
        stage: int,
        build_model: BuildModel,
        recipe: Recipe,
        topology: Topology,
        options: Options,
    ) -> None:
        super().__init__(recipe, topology)
        self.partition_size = topology.world_size
        import_deepspeed(topology.device.type)
        model = build_model()
        self._start(model, {"stage": stage, **(stage3_sizes(model) if stage == 3 else {})})

    def _start(self, model: nn.Module, zero: dict[str, Any]) -> None:
        config = engine_config(self.recipe, zero)
        with contextlib.redirect_stdout(sys.stderr):
            import deepspeed

            model = self._shard(model, config)
            self._parameters = dict(model.named_parameters())
            optimizer = self.recipe.adamw(self._parameters.values())
            self._engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def _shard(self, model: nn.Module, config: dict[str, Any]) -> nn.Module:
        """What is done to the model before the optimizer is made; `deepspeed.initialize` does the rest.

        Stage 3 shards parameter by parameter here, as DeepSpeed advises for large models: `initialize` would
        move the whole model to the device first.
        """
        if config["zero_optimization"]["stage"] == 3:
            import deepspeed

            for parameter in model.parameters():
                parameter.data = parameter.to(self.recipe.dtype)
            for buffer in model.buffers():
                buffer.data = buffer.to(self.topology.device)
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
        return model

    def full_parameters(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return self._whole(safe_get_full_fp32_param)

    def _forward_backward(self, micro_batch: MicroBatch, last: bool) -> Tensor:
        loss = micro_batch.loss(self._engine)
        # DeepSpeed averages over the world and the micro-steps; the parts are to be added up.
        self._engine.backward(loss * (self.topology.world_size * self.recipe.micro_steps))
        if not last:
            self._engine.step()  # only counts the micro-step
        return loss.detach()

    def _read_gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        return self._whole(safe_get_full_grad)

    def _optimizer_step(self) -> tuple[Tensor | float, bool]:
        self._engine.step()
        return self._engine.get_global_grad_norm(), not self._engine.was_step_applied()

    def _whole(self, read: Any) -> dict[str, Tensor]:
        """Every parameter's tensor, as DeepSpeed assembles it from the shards (collective)."""
        tensors = {name: read(value) for name, value in self._parameters.items()}
        return {
            name: tensor.detach().float().cpu().clone()
            for name, tensor in tensors.items()
            if tensor is not None
        }

    def close(self) -> None:
        self._engine.destroy()


def engine_config(recipe: Recipe, zero: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed configuration for a recipe and a `zero_optimization` section."""
    return {
        # The real batch size is the workload's; this one only feeds DeepSpeed's own throughput log.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": recipe.micro_steps,
        "gradient_clipping": recipe.clip or 0.0,
        "steps_per_print": None,
        "bf16": {"enabled": recipe.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }


def stage3_sizes(model: nn.Module) -> dict[str, int]:
    """Stage 3's thresholds: none for a model that the defaults shard, otherwise scaled to the model.

    The defaults are for models of billions of parameters; one of a few million would be gathered
    once and then stay resident. Here nothing is kept resident or for reuse. What bounds the prefetch is
    the limit on live parameters: each submodule prefetches another bucket, and a parameter that the
    prefetch has passed by is not released. These two sizes were the fastest of those tried that
    gather (nearly) everything twice per micro-step (see docs/findings.md).
    """
    if sum(parameter.numel() for parameter in model.parameters()) > LARGE:
        return {}
    block = largest_block_numel(model)
    return {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": block // 2,
        "stage3_max_live_parameters": block + block // 2,
    }
