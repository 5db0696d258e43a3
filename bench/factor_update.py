"""Factor updates: single blocks, many layers, half precision, convolutions, against torch.addmm and F.unfold."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fast import BlockDiagonal, ConvRows, ops

from .harness import Row, compare


def addmm(c: Tensor, x: Tensor) -> Tensor:
    return torch.addmm(c, x.T, x, beta=0.95, alpha=0.05, out=c)


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def run() -> list[Row]:
    rows = []
    m = 8192
    for dtype, bars in ((torch.float32, (1.0, 1.4, 1.6)), (torch.bfloat16, (4.0, 4.0, 4.0))):
        for n, bar in zip((64, 256, 1024), bars, strict=True):
            x = torch.randn(m, n - 1).to(dtype)
            full = with_ones(x)
            factor = BlockDiagonal.zeros([n])
            c = torch.zeros(n, n, dtype=dtype)
            name = str(dtype).removeprefix("torch.")
            rows.append(
                compare(
                    "factor_update_", f"{m} rows, {n}², {name}", "addmm, ones there",
                    lambda f=factor, x=x: ops.factor_update_(f, [x], 0.95, 0.05, bias=True),
                    lambda c=c, x=full: addmm(c, x), bar,
                )
            )  # fmt: skip
    generator = random.Random(0)
    sizes = [generator.randint(8, 128) for _ in range(200)]
    xs = [torch.randn(256, n - 1) for n in sizes]
    full_xs = [with_ones(x) for x in xs]
    factors = BlockDiagonal.zeros(sizes)
    cs = [torch.zeros(n, n) for n in sizes]
    rows.append(
        compare(
            "factor_update_", "200 layers of 8…128, 256 rows", "loop of addmm",
            lambda: ops.factor_update_(factors, xs, 0.95, 0.05, bias=True),
            lambda: [addmm(c, x) for c, x in zip(cs, full_xs, strict=True)], 4,
        )
    )  # fmt: skip
    for channels in (16, 64, 128):
        images = torch.randn(64, channels, 32, 32)
        n = channels * 9
        factor = BlockDiagonal.zeros([n])

        def unfold(images: Tensor = images, n: int = n) -> Tensor:
            patches = F.unfold(images, 3, padding=1).transpose(1, 2).reshape(-1, n)
            return patches.T @ patches

        rows.append(
            compare(
                "factor_update_", f"conv 3×3, 64×{channels}×32×32", "F.unfold + mm",
                lambda f=factor, x=images: ops.factor_update_(f, [ConvRows(x, 3, padding=1)], 0.0, 1.0),
                unfold, 5,
            )
        )  # fmt: skip
    return rows
