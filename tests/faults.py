"""Planted faults, and the proof that nothing was left behind: what several tests of failures share."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

TOKEN = "SUITE_TEST_TOKEN"


def processes_with(token: str) -> list[int]:
    """Living processes that were started with the token in their environment, or forked from such."""
    found = []
    for pid in _living():
        with suppress(OSError):
            if f"{TOKEN}={token}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def descendants(pid: int) -> list[int]:
    """All living children of a process, and theirs."""
    parents, found = _living(), [pid]
    for candidate in found:
        found += [child for child, parent in parents.items() if parent == candidate]
    return found[1:]


def _living() -> dict[int, int]:
    """Parents by process id; a zombie is gone for everybody but its parent."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(folder.name)] = int(parent)
    return parents


def becomes_true(condition: object, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@dataclass
class Place:
    """Where a command may leave something: a token that marks its processes, an own temporary folder."""

    token: str
    folder: Path
    temporary: Path

    def environment(self, **more: str) -> dict[str, str]:
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(self.folder / "cache")}  # torch's own, and meant to stay
        return {**os.environ, TOKEN: self.token, "TMPDIR": str(self.temporary), **cache, **more}

    def left_behind(self) -> list[str]:
        """Processes, temporary files and half-written files, once a killed process had time to go."""
        becomes_true(lambda: not processes_with(self.token))
        return [
            *(f"process {pid}" for pid in processes_with(self.token)),
            *(str(path) for path in self.temporary.iterdir()),
            *(str(path) for path in self.folder.rglob("*.partial")),
            *(str(path) for path in self.folder.rglob("*.lock")),
        ]


@contextmanager
def place(folder: Path) -> Iterator[Place]:
    """Everything that still runs there is ended at the end."""
    temporary = folder / "tmp"
    temporary.mkdir(parents=True)
    here = Place(f"{os.getpid()}-{time.monotonic_ns()}", folder, temporary)
    try:
        yield here
    finally:
        for pid in processes_with(here.token):
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
