"""What must hold on every kind of device: the CPU, and an accelerator with SUITE_TEST_ACCELERATOR=1."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from devices import device_types
from engine_scenarios import Program as EngineProgram
from torch import Tensor

from suite.config import ModelConfig
from suite.errors import UsageError
from suite.harness.memory import PeakMemory, allocator_figures
from suite.harness.peaks import PEAKS, peak_tflops
from suite.harness.timing import Stopwatch
from suite.impls.sharded.collectives import Reduction
from suite.impls.sharded.native import NativeCollectives, gathers, start_as_one
from suite.impls.sharded.options import EngineOptions, UnoptimizedOptions
from suite.testbeds import devices
from suite.testbeds.local import LocalTestbed
from suite.testbeds.ranks import LocalRanks
from suite.testbeds.testbed import RankContext
from suite.workloads.attention import UNFUSED, attention_kernel
from suite.workloads.data import MaskedLMBatch


class Program(EngineProgram):
    """One rank on its device."""

    def __init__(self, context: RankContext) -> None:
        super().__init__(context)
        self._all = torch.arange(self._size, dtype=torch.float32, device=self._device)

    def _full(self, value: float, numel: int) -> Tensor:
        return torch.full((numel,), float(value), device=self._device)

    def native_collectives(self) -> bool:
        """Several buffers at once, results written where they belong, from the device's own memory."""
        native = NativeCollectives(dist.group.WORLD, self._rank, self._size)
        fulls = [self._full(torch.nan, self._size * n) for n in (3, 5)]
        native.all_gather(fulls, [self._full(self._rank, n) for n in (3, 5)]).wait()
        gathered = all(
            torch.equal(full, self._all.repeat_interleave(n)) for full, n in zip(fulls, (3, 5), strict=True)
        )
        shards = [self._full(1, n) for n in (3, 5)]
        pieces = [[(1, self._full(2, self._size * n - 1))] for n in (3, 5)]
        native.reduce_scatter([Reduction(s, p, True) for s, p in zip(shards, pieces, strict=True)]).wait()
        expected = [self._full(1 + 2 * self._size, n) for n in (3, 5)]
        for values in expected[: (self._rank == 0 and 2) or 0]:
            values[0] = 1  # no piece covers the first element of all
        total = self._full(self._rank, 4)
        native.all_reduce([total], torch.bfloat16).wait()
        return (
            gathered
            and all(map(torch.equal, shards, expected))
            and torch.equal(total, self._all.sum().expand(4))
        )

    def several_in_one_launch(self) -> bool:
        fulls = [self._full(torch.nan, self._size * n) for n in (3, 5)]
        calls = gathers(fulls, [self._full(self._rank, n) for n in (3, 5)], dist.group.WORLD)
        for work in start_as_one(calls, dist.group.WORLD):
            work.wait()
        return all(
            torch.equal(full, self._all.repeat_interleave(n)) for full, n in zip(fulls, (3, 5), strict=True)
        )

    def peak_of(self, megabytes: int) -> tuple[int, dict[str, float]]:
        memory = PeakMemory(self._device)
        memory.reset()
        before = memory.read()
        block = torch.ones(megabytes, 2**18, device=self._device)
        del block
        return memory.read() - before, memory.allocator()

    def elapsed(self, seconds: float) -> tuple[float, float, float | None]:
        watch = Stopwatch(self._device)
        watch.start()
        time.sleep(seconds)
        found = watch.stop()
        return found.seconds, found.host_s, found.device_s

    def batch_arrives(self) -> bool:
        tokens = torch.arange(12).view(3, 4)
        batch = MaskedLMBatch(tokens, tokens + 1, 0.5).to(self._device)
        return batch.input_ids.device.type == self._device.type and torch.equal(
            batch.labels.cpu(), tokens + 1
        )

    def attention(self, dtype: torch.dtype) -> str:
        return attention_kernel(ModelConfig(), 2, dtype, self._device)


@pytest.fixture(scope="module", params=device_types())
def ranks(request: pytest.FixtureRequest) -> Iterator[LocalRanks]:
    size = 2 if request.param == "cpu" else min(2, torch.accelerator.device_count())
    with LocalTestbed(size, size, device_type=request.param).launch(Program, 120) as running:
        yield running


@pytest.mark.parametrize("scenario", ["tied", "checkpointed", "odd shapes", "no blocks"])
@pytest.mark.parametrize("options", [EngineOptions(poison=True), UnoptimizedOptions(poison=True)], ids=type)
@pytest.mark.parametrize("partition_size", [None, 1])
def test_the_engine_gives_what_plain_torch_gives(
    ranks: LocalRanks, scenario: str, options: EngineOptions, partition_size: int | None
) -> None:
    answers = ranks.call("difference", scenario, "adamw", options, 2, 0.5, partition_size, timeout_s=60)
    assert max(answers) < 5e-5


