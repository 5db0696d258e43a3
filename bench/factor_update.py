"""Factor updates: single blocks, many layers, half precision, convolutions, against torch.addmm and F.unfold."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fast import BlockDiagonal, ConvRows, ops

from .harness import Call, Case

ROWS = 8192


def addmm(c: Tensor, x: Tensor) -> Tensor:
    return torch.addmm(c, x.T, x, beta=0.95, alpha=0.05, out=c)


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def one_block(n: int, dtype: torch.dtype) -> tuple[Call, Call]:
    x = torch.randn(ROWS, n - 1).to(dtype)
    full = with_ones(x)
    factor = BlockDiagonal.zeros([n])
    c = torch.zeros(n, n, dtype=dtype)
    return lambda: ops.factor_update_(factor, [x], 0.95, 0.05, bias=True), lambda: addmm(c, full)


def many_layers() -> tuple[Call, Call]:
    generator = random.Random(0)
    sizes = [generator.randint(8, 128) for _ in range(200)]
    xs = [torch.randn(256, n - 1) for n in sizes]
    full_xs = [with_ones(x) for x in xs]
    factors = BlockDiagonal.zeros(sizes)
    cs = [torch.zeros(n, n) for n in sizes]
    return (
        lambda: ops.factor_update_(factors, xs, 0.95, 0.05, bias=True),
        lambda: [addmm(c, x) for c, x in zip(cs, full_xs, strict=True)],
    )


def convolution(channels: int) -> tuple[Call, Call]:
    images = torch.randn(64, channels, 32, 32)
    n = channels * 9
    factor = BlockDiagonal.zeros([n])

    def unfold() -> Tensor:
        patches = F.unfold(images, 3, padding=1).transpose(1, 2).reshape(-1, n)
        return patches.T @ patches

    return lambda: ops.factor_update_(factor, [ConvRows(images, 3, padding=1)], 0.0, 1.0), unfold


def cases() -> Iterator[Case]:
    op, rival = "factor_update_", "addmm, ones there"
    for dtype, bars in ((torch.float32, (1.0, 1.4, 1.6)), (torch.bfloat16, (4.0, 4.0, 4.0))):
        for n, bar in zip((64, 256, 1024), bars, strict=True):
            name = f"{ROWS} rows, {n}², {str(dtype).removeprefix('torch.')}"
            yield Case(op, name, rival, lambda n=n, dtype=dtype: one_block(n, dtype), bar)
    yield Case(op, "200 layers of 8…128, 256 rows", "loop of addmm", many_layers, 4)
    for channels in (16, 64, 128):
        name = f"conv 3×3, 64×{channels}×32×32"
        yield Case(op, name, "F.unfold + mm", lambda channels=channels: convolution(channels), 5)
