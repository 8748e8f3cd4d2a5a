"""The noise figure: other processes count against a measurement, our own do not."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import replace

import pytest

from suite.harness.noise import CpuReading, noise_between, read_cpu
from suite.testbeds.local import cores, threads_per_rank


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_a_busy_process_of_others_is_noise_and_one_of_ours_is_not() -> None:
    before = read_cpu([])
    process = multiprocessing.get_context("fork").Process(target=spin, args=(1.0,))
    process.start()
    assert process.pid is not None
    ours_before = read_cpu([process.pid])
    time.sleep(0.8)
    as_ours = noise_between(ours_before, read_cpu([process.pid]), 1)
    as_others = noise_between(before, read_cpu([]), 1)
    process.join()
    one_core = 1 / cores()
    assert as_others.others > 0.5 * one_core
    assert as_ours.ours > 0.5 * one_core
    assert as_ours.others < as_others.others


def test_cores_that_we_may_not_use_are_not_ours_to_count() -> None:
    everything = os.sched_getaffinity(0)
    if len(everything) < 2:
        pytest.skip("needs two cores")
    one, other = sorted(everything)[:2]
    process = multiprocessing.get_context("fork").Process(target=spin, args=(1.0,))
    process.start()
    try:
        os.sched_setaffinity(process.pid or 0, {other})
        os.sched_setaffinity(0, {one})
        assert (cores(), threads_per_rank(2)) == (1, 1)
        before = read_cpu([])
        time.sleep(0.8)
        elsewhere = noise_between(before, read_cpu([]), 1)
    finally:
        os.sched_setaffinity(0, everything)
        process.join()
    assert elsewhere.others < 0.5


def test_a_measurement_is_noisy_beyond_the_limit_with_stolen_time_counted() -> None:
    all_cores = cores()
    start = CpuReading(at_s=0, busy_s=0, steal_s=0, ours_s=0)
    quiet = CpuReading(at_s=10, busy_s=9.5 * all_cores, steal_s=0, ours_s=9 * all_cores)
    stolen = CpuReading(at_s=10, busy_s=9.5 * all_cores, steal_s=1 * all_cores, ours_s=9 * all_cores)
    assert not noise_between(start, quiet, 1).noisy
    assert noise_between(start, stolen, 1).noisy


def test_a_machine_without_time_to_spare_is_noisy_only_where_that_matters() -> None:
    all_cores = cores()
    start = CpuReading(at_s=0, busy_s=0, steal_s=0, ours_s=0)
    # Our own work alone is within the limit; with the kernel's, for our packets, it is not.
    busy = CpuReading(
        at_s=10, busy_s=5 * all_cores, steal_s=0, ours_s=5 * all_cores, interrupts_s=2 * all_cores
    )
    noise = noise_between(start, busy, 1)
    assert not noise.noisy
    assert replace(noise, busy_limit=0.6).too_busy and replace(noise, busy_limit=0.6).noisy
    assert not replace(noise, busy_limit=0.8).noisy
    assert not replace(noise, busy_limit=0.6).disturbed
