"""`training.json`: all of a checkpoint that is not a tensor, and what its files must look like.

It comes from a file that somebody else may have written or damaged, so nothing in it is taken on trust.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from suite import typed
from suite.errors import UsageError, first_line

FORMAT = 2
TRAINING = "training.json"
KERNEL_CHOICES = ("fused", "foreach", "capturable", "differentiable")
"""Of an optimizer: they suit a device, and the one that loads may be another than the one that saved."""
_CHUNK = 1 << 22

T = TypeVar("T")


class Damaged(UsageError):
    """A checkpoint that is not as it was written."""


@dataclass(frozen=True)
class Training:
    """`position` counts what was consumed of the data; `ranks` and `device` say whose random states there
    are. `states`: the optimizer's, by name, and whether each is a scalar; `stateful`: which of them a
    parameter has (None: all); `groups`: the settings of the optimizer's groups; `buffers`: whether there are
    the model's. `files`: size in bytes and CRC-32 of every other file of the checkpoint."""

    position: int
    ranks: int
    device: str | None
    states: dict[str, bool]
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any] | None
    loss_scale: dict[str, Any] | None = None
    files: dict[str, list[int]] = field(default_factory=dict)
    stateful: dict[str, list[str]] | None = None
    buffers: bool = False
    format: int = FORMAT

    def __post_init__(self) -> None:
        for parameter, keys in (self.stateful or {}).items():
            if unknown := set(keys) - self.states.keys():
                raise ValueError(f"{parameter} has an unknown state {min(unknown)!r}")

    def states_of(self, parameter: str) -> dict[str, bool]:
        """The names of its states, and whether each is a scalar."""
        keys = self.states if self.stateful is None else self.stateful.get(parameter, ())
        return {key: self.states[key] for key in keys}


def merged(trainings: Sequence[Training]) -> Training:
    """All ranks' as one: each knows only the states of what it owns."""
    states: dict[str, bool] = {}
    stateful: dict[str, list[str]] = {}
    for training in trainings:
        stateful |= training.stateful or {}
        for key, is_scalar in training.states.items():
            states[key] = is_scalar or states.get(key, False)
    return replace(trainings[0], states=states, stateful=stateful)


def write_training(folder: Path, training: Training) -> None:
    (folder / TRAINING).write_text(json.dumps(asdict(training), indent=1))


def read_training(folder: Path) -> Training:
    """Raises UsageError, without the folder's name, when there is none, or not one of this format; Damaged
    when it is not as it was written, OSError when it cannot be read."""
    try:
        content = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("format") != FORMAT:
            raise UsageError(f"it has format {content.get('format')!r}, not {FORMAT}")
        return typed.build(Training, content)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError("it is not there, or not complete") from error
    except (ValueError, KeyError, RecursionError) as error:
        raise Damaged(f"{TRAINING} is damaged ({error})") from error


PAIRS = "(key, value) pairs"
"""In JSON, a mapping with other keys than text: MultiStepLR's milestones, say."""


def to_json(value: Any) -> Any:
    """A copy of a scheduler's state that JSON can hold. Raises UsageError for what it cannot."""
    if isinstance(value, dict):
        items = [[key, to_json(item)] for key, item in value.items()]
        return dict(items) if all(isinstance(key, str) for key in value) else {PAIRS: items}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise UsageError(f"the scheduler's state holds a {type(value).__name__}, which cannot be saved as JSON")


def from_json(value: Any) -> Any:
    """Mappings with other keys than text come back as counters, which torch's schedulers have there."""
    if isinstance(value, dict) and value.keys() == {PAIRS}:
        return Counter({key: from_json(item) for key, item in value[PAIRS]})
    if isinstance(value, dict):
        return {key: from_json(item) for key, item in value.items()}
    return [from_json(item) for item in value] if isinstance(value, list) else value


def tensor_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != TRAINING)


def fingerprints(files: Iterable[Path]) -> dict[str, list[int]]:
    """Size and CRC-32 by name: against accidents, not against forgery."""
    return {path.name: _fingerprint(path) for path in files}


def verify(folder: Path, files: Mapping[str, list[int]]) -> None:
    """Raises Damaged for the first file that is missing or not what was written."""
    for name, expected in files.items():
        if Path(name).name != name:
            raise Damaged(f"{TRAINING} names a file elsewhere ({name!r})")
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        if len(expected) != 2:
            raise Damaged(f"{TRAINING} has no size and checksum of {name}")
        if path.stat().st_size != expected[0]:
            raise Damaged(f"{name} has {path.stat().st_size} bytes, not {expected[0]}")
        if _fingerprint(path) != expected:
            raise Damaged(f"{name} is not what was written (its checksum differs)")


def _fingerprint(path: Path) -> list[int]:
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return [size, checksum]


def read_whole(folder: Path, group: dist.ProcessGroup | None) -> Training:
    """What is not a tensor, after the ranks have shared out to look whether all files are as written."""
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    with refused(folder):
        training = together(group, lambda: read_training(folder))[0]
        share = dict(sorted(training.files.items())[rank::ranks])
        together(group, lambda: verify(folder, share))
    return training


@contextmanager
def refused(folder: Path) -> Iterator[None]:
    """Whatever goes wrong with what the checkpoint says is the checkpoint's fault."""
    try:
        yield
    except (Exception, dcp.CheckpointException) as error:  # they share no narrower base class
        raise UsageError(f"checkpoint {folder} cannot be loaded: {reason(error)}") from error


def update_groups(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    """The saved settings into the optimizer's groups. Raises ValueError for other groups or settings."""
    if len(saved) != len(optimizer.param_groups):
        raise ValueError(
            f"its optimizer has {len(saved)} parameter groups, not {len(optimizer.param_groups)}"
        )
    for group, settings in zip(optimizer.param_groups, saved, strict=True):
        settings = {name: value for name, value in settings.items() if name not in KERNEL_CHOICES}
        for name, value in settings.items():
            # "initial_lr" comes with a scheduler, which may be made after loading.
            if name == "params" or (name not in group and name != "initial_lr"):
                raise ValueError(f"the optimizer has no setting {name!r}")
            if name in group and not _alike(value, group[name]):
                raise ValueError(f"the optimizer's {name} is {value!r}")
        group.update(settings)


def _alike(value: Any, present: Any) -> bool:
    """Whether a value from JSON can stand where `present` stands."""
    if isinstance(present, (tuple, list)):
        return isinstance(value, list) and len(value) == len(present)
    if isinstance(present, bool) or present is None:
        return value is None or isinstance(value, (bool, int, float))
    if isinstance(present, (int, float)):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, type(present))


def together(group: dist.ProcessGroup | None, action: Callable[[], T]) -> list[T]:
    """Runs on every rank of `group` (None: this process alone) and returns all answers. When it fails on
    one rank, it fails on all: nobody waits for a rank that has given up. Raises RuntimeError then."""
    answer: T | None = None
    problem = ""
    try:
        answer = action()
    except Exception as error:
        problem = reason(error)
    if group is None:
        everybody: list[Any] = [(answer, problem)]
    else:
        everybody = [None] * dist.get_world_size(group)
        dist.all_gather_object(everybody, (answer, problem), group=group)
    for rank, (_, failed) in enumerate(everybody):
        if failed:
            raise RuntimeError(failed if group is None else f"{failed} (rank {rank})")
    return [item for item, _ in everybody]


def reason(error: BaseException) -> str:
    """One line that says what went wrong; of a failure on several ranks the first one's."""
    failures = getattr(error, "failures", None)  # dcp.CheckpointException
    if failures:
        error = next(iter(failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
