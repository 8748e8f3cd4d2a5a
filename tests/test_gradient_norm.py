"""The engine's gradient norm keeps its digits where torch's own on the CPU does not."""

from __future__ import annotations

import torch

from suite.impls.sharded.optimizer import sum_of_squares

LENGTH = 4_000_000


def test_the_norm_of_a_long_arena_is_right_to_six_digits() -> None:
    torch.manual_seed(0)
    arena = torch.randn(LENGTH - LENGTH % 64) * torch.rand(LENGTH - LENGTH % 64) ** 4
    exact = arena.double().norm().item()
    ours = sum_of_squares([arena]).sqrt().item()
    assert abs(ours / exact - 1) < 1e-6
    # An upgrade that mends torch turns this red: then the engine may use it (docs/findings.md, 12).
    assert abs(torch.linalg.vector_norm(arena).item() / exact - 1) > 1e-5
