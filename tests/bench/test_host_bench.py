"""Host-side costs that grow with a model: planning a schedule, making a batch, counting FLOPs."""

from __future__ import annotations

from suite.config_load import load
from suite.impls.sharded.schedule import Event, Limits, Phase, Scheduler, plan
from suite.workloads.data import open_stream, prepare

LAYERS = 128


def micro_step() -> list[Event]:
    forward = [Event(phase, u) for u in range(LAYERS) for phase in (Phase.FORWARD, Phase.FORWARD_END)]
    order = reversed(range(LAYERS))
    return forward + [Event(phase, u) for u in order for phase in (Phase.BACKWARD, Phase.BACKWARD_END)]


def test_planning_a_model_of_128_layers(benchmark) -> None:  # type: ignore[no-untyped-def]
    schedule = benchmark(plan, micro_step(), [1] * LAYERS, Limits(4, 0))
    assert len(schedule.events) == 4 * LAYERS


def test_walking_a_cached_schedule_of_128_layers(benchmark) -> None:  # type: ignore[no-untyped-def]
    events, scheduler = micro_step(), Scheduler([1] * LAYERS, Limits(4, 0), cached=True)

    def walk() -> None:
        for event in events:
            scheduler.at(event)
        scheduler.end()

    benchmark(walk)
    assert scheduler.schedule is not None and scheduler.rerecorded == 0


def test_making_a_rank_s_batch(benchmark) -> None:  # type: ignore[no-untyped-def]
    workload = load(["workload=bert-tiny"]).workload
    prepare(workload, 64)
    stream = open_stream(workload, 0)
    (batch,) = benchmark(stream.micro_batches, 3, 1, 4, 16, 1)
    assert batch.input_ids.shape == (16, 64)
