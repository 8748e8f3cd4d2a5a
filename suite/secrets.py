"""Secrets stay out of whatever is printed or written: records, errors, what ranks have printed."""

from __future__ import annotations

import os
import re

MASK = "***"
SHORTEST = 8
"""Characters below which a value is taken for a setting, not a secret: it may stand in any text."""

_NAMES = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)(_|$)"  # PGPASSWORD, too
    r"|(^|_)(API_?)?KEY(_|$)|(^SSH|_)PASS$|(MYSQL|DB)_PWD$",
    re.I,
)
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def mask(text: str) -> str:
    """The text without the values of environment variables whose names speak of keys, tokens or
    passwords (`WANDB_API_KEY`, `HF_TOKEN`, …), and without the user part of addresses."""
    text = _IN_ADDRESS.sub(MASK, text)
    for value in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(value, MASK)
    return text


def names_a_secret(variable: str) -> bool:
    """Whether an environment variable of that name speaks of keys, tokens or passwords."""
    return _NAMES.search(variable) is not None


def _secrets() -> set[str]:
    return {value for name, value in os.environ.items() if len(value) >= SHORTEST and names_a_secret(name)}
