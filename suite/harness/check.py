"""Holds an implementation against plain single-process torch: gradients, parameters, norm, loss."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from suite.config import Config, TestbedConfig, TrainConfig
from suite.harness.environment import environment
from suite.harness.launch import Place, launch, prepare, step_timeout_s, testbed_of
from suite.harness.worker import build_trainer, make_pacer, model_builder, recipe_of
from suite.impls.trace import Trace
from suite.impls.trainer import MicroBatch, Recipe
from suite.records import CheckRecord
from suite.testbeds.devices import accelerator_type
from suite.testbeds.local import LocalTestbed
from suite.testbeds.testbed import RankContext
from suite.workloads.data import open_stream
from suite.workloads.reference import ReferenceRun, run_reference

STEPS = 5
EPS = 1e-5
"""AdamW's epsilon in a check. With the usual 1e-8 an update is the sign of the gradient, however small that
is: fp32's rounding, where it makes most of a gradient, then moves parameters by as much as everything
else does, and a gradient of twice its size would not be noticed."""
FP32_TOLERANCE = {
    "max_abs_grad_diff": 1e-6,
    "max_rel_grad_diff": 1e-5,
    "max_abs_param_diff": 2e-5,
    "max_replica_diff": 0.0,
    "max_loss_diff": 1e-5,
    # torch.linalg.vector_norm over millions of fp32 numbers is itself off by 4e-4 on the CPU
    # (docs/findings.md), and most implementations take their norm with it.
    "max_rel_grad_norm_diff": 1e-3,
}
OWN_ERROR_FACTOR = 3.0
"""bf16 rounds to 8 bits and fp16 to 11, and an accelerator adds up in another order, so no fixed limit
fits all models and depths. The limit is computed: this many times the error that plain single-process
torch in that precision, on that kind of device, makes itself against fp32 on the CPU. The room above 1
is for reductions that are rounded once per rank; a gradient lost or counted twice is an error of another
order."""


@dataclass(frozen=True)
class Differences:
    """The `max_*` fields of a CheckRecord, and which parameter is behind them."""

    max_abs_grad_diff: float
    max_rel_grad_diff: float
    max_abs_param_diff: float
    max_replica_diff: float
    max_loss_diff: float
    max_rel_grad_norm_diff: float
    worst: dict[str, str]

    def limits(self) -> dict[str, float]:
        return {key: getattr(self, key) for key in FP32_TOLERANCE}


def checked_recipe(train: TrainConfig) -> Recipe:
    return replace(recipe_of(train), eps=EPS)


class CheckWorker:
    """One rank's program: trains a few steps and compares with the reference in `folder`."""

    def __init__(self, config: Config, context: RankContext) -> None:
        self._config = config
        self._context = context
        self._stream = open_stream(config.workload, config.train.seed)
        trace = Trace(context.whereabouts.tell)
        self._trainer = build_trainer(
            config, checked_recipe(config.train), context, make_pacer(config, trace), trace
        )
        self._trainer.keep_gradients = True
        self._losses: list[float] = []
        self._grad_norms: list[float] = []
        self._gradients: dict[str, Tensor] = {}

    def step(self) -> None:
        train, context = self._config.train, self._context
        batches = self._stream.micro_batches(
            len(self._losses), context.rank, context.world_size, train.micro_batch, train.micro_steps
        )
        result = self._trainer.train_step([batch.to(context.device) for batch in batches])
        if self._trainer.keep_gradients:
            self._gradients = self._trainer.full_gradients()
            self._trainer.keep_gradients = False
        self._losses.append(result.loss)
        self._grad_norms.append(result.grad_norm)

    def compare(self, reference_file: str) -> Differences:
        parameters = self._trainer.full_parameters()
        run = ReferenceRun(self._gradients, parameters, self._losses, self._grad_norms)
        found = compare(run, ReferenceRun.load(Path(reference_file)))
        return replace(found, max_replica_diff=_replica_difference(parameters))

    def close(self) -> None:
        self._trainer.close()


