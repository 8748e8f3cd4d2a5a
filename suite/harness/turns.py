"""A cohort whose members do not fit into the machines together: each alone, in turns of several rounds
(A B C A B C), so that a slow drift of the machines meets all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from suite.config import Config
from suite.harness.launch import Place, testbed_of
from suite.harness.measure import Failure, Say, measure
from suite.records import Record, Spread

ROUNDS = 2
ALONE_NOTE = "started alone, in rounds, not step by step in turns with the others of its cohort"


def measure_alone(
    cohort: Sequence[Config], say: Say = lambda _: None, place: Place = testbed_of
) -> list[Record | Failure]:
    """As `suite.harness.measure.measure`, the timed steps dealt out to the rounds. A member that fails in
    one round is left out of the next."""
    found: dict[str, list[Record]] = {config.hash(): [] for config in cohort}
    failures: dict[str, Failure] = {}
    for number, steps in enumerate(_deal(cohort[0].train.steps), 1):
        for config in cohort:
            if config.hash() in failures:
                continue
            part = replace(config, train=replace(config.train, steps=steps))
            say(f"round {number} of {config.impl.name}")
            (result,) = measure([part], say, place)
            if isinstance(result, Record):
                found[config.hash()].append(result)
            else:
                failures[config.hash()] = Failure(config, result.error)
    measured = [config for config in cohort if config.hash() not in failures]
    first = min((found[config.hash()][0].cohort for config in measured), default="")
    return [
        *(_joined(config, found[config.hash()], first) for config in measured),
        *failures.values(),
    ]


def _deal(steps: int) -> list[int]:
    rounds = min(ROUNDS, steps)
    return [steps // rounds + (number < steps % rounds) for number in range(rounds)]


def _noisiness(noise: dict[str, Any]) -> tuple[bool, float]:
    return noise["noisy"], noise["others"] + noise["steal"]


def _joined(config: Config, rounds: Sequence[Record], cohort: str) -> Record:
    """One record from a member's rounds: all its times, the noisiest round's noise, the last round's rest."""
    times = [seconds for record in rounds for seconds in record.step_times_s]
    spread, last = Spread.of(times), rounds[-1]
    faster = last.step_time_s.median / spread.median
    peaks = [record.peak_memory_bytes for record in rounds if record.peak_memory_bytes is not None]
    return replace(
        last,
        step_time_s=spread,
        step_times_s=times,
        samples_per_s=last.samples_per_s * faster,
        model_tflops_per_gpu=last.model_tflops_per_gpu * faster,
        hardware_tflops_per_gpu=last.hardware_tflops_per_gpu * faster,
        mfu=None if last.mfu is None else last.mfu * faster,
        hfu=None if last.hfu is None else last.hfu * faster,
        peak_memory_bytes=max(peaks, default=None),
        noise=max((record.noise for record in rounds), key=_noisiness),
        notes=list(dict.fromkeys([ALONE_NOTE, *(note for record in rounds for note in record.notes)])),
        config=config.to_dict(),
        config_hash=config.hash(),
        started_at=rounds[0].started_at,
        cohort=cohort,
    )
