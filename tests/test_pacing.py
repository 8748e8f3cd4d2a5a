"""Paced blocks take the modelled time and change nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from suite.config_load import load
from suite.impls.blocks import block_stack
from suite.impls.trace import Kind, Trace
from suite.workloads.data import open_stream
from suite.workloads.models import build_model
from suite.workloads.pacing import Pacer
from suite.workloads.scale_model import BlockTimes

TIMES = BlockTimes(forward_s=0.02, backward_s=0.05)
CONFIG = load(
    [
        "workload.model.layers=3",
        "workload.model.hidden=32",
        "workload.model.intermediate=64",
        "workload.model.vocab=128",
        "workload.model.seq_len=8",
        "workload.data=synthetic",
    ]
)
LAYERS = CONFIG.workload.model.layers


def model_and_pacer(
    family: str, checkpointing: bool, times: BlockTimes, trace: Trace
) -> tuple[nn.Module, Pacer]:
    CONFIG.workload.model.family = family
    model, pacer = build_model(CONFIG.workload.model, 0, checkpointing), Pacer(times, trace)
    pacer.pace(block_stack(model))
    return model, pacer


def step(model: nn.Module) -> dict[str, Tensor | None]:
    open_stream(CONFIG.workload, 0).global_batch(0, 16).loss(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_names_and_gradients_are_bit_identical(family: str, checkpointing: bool) -> None:
    paced, _ = model_and_pacer(family, checkpointing, BlockTimes(1e-4, 1e-4), Trace())
    plain = step(build_model(CONFIG.workload.model, 0, checkpointing))
    found = step(paced)
    assert list(found) == list(plain)
    for name, gradient in plain.items():
        other = found[name]
        assert gradient is not None and other is not None and gradient.any(), name
        assert torch.equal(gradient, other), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_paced_step_takes_what_the_model_says(checkpointing: bool) -> None:
    model, pacer = model_and_pacer("bert", checkpointing, TIMES, Trace())
    step(model)  # what is done only once (imports, buffers) may take longer than a block
    before, overshoot = pacer.modelled_s, pacer.overshoot_s
    pacer.start_step()
    start = time.perf_counter()
    step(model)
    taken, computing = time.perf_counter() - start, pacer.end_step().computing_s
    forwards = 2 if checkpointing else 1
    modelled = LAYERS * (forwards * TIMES.forward_s + TIMES.backward_s)
    assert pacer.modelled_s - before == pytest.approx(modelled)
    # Nothing is waited for, and only what follows the last sleep is not taken off any.
    assert taken == pytest.approx(computing, abs=0.05)
    assert modelled <= computing < modelled + 0.02
    assert pacer.overshoot_s - overshoot == pytest.approx(computing - modelled)


def spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_real_work_is_part_of_the_modelled_time_and_waiting_is_not() -> None:
    pacer = Pacer(TIMES, Trace())
    pacer.start_step()
    start = time.perf_counter()
    spin(0.05)
    time.sleep(0.1)  # as for a message
    pacer.spend(0.08, "forward 0")
    taken = time.perf_counter() - start
    assert taken == pytest.approx(0.18, abs=0.05)
    assert pacer.end_step().computing_s == pytest.approx(0.08, abs=0.05)


def test_work_beyond_the_modelled_time_is_taken_off_later_blocks_and_else_is_overshoot() -> None:
    pacer = Pacer(TIMES, Trace())
    pacer.start_step()
    spin(0.05)
    pacer.spend(0.02, "forward 0")
    pacer.spend(0.04, "forward 1")
    assert pacer.overshoot_s == 0
    assert pacer.end_step().computing_s == pytest.approx(0.06, abs=0.05)
    assert pacer.overshoot_s == pytest.approx(0, abs=0.05)
    pacer.start_step()
    spin(0.05)
    pacer.spend(0.02, "forward 0")
    pacer.end_step()
    assert pacer.overshoot_s == pytest.approx(0.03, abs=0.05)


def phases(trace: Trace) -> Iterator[str]:
    assert all(span.kind is Kind.COMPUTE and span.end_s > span.start_s for span in trace.spans)
    return (span.name for span in trace.spans)


def test_the_trace_names_every_phase_of_every_block_in_order() -> None:
    trace = Trace()
    model, _ = model_and_pacer("bert", True, BlockTimes(1e-4, 1e-4), trace)
    step(model)
    assert trace.spans == []
    trace.recording = True
    step(model)
    assert list(phases(trace)) == [
        *(f"forward {block}" for block in range(LAYERS)),
        *(f"{what} {block}" for block in reversed(range(LAYERS)) for what in ("backward", "recompute")),
    ]


def test_other_threads_run_while_a_block_is_paced() -> None:
    """What holds for a counting thread holds for those that move messages."""
    import threading

    pacer, counted, running = Pacer(TIMES, Trace()), 0, True

    def count() -> None:
        nonlocal counted
        while running:
            counted += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = counted
    pacer.spend(0.1, "forward 0")
    during = counted - before
    running = False
    thread.join()
    assert during > 1000
