"""What takes long to make and is kept for the next time: where it lies, and who may make it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from suite.errors import UsageError


def cache_folder(kind: str) -> Path:
    """`$SUITE_CACHE/<kind>`, by default below the user's XDG cache folder."""
    chosen = os.environ.get("SUITE_CACHE")
    if chosen:
        return Path(chosen).expanduser() / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sharded-suite" / kind


@contextmanager
def making(lock: Path) -> Iterator[None]:
    """The right to make what lies beside that file; the system gives it back when its holder dies. Raises
    UsageError where nothing can be written."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise UsageError(
            f"cannot write to the cache folder {lock.parent} ({error.strerror}); "
            "set SUITE_CACHE to a folder that can be written"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
