"""Communication whose later messages depend on earlier ones, going on beside the compute.

Without a chain the later stage would start only when the compute comes to wait for the earlier one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from suite.impls.sharded.collectives import Transfer

Job = Callable[[], Sequence[Transfer]]
"""The earlier stages, waited for; returns the transfers of the last one."""


class Errand(ABC):
    """A job on its way. Only the thread and stream that submitted it may wait for it."""

    @abstractmethod
    def wait_stages(self) -> None:
        """Until its earlier stages are over; their buffers are given back."""

    @abstractmethod
    def wait(self) -> None:
        """Until its last transfers are over, too."""


def _nothing() -> None:
    pass


class Chain(ABC):
    """Runs jobs one after the other, in the order in which all ranks submit them, so that they cannot
    wait for each other in a circle."""

    @abstractmethod
    def run(self, job: Job, give_back: Callable[[], None] = _nothing) -> Errand:
        """`give_back` drops the buffers of the earlier stages. It is called when whoever allocates on
        the submitting stream can no longer overtake these stages."""

    @abstractmethod
    def close(self) -> None:
        """Ends what it holds; jobs that have not begun are dropped."""


def make_chain(device: torch.device) -> Chain:
    # The stream's kernels are few and small, and other ranks wait for what follows them.
    return Courier() if device.type == "cpu" else SideStream(torch.Stream(device, priority=-1))


class Courier(Chain):
    """On the CPU, a thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "courier")

    def run(self, job: Job, give_back: Callable[[], None] = _nothing) -> Errand:
        def whole() -> Sequence[Transfer]:
            transfers = job()
            give_back()
            return transfers

        return _Submitted(self._thread.submit(whole))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class _Submitted(Errand):
    def __init__(self, future: Future[Sequence[Transfer]]) -> None:
        self._future = future

    def wait_stages(self) -> None:
        self._future.result()

    def wait(self) -> None:
        for transfer in self._future.result():
            transfer.wait()


class SideStream(Chain):
    """On an accelerator, a stream: the job is queued there at once, and its later stage waits for the
    earlier one without holding up the compute or the host."""

    def __init__(self, stream: torch.Stream) -> None:
        self._stream = stream

    def run(self, job: Job, give_back: Callable[[], None] = _nothing) -> Errand:
        self._stream.wait_stream(torch.accelerator.current_stream())
        with self._stream:
            transfers = job()
            stages_over = self._stream.record_event()
            for transfer in transfers:
                transfer.wait()
            over = self._stream.record_event()
        return _Queued(stages_over, over, give_back)

    def close(self) -> None:
        """A stream holds nothing."""


class _Queued(Errand):
    def __init__(self, stages_over: torch.Event, over: torch.Event, give_back: Callable[[], None]) -> None:
        self._stages_over = stages_over
        self._over = over
        self._give_back = give_back

    def wait_stages(self) -> None:
        torch.accelerator.current_stream().wait_event(self._stages_over)
        self._give_back()

    def wait(self) -> None:
        torch.accelerator.current_stream().wait_event(self._over)
        self._give_back()
