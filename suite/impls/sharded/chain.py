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
    """A job on its way."""

    @abstractmethod
    def wait_stages(self) -> None:
        """Until the job has returned: the buffers of its earlier stages are free."""

    @abstractmethod
    def wait(self) -> None:
        """Until its last transfers are over, too."""


class Chain(ABC):
    """Runs jobs one after the other, in the order in which all ranks submit them, so that they cannot
    wait for each other in a circle."""

    @abstractmethod
    def run(self, job: Job) -> Errand: ...

    @abstractmethod
    def close(self) -> None:
        """Ends what it holds; jobs that have not begun are dropped."""


def make_chain(device: torch.device) -> Chain:
    return Courier() if device.type == "cpu" else SideStream(device)


class Courier(Chain):
    """On the CPU, a thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "courier")

    def run(self, job: Job) -> Errand:
        return _Submitted(self._thread.submit(job))

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

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.Stream(device)

    def run(self, job: Job) -> Errand:
        self._stream.wait_stream(torch.accelerator.current_stream())
        with self._stream:
            for transfer in job():
                transfer.wait()
        return _Queued(self._stream.record_event())

    def close(self) -> None:
        """A stream holds nothing."""


class _Queued(Errand):
    def __init__(self, event: torch.Event) -> None:
        self._event = event

    def wait_stages(self) -> None:
        """The allocator reuses memory in the order of the streams: nothing to wait for."""

    def wait(self) -> None:
        torch.accelerator.current_stream().wait_event(self._event)
