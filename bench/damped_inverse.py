"""Damped inverses: blocks of one size stacked, and a mixed batch, against torch.linalg."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from kfac_fast import BlockDiagonal, ops

from .harness import Row, compare

# (side, bar against torch, bar as a fraction of the machine's sgemm rate)
SIZES = [
    (8, 30, None), (16, 20, None), (32, 15, None), (64, 10, 0.35), (128, 6, 0.5), (256, 3, 0.5), (512, 2, 0.5),
    (1024, 1.6, 0.5), (2048, 1.3, 0.5),
]  # fmt: skip
DAMPING = 0.1


def well_conditioned(n: int) -> Tensor:
    """Condition below 1e3 with the damping."""
    x = torch.randn(2 * n, n)
    return x.T @ x / (2 * n)


def stacked_inverse(stack: Tensor) -> Tensor:
    damped = stack + DAMPING * torch.eye(stack.shape[-1])
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(damped).L)


def sgemm_rate() -> float:
    """Floating point operations per second of torch.mm at 2048."""
    import time

    a = torch.randn(2048, 2048)
    torch.mm(a, a)
    best = 1e9
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def run() -> list[Row]:
    rows = []
    for n, bar, fraction in SIZES:
        count = max(1, min(4096, int(2e9 / n**3 / 8)))
        blocks = BlockDiagonal.pack([well_conditioned(n)] * count)
        out = blocks.empty_like()
        stack = torch.stack(list(blocks)).clone()
        rows.append(
            compare(
                "damped_inverse", f"{count} × {n}²", "cholesky_ex + cholesky_inverse",
                lambda b=blocks, o=out: ops.damped_inverse(b, DAMPING, o),
                lambda s=stack: stacked_inverse(s), bar,
            )
        )  # fmt: skip
        rate = count * n**3 / rows[-1].ours_s / sgemm_rate()
        rows[-1].extra["of_sgemm"] = rate
        print(f"{'':16}  {rate:.2f} of the sgemm rate" + ("" if fraction is None else f" (at least {fraction})"))
    generator = random.Random(0)
    sizes = [generator.randint(8, 512) for _ in range(200)]
    mixed = BlockDiagonal.pack([well_conditioned(n) for n in sizes])
    out = mixed.empty_like()
    singles = [b.clone() for b in mixed]
    rows.append(
        compare(
            "damped_inverse", "200 blocks of 8…512", "the same, block by block",
            lambda: ops.damped_inverse(mixed, DAMPING, out),
            lambda: [stacked_inverse(b) for b in singles], 5,
        )
    )  # fmt: skip
    return rows
