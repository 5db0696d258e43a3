"""Damped inverses: blocks of one size stacked, and a mixed batch, against torch.linalg and the rate of torch.mm."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from kfac_fast import BlockDiagonal, ops

from .harness import Call, Case

# (side, how many: the rival takes 20 to 200 ms, bar against torch.linalg, bar as a fraction of torch.mm's rate)
SIZES = [
    (8, 32768, 30, None), (16, 16384, 20, None), (32, 4096, 15, None), (64, 1024, 10, 0.35), (128, 240, 6, 0.5),
    (256, 64, 3, 0.5), (512, 16, 2, 0.5), (1024, 3, 1.6, 0.5), (2048, 1, 1.3, 0.5),
]  # fmt: skip
DAMPING = 0.1
MM = 2048


def well_conditioned(n: int) -> Tensor:
    """Condition below 1e3 with the damping."""
    x = torch.randn(2 * n, n)
    return x.T @ x / (2 * n)


def stacked_inverse(stack: Tensor) -> Tensor:
    damped = stack + DAMPING * torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(damped).L)


def inversion(sizes: list[int]) -> tuple[Call, list[Tensor]]:
    """Our call, and the blocks."""
    samples = {n: well_conditioned(n) for n in set(sizes)}
    blocks = BlockDiagonal.pack([samples[n] for n in sizes])
    out = blocks.empty_like()
    return lambda: ops.damped_inverse(blocks, DAMPING, out), [block.clone() for block in blocks]


def against_linalg(n: int, count: int) -> tuple[Call, Call]:
    ours, blocks = inversion([n] * count)
    stack = torch.stack(blocks)
    return ours, lambda: stacked_inverse(stack)


def against_mm(n: int, count: int) -> tuple[Call, Call]:
    a = torch.randn(MM, MM)
    return inversion([n] * count)[0], lambda: torch.mm(a, a)


def mixed() -> tuple[Call, Call]:
    generator = random.Random(0)
    ours, blocks = inversion([generator.randint(8, 512) for _ in range(200)])
    return ours, lambda: [stacked_inverse(block) for block in blocks]


def cases() -> Iterator[Case]:
    op = "damped_inverse"
    for n, count, bar, fraction in SIZES:
        name = f"{count} × {n}²"
        linalg = "cholesky_ex + cholesky_inverse"
        yield Case(op, name, linalg, lambda n=n, count=count: against_linalg(n, count), bar)
        if fraction is not None:
            scale = count * n**3 / (2 * MM**3)
            rate = f"n³ operations at torch.mm's rate ({MM}²)"
            yield Case(op, f"{name}, rate", rate, lambda n=n, count=count: against_mm(n, count), fraction, scale)
    yield Case(op, "200 blocks of 8…512", "the same, block by block", mixed, 5)
