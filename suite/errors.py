"""Errors that a user sees: one clear line that says what is wrong, the value, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LISTED = 20
"""Known names that an error lists at most."""


class SuiteError(Exception):
    """Base of every error that reaches the user as one line instead of a traceback; `details` (a rank's
    traceback, say) are shown above it."""

    exit_status = 3

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(_one_line(message))
        self.details = details


class UsageError(SuiteError):
    """The input is wrong (exit status 2); raised before anything is started or written."""

    exit_status = 2


class RankError(SuiteError):
    """A rank raised, died or hung (exit status 3); `details` holds its traceback or the stacks, `raised` the
    name of the exception's class where there was one."""

    def __init__(self, message: str, rank: int | None = None, details: str = "", raised: str = "") -> None:
        super().__init__(message, details)
        self.rank = rank
        self.raised = raised


class OutputError(SuiteError):
    """Something could not be written: a full disk, a missing permission (exit status 3). Nothing
    half-written is left; `details` holds what would otherwise be lost."""


def _one_line(text: str) -> str:
    """Line breaks and what would steer a terminal, written out: a value may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """What it says, as one line; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def unknown(kind: str, value: str, known: Iterable[str]) -> UsageError:
    """The error for a name that does not exist, naming the closest one that does."""
    names = sorted(known)
    close = difflib.get_close_matches(value, names, n=1, cutoff=0.4)
    some = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
    hint = f"did you mean {close[0]!r}?" if close else f"known: {some}"
    return UsageError(f"unknown {kind} {value!r}; {hint}")
