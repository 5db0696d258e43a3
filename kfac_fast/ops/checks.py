"""Checks of the ops' arguments, for every backend. Messages name the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import native
from .blocks import BlockDiagonal
from .rows import ConvRows


def check_blocks(name: str, blocks: Any, like: BlockDiagonal | None = None) -> None:
    if not isinstance(blocks, BlockDiagonal):
        raise TypeError(f"{name} must be a BlockDiagonal, got {type(blocks).__name__}")
    if blocks.data.requires_grad:
        raise TypeError(f"{name} must not require grad: nothing here is differentiable")
    if like is None:
        return
    if blocks.sizes != like.sizes:
        raise ValueError(f"{name} must have the sizes {like.sizes}, got {blocks.sizes}")
    if blocks.dtype != like.dtype or blocks.device != like.device:
        raise ValueError(f"{name} must be {like.dtype} on {like.device}, got {blocks.dtype} on {blocks.device}")


def check_length(name: str, value: Any, length: int) -> None:
    if len(value) != length:
        raise ValueError(f"{name} must have one entry per block, {length}, got {len(value)}")


def check_tensor(name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
    if value.shape != shape or not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous with shape {shape}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def per_block(name: str, value: float | Tensor, blocks: BlockDiagonal, minimum: float = -math.inf) -> Tensor:
    """A coefficient as ``[b]`` in the dtype of the blocks. The values of a tensor are not looked at (no sync)."""
    if isinstance(value, Tensor):
        check_tensor(name, value, (len(blocks),), blocks.dtype, blocks.device)
        return value
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a tensor [b], got {type(value).__name__}")
    if not math.isfinite(value) or value < minimum:
        bound = "finite" if minimum == -math.inf else f"finite and >= {minimum:g}"
        raise ValueError(f"{name} must be {bound}, got {name}={value}")
    return torch.full((len(blocks),), value, dtype=blocks.dtype, device=blocks.device)


def row_dtypes(blocks: BlockDiagonal) -> tuple[torch.dtype, ...]:
    return (torch.float64,) if blocks.dtype == torch.float64 else (torch.float32, torch.bfloat16, torch.float16)


def check_views(
    name: str, values: Sequence[Any], views: _C.TensorViews, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Types, dtypes and devices of a list of tensors; `views` has looked at all of them at once."""
    if views.uniform(native.device_code(device), [native.DTYPE_CODES[dtype] for dtype in dtypes]):
        return
    for i, value in enumerate(values):
        tensor = value.x if isinstance(value, ConvRows) else value
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor, got {type(tensor).__name__}")
        if not native.is_plain(tensor):
            raise TypeError(
                f"{name}[{i}] must be a plain torch.Tensor, got {type(tensor).__name__}; "
                "sharded models are not supported yet"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}[{i}] must be a dense tensor, got layout {tensor.layout}")
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype) for dtype in dtypes)
            raise TypeError(f"{name}[{i}] must be {expected}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}[{i}] must be on {device}, got {tensor.device}")
    raise AssertionError(f"{name}: native and Python checks disagree; please report this")


def check_rows(
    rows: Sequence[Tensor | ConvRows],
    views: _C.TensorViews,
    factors: BlockDiagonal,
    biases: list[bool],
    weights: list[Tensor | None],
) -> None:
    """That rows cover every block with the right number of columns, and weights the rows."""
    check_views("rows", rows, views, factors.device, row_dtypes(factors))
    plain = not any(w is not None for w in weights) and not any(isinstance(row, ConvRows) for row in rows)
    if plain and views.fit_rows(factors.plan, biases):
        return
    block = 0  # the next one that needs rows
    for index, row in enumerate(rows):
        groups = row.groups if isinstance(row, ConvRows) else 1
        shape = tuple(row.shape)
        if len(shape) != 2:
            raise ValueError(f"rows[{index}] must be a matrix [m, d] or a ConvRows, got shape {shape}")
        for i in range(block, block + groups):
            if i >= len(factors) or shape[1] + biases[i] != factors.sizes[i]:
                raise_rows_mismatch(index, i, shape, biases, factors.sizes)
            w = weights[i]
            if w is not None:
                check_tensor(f"weights[{i}]", w, (shape[0],), factors.dtype, factors.device)
        block += groups
    if block != len(factors):
        raise ValueError(f"rows must cover the {len(factors)} blocks of factors, got rows for {block}")


def check_gradients(
    name: str, gradients: native.GradientViews, g_inverse: BlockDiagonal, a_inverse: BlockDiagonal
) -> None:
    """That every gradient flattens to the rows and columns of its two inverses."""
    check_length(name, gradients.weights, len(g_inverse))
    check_views(name, gradients.weights, gradients.weight_views, g_inverse.device, row_dtypes(g_inverse))
    if gradients.weight_views.fit_matrices(
        g_inverse.plan, a_inverse.plan, gradients.bias_of
    ) and gradients.bias_views.fit_biases(g_inverse.plan, gradients.bias_of, gradients.weight_views):
        return
    for i, (weight, position) in enumerate(zip(gradients.weights, gradients.bias_of, strict=True)):
        rows, expected = g_inverse.sizes[i], a_inverse.sizes[i] - (position >= 0)
        if weight.ndim < 2 or weight.shape[0] != rows or math.prod(weight.shape[1:]) != expected:
            raise ValueError(
                f"{name}[{i}] must be [{rows}, {expected}]{' beside its bias' if position >= 0 else ''} "
                f"to fit g_inverse[{i}] and a_inverse[{i}], got {tuple(weight.shape)}"
            )
        if position < 0:
            continue
        bias = gradients.biases[position]
        if not isinstance(bias, Tensor) or bias.dtype != weight.dtype or bias.device != weight.device:
            got = f"{bias.dtype} on {bias.device}" if isinstance(bias, Tensor) else type(bias).__name__
            raise TypeError(f"the bias of {name}[{i}] must be a {weight.dtype} tensor on {weight.device}, got {got}")
        if bias.shape != (rows,):
            raise ValueError(f"the bias of {name}[{i}] must be [{rows}], got {tuple(bias.shape)}")
    raise AssertionError(f"{name}: native and Python checks disagree; please report this")


def check_outputs(out: native.GradientViews, grads: native.GradientViews) -> None:
    """That outputs have biases where the gradients have, and take no part in autograd."""
    if out.bias_of != grads.bias_of:
        i = next(i for i, (x, y) in enumerate(zip(out.bias_of, grads.bias_of, strict=True)) if (x < 0) != (y < 0))
        raise ValueError(f"out[{i}] must have a bias exactly if grads[{i}] has one")
    for i, (weight, position) in enumerate(zip(out.weights, out.bias_of, strict=True)):
        if weight.requires_grad or (position >= 0 and out.biases[position].requires_grad):
            raise TypeError(f"out[{i}] must not require grad: pass a detached tensor")


def raise_rows_mismatch(
    index: int, block: int, shape: tuple[int, ...], biases: list[bool], sizes: tuple[int, ...]
) -> None:
    if block >= len(sizes):
        raise ValueError(f"rows must cover the {len(sizes)} blocks of factors, got more (at rows[{index}])")
    bias = " with the bias column" if biases[block] else ""
    raise ValueError(
        f"rows[{index}] must have {sizes[block] - biases[block]} columns to fit factors[{block}] of size "
        f"{sizes[block]}{bias}, got {shape[1]}"
    )
