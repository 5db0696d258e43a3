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
from .reference import Gradient
from .rows import ConvRows


def parts(gradient: Gradient) -> tuple[Tensor, ...]:
    if not isinstance(gradient, tuple):
        return (gradient,)
    weight, bias = gradient
    return (weight,) if bias is None else (weight, bias)


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
                "for sharded models use DistributedDataParallel"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}[{i}] must be a dense tensor, got layout {tensor.layout}")
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype) for dtype in dtypes)
            raise TypeError(f"{name}[{i}] must be {expected}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}[{i}] must be on {device}, got {tensor.device}")
    raise AssertionError(f"{name}: native and Python checks disagree; please report this")


def check_gradients(
    name: str, gradients: Sequence[Gradient], g_inverse: BlockDiagonal, a_inverse: BlockDiagonal
) -> None:
    weights = [g[0] if isinstance(g, tuple) else g for g in gradients]
    biases = {i: g[1] for i, g in enumerate(gradients) if isinstance(g, tuple) and g[1] is not None}
    dtypes = row_dtypes(g_inverse)
    views = native.view_tensors(weights)
    check_views(name, weights, views, g_inverse.device, dtypes)
    for i, (shape, rows, columns) in enumerate(zip(views.shapes, g_inverse.sizes, a_inverse.sizes, strict=True)):
        expected = columns - (i in biases)
        # Plain multiplication: math.prod costs more than the rest of this loop for a matrix.
        found = shape[1] if len(shape) == 2 else math.prod(shape[1:])
        if len(shape) < 2 or shape[0] != rows or found != expected:
            raise ValueError(
                f"{name}[{i}] must be [{rows}, {expected}]{' beside its bias' if i in biases else ''} "
                f"to fit g_inverse[{i}] and a_inverse[{i}], got {shape}"
            )
    for i, bias in biases.items():
        if not isinstance(bias, Tensor) or bias.dtype != weights[i].dtype or bias.device != weights[i].device:
            got = f"{bias.dtype} on {bias.device}" if isinstance(bias, Tensor) else type(bias).__name__
            raise TypeError(
                f"the bias of {name}[{i}] must be a {weights[i].dtype} tensor on {weights[i].device}, got {got}"
            )
        if bias.shape != (g_inverse.sizes[i],):
            raise ValueError(f"the bias of {name}[{i}] must be [{g_inverse.sizes[i]}], got {tuple(bias.shape)}")


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
