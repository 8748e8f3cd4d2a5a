"""What a reader should know about an implementation beside its numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Description:
    """`limits` says what it cannot do on the backend that it ran on, `shims` what was changed to make it
    run at all, one sentence each."""

    name: str
    summary: str
    limits: str = ""
    shims: tuple[str, ...] = ()


def registered() -> dict[str, Description]:
    """Of every implementation that the registry knows."""
    from suite.impls.registry import IMPLEMENTATIONS

    return {
        name: Description(name, item.summary, item.limits_on_cpu, item.shims)
        for name, item in IMPLEMENTATIONS.items()
    }
