"""MiCS: the engine with several partition groups (S2)."""

from __future__ import annotations

from suite.impls.zero3 import Zero3


class MiCS(Zero3):
    """Model states sharded inside partition groups, gradients summed across them in two hops."""