class ChecksWorker:
    """One rank's program for many checks, one after the other."""

    def __init__(self, context: RankContext) -> None:
        self._context = context

    def run(self, config: Config, reference_file: str) -> Differences:
        worker = CheckWorker(config, replace(self._context, ranks_per_node=config.ranks_per_node))
        for _ in range(STEPS):
            worker.step()
        found = worker.compare(reference_file)
        self._context.barrier()  # nobody leaves while another one still receives
        worker.close()
        return found


class ReferenceWorker:
    """The reference, run in a process of its own so that the parent stays free to fork."""

    def __init__(self, config: Config, context: RankContext) -> None:
        self._config = config
        self._device = context.device
        self._tell = context.whereabouts.tell

    def run(self, precision: str, path: str) -> None:
        config = self._config
        stream = open_stream(config.workload, config.train.seed)

        def batches() -> Iterator[MicroBatch]:
            for step in range(STEPS):
                self._tell(f"reference step {step + 1}")
                yield stream.global_batch(step, config.global_batch).to(self._device)

        recipe = replace(checked_recipe(config.train), precision=precision)
        run_reference(model_builder(config), recipe, batches(), self._device).save(Path(path))


class References:
    """Reference runs, each made once for all implementations that train the same; in files, because
    ranks read them: below `shared` where they are on other machines. To be used as a context: leaving it
    removes them."""

    def __init__(self, shared: Path | None = None) -> None:
        if shared is not None:
            shared.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix="suite-check-", dir=shared)

    def __enter__(self) -> References:
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    def file(self, config: Config, precision: str, device_type: str | None = "cpu") -> Path:
        """The reference of this training in that precision, whatever the configuration's own; with
        `device_type` None on an accelerator, where there is one."""
        train = replace(config.train, precision=precision)
        ranks = TestbedConfig(ranks=config.world_size)  # how they stand does not matter
        key = Config(workload=config.workload, train=train, testbed=ranks).hash()
        path = Path(self._folder.name).resolve() / f"{key}-{device_type}.safetensors"
        if not path.exists():
            _write_reference(config, precision, device_type, path)
        return path


def check(config: Config, references: References | None = None, place: Place = testbed_of) -> CheckRecord:
    """Trains `STEPS` steps with the implementation and with plain torch and compares.

    Raises UsageError for wrong input, RankError when a rank fails.
    """
    if references is None:
        with References() as references:
            return check(config, references, place)
    prepare(config, place)
    started_at = _now()
    reference, tolerance = _expected(config, references, place(config).device_type)
    with launch(config, CheckWorker, place) as ranks:
        for step in range(STEPS):
            ranks.call("step", timeout_s=step_timeout_s(config, step))
        answers = ranks.call("compare", str(reference), timeout_s=config.testbed.startup_timeout_s)
    env = environment() | place(config).conditions()
    return _record(config, _worst_of(answers), tolerance, env, started_at)


def check_all(configs: Sequence[Config], references: References) -> Iterator[CheckRecord]:
    """The same of many configurations on this host, all of one world size: the same ranks check one
    after the other, which saves starting them. Its errors are those of `check`."""
    for config in configs:
        prepare(config)
    (world_size,) = {config.world_size for config in configs}
    testbed = LocalTestbed(world_size, world_size)
    expected = [_expected(config, references, testbed.device_type) for config in configs]
    with testbed.launch(ChecksWorker, configs[0].testbed.startup_timeout_s) as ranks:
        for config, (reference, tolerance) in zip(configs, expected, strict=True):
            started_at = _now()
            answers = ranks.call("run", config, str(reference), timeout_s=config.testbed.timeout_s)
            yield _record(config, _worst_of(answers), tolerance, environment(), started_at)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _expected(
    config: Config, references: References, device_type: str | None
) -> tuple[Path, dict[str, float]]:
    """The reference run, and how far from it an implementation may be."""
    reference = references.file(config, "fp32")
    precision = config.train.precision
    on_accelerator = device_type is None and accelerator_type() is not None
    tolerance = dict(FP32_TOLERANCE) if precision == "fp32" else dict.fromkeys(FP32_TOLERANCE, 0.0)
    if precision != "fp32" or on_accelerator:
        plain = references.file(config, precision, None if on_accelerator else "cpu")
        own_error = compare(ReferenceRun.load(plain), ReferenceRun.load(reference)).limits()
        tolerance = {key: max(limit, OWN_ERROR_FACTOR * own_error[key]) for key, limit in tolerance.items()}
    return reference, tolerance


