"""The ops under ``torch.ops.kfac_fast``: what torch.compile and torch.export see instead of Python objects.

A `BlockDiagonal` travels as its buffer and its sizes, a `ConvRows` as its tensor and a list of integers. Eager calls do
not come through here: the dispatcher would cost more than the kernels for many small blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .blocks import BlockDiagonal
from .rows import PADDING_MODES, ConvRows

# `kfac_fast.ops` sets these to its own functions (importing them here would be circular).
implementation: Any = None


def encode_rows(rows: Sequence[Tensor | ConvRows]) -> tuple[list[Tensor], list[int]]:
    """Tensors, and for each of them its number of spatial dimensions (0: plain rows) followed by the geometry."""
    tensors: list[Tensor] = []
    geometry: list[int] = []
    for row in rows:
        if isinstance(row, ConvRows):
            tensors.append(row.x)
            pairs = chain.from_iterable(row.padding)
            mode = PADDING_MODES.index(row.padding_mode)
            geometry += [len(row.kernel), *row.kernel, *row.stride, *pairs, *row.dilation, row.groups, mode]
        else:
            tensors.append(row)
            geometry.append(0)
    return tensors, geometry


def decode_rows(tensors: Sequence[Tensor], geometry: Sequence[int]) -> list[Tensor | ConvRows]:
    """Inverse of `encode_rows`."""
    rows: list[Tensor | ConvRows] = []
    numbers = iter(geometry)

    def take(count: int) -> tuple[int, ...]:
        return tuple(next(numbers) for _ in range(count))

    for tensor in tensors:
        dims = next(numbers)
        if not dims:
            rows.append(tensor)
            continue
        kernel, stride = take(dims), take(dims)
        padding = [(next(numbers), next(numbers)) for _ in range(dims)]
        dilation = take(dims)
        groups, mode = take(2)
        rows.append(ConvRows(tensor, kernel, stride, padding, dilation, groups, PADDING_MODES[mode]))
    return rows


@torch.library.custom_op("kfac_fast::factor_update_", mutates_args=("factors",))
def factor_update_(
    factors: Tensor,
    sizes: Sequence[int],
    rows: Sequence[Tensor],
    geometry: Sequence[int],
    decay: Tensor,
    scale: Tensor,
    bias: Sequence[bool],
    weights: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:
    statistics = implementation.factor_update_(
        BlockDiagonal(sizes, factors), decode_rows(rows, geometry), decay, scale, bias=list(bias), weights=weights
    )
    return statistics.trace, statistics.nonfinite


@factor_update_.register_fake
def _(factors, sizes, rows, geometry, decay, scale, bias, weights):
    return factors.new_empty(len(sizes)), factors.new_empty(len(sizes), dtype=torch.int32)


@torch.library.custom_op("kfac_fast::commit_", mutates_args=("factors", "pending"))
def commit_(
    factors: Tensor, pending: Tensor, sizes: Sequence[int], decay: Tensor, scale: Tensor, gate: Tensor
) -> Tensor:
    return implementation.commit_(BlockDiagonal(sizes, factors), BlockDiagonal(sizes, pending), decay, scale, gate)


@commit_.register_fake
def _(factors, pending, sizes, decay, scale, gate):
    return factors.new_empty(len(sizes))


@torch.library.custom_op("kfac_fast::damped_inverse", mutates_args=())
def damped_inverse(blocks: Tensor, sizes: Sequence[int], damping: Tensor) -> tuple[Tensor, Tensor]:
    inverse, info = implementation.damped_inverse(BlockDiagonal(sizes, blocks), damping)
    return inverse.data, info


@damped_inverse.register_fake
def _(blocks, sizes, damping):
    return torch.empty_like(blocks), blocks.new_empty(len(sizes), dtype=torch.int32)


@torch.library.custom_op("kfac_fast::damped_inverse_", mutates_args=("out", "info"))
def damped_inverse_(
    blocks: Tensor, sizes: Sequence[int], damping: Tensor, out: Tensor, info: Tensor, retry: bool
) -> None:
    """``info`` is read where ``retry`` is true and always written."""
    found = implementation.damped_inverse(
        BlockDiagonal(sizes, blocks), damping, BlockDiagonal(sizes, out), retry=info if retry else None
    ).info
    if not retry:
        info.copy_(found)


@damped_inverse_.register_fake
def _(blocks, sizes, damping, out, info, retry):
    return None


# The schema is written out since torch before 2.7 infers none from list[Tensor] inside a tuple.
@torch.library.custom_op(
    "kfac_fast::precondition",
    mutates_args=(),
    schema="(Tensor[] grads, Tensor?[] biases, Tensor g_inverse, SymInt[] g_sizes, Tensor a_inverse, SymInt[] a_sizes)"
    " -> (Tensor[], Tensor)",
)
def precondition(
    grads: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    g_inverse: Tensor,
    g_sizes: Sequence[int],
    a_inverse: Tensor,
    a_sizes: Sequence[int],
) -> tuple[list[Tensor], Tensor]:
    """The results of all weights, then of the biases that are there."""
    pairs = list(zip(grads, biases, strict=True))
    g, a = BlockDiagonal(g_sizes, g_inverse), BlockDiagonal(a_sizes, a_inverse)
    results, dot = implementation.precondition(pairs, g, a)
    return [w for w, _ in results] + [b for _, b in results if b is not None], dot


@precondition.register_fake
def _(grads, biases, g_inverse, g_sizes, a_inverse, a_sizes):
    results = [torch.empty_like(t) for t in [*grads, *(b for b in biases if b is not None)]]
    return results, g_inverse.new_empty(len(g_sizes))
