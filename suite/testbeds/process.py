"""One rank's process, as the process that forked it sees it."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import IO, Any, Protocol

from suite.testbeds.whereabouts import Sighting, Whereabouts

KILL_GRACE_S = 5.0


class Process(Protocol):
    """What can be asked about a rank; on another machine its parent is asked."""

    @property
    def pid(self) -> int: ...

    def ended(self) -> str:
        """How it came to its end; called when its channel is closed."""
        ...

    def join(self, timeout_s: float) -> None:
        """Waits until it is gone, so long at most."""
        ...

    def kill(self) -> None:
        """Ends it and all that it has started, without waiting for it."""
        ...

    def sighting(self) -> Sighting:
        """What it told last."""
        ...

    def ask_for_stack(self) -> None:
        """Makes it print where it is; one that is stopped by a signal prints nothing."""
        ...

    def stack(self) -> str:
        """What it has printed since it was asked."""
        ...

    def output(self) -> str:
        """The end of what it printed."""
        ...

    def close(self) -> None:
        """Forgets it and what it printed; called last, when it is gone."""
        ...


class ChildProcess:
    """A rank forked from this process; it prints into `log` and tells its `whereabouts`."""

    def __init__(self, process: Any, log: IO[bytes], whereabouts: Whereabouts) -> None:
        self._process = process
        self._pid: int = process.pid
        self._log = log
        self._whereabouts = whereabouts
        self._asked_at = 0

    @property
    def pid(self) -> int:
        return self._pid

    def ended(self) -> str:
        self._process.join(KILL_GRACE_S)
        code = self._process.exitcode
        return f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"exited with {code}"

    def join(self, timeout_s: float) -> None:
        self._process.join(timeout_s)

    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()  # it may not have got as far as having a group of its own

    def sighting(self) -> Sighting:
        return self._whereabouts.read()

    def ask_for_stack(self) -> None:
        self._asked_at = self._log_size()
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)

    def stack(self) -> str:
        return self._printed(self._asked_at)

    def output(self, lines: int = 15) -> str:
        return "\n".join(self._printed().splitlines()[-lines:])

    def close(self) -> None:
        self._log.close()
        # Its descriptor would stay open until the garbage collector comes by.
        with suppress(ValueError):  # not gone, whatever was tried
            self._process.close()

    def _printed(self, since: int = 0) -> str:
        # Not by seeking: the rank writes at the position that both share.
        return os.pread(self._log.fileno(), self._log_size() - since, since).decode(errors="replace").strip()

    def _log_size(self) -> int:
        return os.fstat(self._log.fileno()).st_size