def compare(run: ReferenceRun, reference: ReferenceRun) -> Differences:
    """How far `run` is from `reference`. Raises ValueError when they hold different parameters."""
    gradient, gradient_name = _largest_difference(run.gradients, reference.gradients)
    parameter, parameter_name = _largest_difference(run.parameters, reference.parameters)
    largest = max(tensor.abs().max().item() for tensor in reference.gradients.values())
    norms = zip(run.grad_norms, reference.grad_norms, strict=True)
    losses = zip(run.losses, reference.losses, strict=True)
    return Differences(
        max_abs_grad_diff=gradient,
        max_rel_grad_diff=gradient / largest,
        max_abs_param_diff=parameter,
        max_replica_diff=0.0,
        max_loss_diff=_max(abs(ours - theirs) for ours, theirs in losses),
        max_rel_grad_norm_diff=_max(abs(ours - theirs) / theirs for ours, theirs in norms),
        worst={"gradient": gradient_name, "parameter": parameter_name},
    )


def _write_reference(config: Config, precision: str, device_type: str | None, path: Path) -> None:
    alone = LocalTestbed(ranks=1, ranks_per_node=1, threads=1, device_type=device_type)
    with alone.launch(
        lambda context: ReferenceWorker(config, context), config.testbed.startup_timeout_s
    ) as ranks:
        ranks.call("run", precision, str(path), timeout_s=config.testbed.startup_timeout_s)


def _largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    if ours.keys() != theirs.keys():
        raise ValueError(f"parameters differ: {sorted(ours.keys() ^ theirs.keys())}")
    differences = {name: _nan_is_largest(ours[name] - theirs[name]) for name in theirs}
    worst = max(differences, key=differences.__getitem__)
    return differences[worst], worst


def _nan_is_largest(difference: Tensor) -> float:
    largest = difference.abs().max().item() if difference.numel() else 0.0
    return float("inf") if largest != largest else largest


def _max(values: object) -> float:
    return max(float("inf") if value != value else value for value in values)  # type: ignore[attr-defined]


def _replica_difference(parameters: dict[str, Tensor]) -> float:
    """Largest difference between any two ranks' copies of the same parameter element."""
    low = torch.cat([tensor.flatten() for tensor in parameters.values()])
    high = low.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return _nan_is_largest(high - low)


def _worst_of(answers: Sequence[Differences]) -> Differences:
    """The largest of every difference over all ranks."""
    worst_gradient = max(answers, key=lambda answer: answer.max_abs_grad_diff).worst["gradient"]
    worst_parameter = max(answers, key=lambda answer: answer.max_abs_param_diff).worst["parameter"]
    limits = {key: max(getattr(answer, key) for answer in answers) for key in FP32_TOLERANCE}
    return Differences(**limits, worst={"gradient": worst_gradient, "parameter": worst_parameter})


def _record(
    config: Config, found: Differences, tolerance: dict[str, float], env: dict[str, Any], started_at: str
) -> CheckRecord:
    ok = all(value <= tolerance[key] for key, value in found.limits().items())
    return CheckRecord(
        impl=config.impl.name,
        workload=config.workload.name,
        world_size=config.world_size,
        micro_steps=config.train.micro_steps,
        precision=config.train.precision,
        steps=STEPS,
        max_abs_grad_diff=found.max_abs_grad_diff,
        max_rel_grad_diff=found.max_rel_grad_diff,
        max_abs_param_diff=found.max_abs_param_diff,
        max_replica_diff=found.max_replica_diff,
        max_loss_diff=found.max_loss_diff,
        max_rel_grad_norm_diff=found.max_rel_grad_norm_diff,
        tolerance=tolerance,
        ok=ok,
        worst=found.worst,
        env=env,
        config=config.to_dict(),
        config_hash=config.hash(),
        started_at=started_at,
    )
