"""Natural gradients G⁻¹ V A⁻¹, against pairs of torch.mm."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from kfac_fast import BlockDiagonal, ops

from .harness import Call, Case


def calls(shapes: list[tuple[int, int]]) -> tuple[Call, Call]:
    g = BlockDiagonal.pack([torch.randn(r, r) for r, _ in shapes])
    a = BlockDiagonal.pack([torch.randn(c, c) for _, c in shapes])
    for block in (*g, *a):
        block.copy_((block + block.T) / 2)
    grads = [torch.randn(r, c) for r, c in shapes]
    out = [torch.empty_like(v) for v in grads]
    gs, as_ = list(g), list(a)

    def pairs() -> list[Tensor]:
        return [x @ v @ y for x, v, y in zip(gs, grads, as_, strict=True)]

    return lambda: ops.precondition(grads, g, a, out), pairs


def cases() -> Iterator[Case]:
    generator = random.Random(0)
    small = [(generator.randint(8, 128), generator.randint(8, 128)) for _ in range(200)]
    for name, shapes, bar in (("200 layers of 8…128", small, 4), ("1024 × 1024", [(1024, 1024)], 0.95)):
        yield Case("precondition", name, "two mm a layer", lambda shapes=shapes: calls(shapes), bar)
