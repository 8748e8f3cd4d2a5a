"""Memory of one stream that another one still uses: given back only where its own stream has waited."""

from __future__ import annotations

import weakref

import pytest
import torch

from suite.impls.sharded import chain
from suite.impls.sharded.chain import SideStream
from suite.impls.sharded.collectives import Handle


class Stream:
    """Notes what it is told to do, in order."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.log: list[object] = []

    def wait_stream(self, other: Stream) -> None:
        self.log.append(other.name)

    def record_event(self) -> str:
        self.log.append("event")
        return f"event {self.log.count('event')} of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(event)

    def __enter__(self) -> None:
        self.log.append("begin")

    def __exit__(self, *error: object) -> None:
        self.log.append("end")


class Transfer:
    def __init__(self, log: list[object]) -> None:
        self._log = log

    def wait(self) -> None:
        self._log.append("transfer")


@pytest.fixture
def compute(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream("compute")
    monkeypatch.setattr(chain.torch.accelerator, "current_stream", lambda: stream)
    return stream


def test_a_side_stream_waits_for_the_compute_and_the_compute_waits_for_no_more_than_it_asks(
    compute: Stream,
) -> None:
    side = Stream("side")
    errand = SideStream(side).run(lambda: [Transfer(side.log)])  # type: ignore[arg-type]
    assert side.log == ["compute", "begin", "event", "transfer", "event", "end"]
    assert compute.log == []
    errand.wait_stages()
    assert compute.log == ["event 1 of side"]
    errand.wait()
    assert compute.log == ["event 1 of side", "event 2 of side"]


@pytest.mark.parametrize("wait", ["wait_stages", "wait"])
def test_buffers_of_the_earlier_stages_are_kept_until_the_compute_has_waited_for_them(
    compute: Stream, wait: str
) -> None:
    side = Stream("side")
    given_back: list[list[object]] = []
    errand = SideStream(side).run(lambda: (), lambda: given_back.append(list(compute.log)))  # type: ignore[arg-type]
    assert given_back == []
    getattr(errand, wait)()
    ((before,),) = given_back
    assert str(before).endswith("of side")


def test_a_handle_that_is_joined_elsewhere_holds_its_buffers_until_it_is_told_to_forget_them() -> None:
    buffer = torch.ones(3)
    gone = weakref.ref(buffer)
    results: list[float] = []

    def handle_of(tensor: torch.Tensor) -> Handle:
        return Handle((), lambda: results.append(tensor.sum().item()), keep=[tensor])

    handle = handle_of(buffer)
    del buffer
    handle.join()
    handle.join()
    assert results == [3.0] and gone() is not None
    handle.forget()
    assert gone() is None
