"""Whatever is projected stays within what hardware can do, on conditions that are in no file here."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from suite.config import Config
from suite.projection.methods import METHODS
from suite.projection.project import Projection, project
from suite.projection.published_runs import projected_config

GROUPED = [name for name, method in METHODS.items() if method.groups]
CLUSTERS = ("p3dn", "p4d", "p4de", "p5", "p5en", "h100-ib", "b200-ib")
quickly = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@st.composite
def conditions(draw: st.DrawFn) -> Config:
    """Any method on any cluster; few layers, because what holds for a block holds for a stack."""
    name = draw(st.sampled_from(sorted(METHODS)))
    heads = draw(st.sampled_from([1, 12, 40, 96]))
    hidden = heads * draw(st.sampled_from([32, 64, 128]))
    shape = {
        "layers": draw(st.integers(1, 6)),
        "hidden": hidden,
        "heads": heads,
        "intermediate": hidden * draw(st.sampled_from([1, 4])),
        "vocab": draw(st.sampled_from([512, 50257])),
        "seq_len": draw(st.sampled_from([16, 512, 4096])),
    }
    nodes = draw(st.sampled_from([1, 2, 8, 64, 1000]))
    words = [f"workload.model.{key}={value}" for key, value in shape.items()]
    words += [
        f"impl={name}",
        f"cluster={draw(st.sampled_from(CLUSTERS))}",
        f"cluster.nodes={nodes}",
        f"train.micro_batch={draw(st.sampled_from([1, 3, 16]))}",
        f"train.micro_steps={draw(st.sampled_from([1, 4]))}",
        f"train.precision={draw(st.sampled_from(['bf16', 'fp16', 'fp32']))}",
        f"train.activation_checkpointing={draw(st.sampled_from(['true', 'false']))}",
    ]
    if name in GROUPED:
        sizes = [1, 4, 8] + [8 * nodes] * (nodes > 1)
        words.append(f"impl.options.partition_size={draw(st.sampled_from(sizes))}")
    return projected_config(words)


def on(config: Config, **changes: float) -> Projection:
    assert config.cluster is not None
    return project(replace(config, cluster=replace(config.cluster, **changes)))


@quickly
@given(conditions())
def test_no_step_is_faster_than_its_hardware(config: Config) -> None:
    step = project(config)
    assert 0 < step.share_of_peak < 1
    assert 0 < step.model_tflops_per_gpu <= step.hardware_tflops_per_gpu
    assert step.exposed_s >= -1e-9 and step.compute_s <= step.step_s * (1 + 1e-9)
    assert all(0 <= busy <= step.step_s * (1 + 1e-9) for busy in step.communication_s.values())
    cluster = config.cluster
    assert cluster is not None
    assert step.node_bytes / step.step_s <= cluster.inter_node_gbit_s * 1e9 / 8


@quickly
@given(conditions(), st.sampled_from(["inter_node_gbit_s", "intra_node_gb_s", "memory_gb_s", "peak_tflops"]))
def test_nothing_gets_faster_with_less_of_something(config: Config, resource: str) -> None:
    now = getattr(config.cluster, resource)
    assert on(config, **{resource: now / 4}).step_s >= project(config).step_s * (1 - 1e-9)


@quickly
@given(conditions())
def test_more_latency_never_helps(config: Config) -> None:
    assert on(config, inter_node_latency_us=500.0).step_s >= project(config).step_s * (1 - 1e-9)


@quickly
@given(conditions())
def test_fixed_work_per_gpu_is_no_faster_on_more_of_them(config: Config) -> None:
    """Kept partition groups do not change; groups that are the world share the optimizer's work among
    more ranks, so only what is computed before it is compared."""
    assert config.cluster is not None
    small, large = project(config), on(config, nodes=4 * config.cluster.nodes)
    if small.partition_size is not None and small.partition_size == large.partition_size:
        assert large.step_s >= small.step_s * (1 - 1e-9)
    else:
        gained = small.compute_s - large.compute_s
        assert large.step_s + gained >= small.step_s * (1 - 1e-9)


@quickly
@given(conditions())
def test_memory_holds_the_model_and_more_samples_take_more(config: Config) -> None:
    step = project(config)
    more = replace(config, train=replace(config.train, micro_batch=config.train.micro_batch + 1))
    assert project(more).memory.total > step.memory.total
    assert step.memory.states * step.world_size >= 16 * 0.99 * step.n_params, "shared by all at most"


@pytest.mark.parametrize(("impl", "gpus"), [("fsdp2", 1024), ("deepspeed-zero3", 1024), ("hsdp", 1024)])
def test_a_gpt_3_sized_model_on_current_hardware_is_plausible(impl: str, gpus: int) -> None:
    words = [f"impl={impl}", "workload=bert-175b", "workload.model.vocab=50257", "cluster=h100-ib"]
    step = project(projected_config([*words, f"cluster.nodes={gpus // 8}", "train.micro_batch=4"]))
    assert step.memory.fits
    assert 0.25 < step.model_tflops_per_gpu / 989 < 0.6


def test_fp32_takes_twice_the_bytes_and_more_than_twice_the_time() -> None:
    words = ["impl=zero3", "workload=bert-10b", "cluster=p4d", "cluster.nodes=8", "train.micro_batch=4"]
    half, full = (project(projected_config([*words, f"train.precision={p}"])) for p in ("fp16", "fp32"))
    assert full.node_bytes == pytest.approx(2 * half.node_bytes, rel=1e-3)
    assert full.step_s > 4 * half.step_s
    assert full.memory.activations > 1.5 * half.memory.activations
