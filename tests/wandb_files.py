"""Reads what W&B wrote for an offline run, as `wandb sync` does."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER, CHUNK_HEADER = 32768, 7, 7


@dataclass
class OfflineRun:
    """Everything that a run file holds; `run` is W&B's own message."""

    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[Any] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    exit_code: int | None = None
    run: Any = None


def run_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def read_runs(folder: Path) -> dict[str, OfflineRun]:
    """All runs of a result folder, by job type."""
    runs = [read_run(file) for file in run_files(folder)]
    return {run.run.job_type: run for run in runs}


def read_run(file: Path) -> OfflineRun:
    from wandb.proto import wandb_internal_pb2

    found = OfflineRun()
    for data in _messages(file):
        message = wandb_internal_pb2.Record()
        message.ParseFromString(data)
        kind = message.WhichOneof("record_type")
        found.kinds.add(kind)
        if kind == "run":
            found.run = message.run
            found.config.update({item.key: json.loads(item.value_json) for item in message.run.config.update})
        elif kind == "summary":
            for item in message.summary.update:
                _put(found.summary, list(item.nested_key) or [item.key], json.loads(item.value_json))
        elif kind == "history":
            found.history.append({_name(item): json.loads(item.value_json) for item in message.history.item})
        elif kind == "metric":
            found.metrics.append(message.metric)
        elif kind == "artifact":
            found.artifacts.append(message.artifact)
        elif kind == "files":
            found.files += [item.path for item in message.files.files]
        elif kind == "exit":
            found.exit_code = message.exit.exit_code
    return found


def _name(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _messages(file: Path) -> Iterator[bytes]:
    """The messages of a W&B file: a LevelDB log (blocks of 32 KiB) after a 7-byte header."""
    data, position, message = file.read_bytes(), HEADER, b""
    while position + CHUNK_HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < CHUNK_HEADER:  # too short for a chunk's header: padding
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        start = position + CHUNK_HEADER
        message += data[start : start + length]
        position = start + length
        if kind in (1, 4):  # the whole message, or its last chunk
            yield message
            message = b""