def test_native_collectives_move_what_they_should(ranks: LocalRanks) -> None:
    assert all(ranks.call("native_collectives", timeout_s=60))
    assert all(ranks.call("several_in_one_launch", timeout_s=60))


def test_peak_memory_sees_what_was_there_for_a_moment(ranks: LocalRanks) -> None:
    for peak, allocator in ranks.call("peak_of", 64, timeout_s=60):
        assert 60 * 2**20 < peak < 80 * 2**20
        if allocator:
            assert allocator["peak_reserved_bytes"] >= allocator["peak_allocated_bytes"] >= 64 * 2**20
            assert 0 <= allocator["fragmentation"] < 1 and allocator["alloc_retries"] == 0


def test_a_step_is_timed_by_the_device_s_clock_where_there_is_one(ranks: LocalRanks) -> None:
    for seconds, host_s, device_s in ranks.call("elapsed", 0.05, timeout_s=60):
        assert 0.05 <= host_s < 0.5 and 0.045 <= seconds < 0.5
        assert seconds == (host_s if device_s is None else device_s)


def test_batches_arrive_whole(ranks: LocalRanks) -> None:
    assert all(ranks.call("batch_arrives", timeout_s=60))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_attention_kernel_is_found_by_running_it(ranks: LocalRanks, dtype: torch.dtype) -> None:
    (kernel,) = set(ranks.call("attention", dtype, timeout_s=60))
    assert "attention" in kernel or kernel == UNFUSED


def test_unfused_attention_is_called_by_its_name() -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        kernel = attention_kernel(ModelConfig(), 2, torch.float32, torch.device("cpu"))
    assert kernel == UNFUSED


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "expected"),
    [
        ("Tesla V100-SXM2-32GB", "fp16", False, 125),
        ("Tesla V100-PCIE-16GB", "fp16", False, 112),
        ("Tesla V100-SXM2-32GB", "bf16", False, None),
        ("Tesla V100-SXM2-32GB", "fp32", True, 15.7),
        ("NVIDIA A100-SXM4-80GB", "bf16", False, 312),
        ("NVIDIA A100-SXM4-40GB", "fp32", False, 19.5),
        ("NVIDIA A100-SXM4-40GB", "fp32", True, 156),
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989),
        ("NVIDIA H100 PCIe", "bf16", False, 756),
        ("NVIDIA H200 NVL", "bf16", False, 835),
        ("NVIDIA GH200 480GB", "bf16", False, 989),
        ("NVIDIA GB200", "bf16", False, 2500),
        ("NVIDIA B200", "bf16", False, 2250),
        ("NVIDIA L40S", "bf16", False, 362),
        ("NVIDIA L4", "bf16", False, 121),
        ("Some processor", "bf16", False, None),
    ],
)
def test_a_device_s_peak_is_that_of_its_form_and_of_the_precision(
    name: str, precision: str, tf32: bool, expected: float | None
) -> None:
    assert peak_tflops(name, precision, tf32) == expected


def test_every_peak_names_its_source() -> None:
    assert all(peak.source and peak.fp32 > 0 for peak in PEAKS)


def test_the_share_of_fragments_is_of_what_was_reserved() -> None:
    stats = {
        "reserved_bytes.all.peak": 1000,
        "allocated_bytes.all.peak": 700,
        "inactive_split_bytes.all.peak": 250,
        "num_alloc_retries": 3,
    }
    figures = allocator_figures(stats)
    assert figures["fragmentation"] == 0.25 and figures["alloc_retries"] == 3 and figures["ooms"] == 0
    assert allocator_figures({})["fragmentation"] == 0.0


def test_more_ranks_than_accelerators_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "accelerator_type", lambda: "cuda")
    monkeypatch.setattr(devices.torch.accelerator, "device_count", lambda: 2)
    devices.require_devices(2)
    with pytest.raises(UsageError, match="4 ranks need an accelerator each, and this host has 2"):
        devices.require_devices(4)


def test_a_rank_claims_its_own_device_and_tells_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(devices, "accelerator_type", lambda: "cuda")
    monkeypatch.setattr(devices.torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "0")
    device, backend = devices.claim_device(3)
    assert device == torch.device("cuda", 3) and chosen == [3]
    assert backend == "cuda:nccl,cpu:gloo"
    assert devices.os.environ["LOCAL_RANK"] == "3"
    assert devices.bound(device) == device and devices.bound(torch.device("cpu")) is None
