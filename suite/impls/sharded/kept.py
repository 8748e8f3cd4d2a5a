"""The checkpoints under a folder: which is the newest whole one, and which are to be removed.

For one process, while nobody saves there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from suite.errors import UsageError
from suite.impls.sharded.manifest import TRAINING, Damaged, read_training, reason, verify

PARTIAL = ".partial"
"""Ends the name of a checkpoint that is still being written."""


def latest(root: Path) -> Path | None:
    """The complete checkpoint under `root` whose name comes last, if there is one."""
    return max(_complete(root), key=lambda folder: folder.name, default=None)


def discard_damaged(root: Path) -> list[Path]:
    """Removes the complete checkpoints after the last one whose files are as they were written, and returns
    their folders. For one process: it reads them all through. Raises UsageError
    for one that cannot be read or is of another version: that is no damage, and it stays."""
    damaged = []
    for folder in sorted(_complete(root), reverse=True):
        try:
            verify(folder, read_training(folder).files)
            break
        except Damaged:
            damaged.append(folder)
            shutil.rmtree(folder)
        except (OSError, UsageError) as error:
            raise UsageError(f"checkpoint {folder} cannot be read: {reason(error)}") from error
    return damaged


def keep_newest(root: Path, count: int) -> None:
    """Removes all complete checkpoints under `root` but the last ones."""
    for folder in sorted(_complete(root))[:-count]:
        shutil.rmtree(folder, ignore_errors=True)


def discard_unfinished(root: Path) -> None:
    """Removes what saves that were killed have left under `root`; nobody may be saving there."""
    for folder in root.glob(f"*{PARTIAL}"):
        shutil.rmtree(folder, ignore_errors=True)


def _complete(root: Path) -> list[Path]:
    return [file.parent for file in root.glob(f"*/{TRAINING}") if not file.parent.name.endswith(PARTIAL)]
