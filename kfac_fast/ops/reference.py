"""The four ops in plain torch: the specification that every native backend is tested against.

Written to be read, not to be fast. Arguments were checked in ``ops/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .blocks import BlockDiagonal
from .rows import ConvRows

Gradient = Tensor | tuple[Tensor, Tensor | None]


def factor_update_(
    factors: BlockDiagonal,
    rows: Sequence[Tensor | ConvRows],
    views: object,  # of the rows, for the kernels
    decay: Tensor,  # [b]
    scale: Tensor,  # [b]
    bias: Sequence[bool],
    weights: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:
    matrices = []
    for entry in rows:
        if isinstance(entry, ConvRows):
            matrices += [entry.patches(group) for group in range(entry.groups)]
        else:
            matrices.append(entry)
    trace = factors.data.new_empty(len(factors))
    nonfinite = torch.empty(len(factors), dtype=torch.int32, device=factors.device)
    for i, (block, x) in enumerate(zip(factors, matrices, strict=True)):
        x = x.to(factors.dtype)
        if bias[i]:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        w = weights[i]
        if w is not None:
            x = x * w.sqrt()[:, None]
        gram = x.T @ x
        gram = (gram + gram.T) / 2  # a library's product need not be symmetric in the last bit
        nonfinite[i] = ~gram.isfinite().all()
        block.copy_(_blend(block, gram, decay[i], scale[i]))
        trace[i] = block.trace()
    return trace, nonfinite


def commit_(factors: BlockDiagonal, pending: BlockDiagonal, decay: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    trace = factors.data.new_empty(len(factors))
    for i, (block, update) in enumerate(zip(factors, pending, strict=True)):
        block.copy_(torch.where(gate != 0, _blend(block, update, decay[i], scale[i]), block))
        trace[i] = block.trace()
    pending.data.zero_()
    return trace


def _blend(old: Tensor, new: Tensor, decay: Tensor, scale: Tensor) -> Tensor:
    # decay = 0 means overwrite, as beta = 0 does in BLAS: an old NaN must not survive it.
    return torch.where(decay == 0, torch.zeros_like(old), decay * old) + scale * new


def damped_inverse(
    blocks: BlockDiagonal,
    damping: Tensor,  # [b]
    out: BlockDiagonal,
    info: Tensor,  # [b] int32
    *,
    retry_failed: bool,
    nan_on_failure: bool,
) -> None:
    for i, (block, result) in enumerate(zip(blocks, out, strict=True)):
        if not retry_failed or info[i]:
            inverse_with_library(block, damping[i], result, info[i], nan_on_failure=nan_on_failure)


def inverse_with_library(
    block: Tensor,  # [n, n], lower triangle read
    damping: Tensor,  # []
    out: Tensor,  # [n, n]
    info: Tensor,  # [] int32
    *,
    nan_on_failure: bool,
) -> None:
    """One block through torch.linalg, without a host synchronisation; also serves blocks too large for the kernels."""
    eye = torch.eye(len(block), dtype=block.dtype, device=block.device)
    damped = block + damping * eye
    factor, failed = torch.linalg.cholesky_ex(damped)
    # LAPACK lets infinite pivots through; the op does not.
    infinite = ~factor.diagonal().isfinite()
    first = infinite.to(torch.int32).argmax().to(torch.int32) + 1
    failed = torch.where(infinite.any() & ((failed == 0) | (first < failed)), first, failed)
    inverse = torch.cholesky_inverse(torch.where(failed == 0, factor, eye))  # it raises on a singular factor
    inverse = (inverse + inverse.T) / 2
    on_failure = torch.full_like(out, torch.nan) if nan_on_failure else out
    out.copy_(torch.where(failed == 0, inverse, on_failure))
    info.copy_(failed)


class Gradients(Protocol):
    """Gradients taken apart; `bias_of` gives for every weight the position of its bias, or -1."""

    weights: list[Tensor]
    biases: list[Tensor]
    bias_of: list[int]


def precondition(grads: Gradients, g_inverse: BlockDiagonal, a_inverse: BlockDiagonal, out: Gradients) -> Tensor:
    dot = g_inverse.data.new_empty(len(g_inverse))
    for i, (weight, weight_out, position) in enumerate(zip(grads.weights, out.weights, grads.bias_of, strict=True)):
        bias = grads.biases[position] if position >= 0 else None
        v = weight.reshape(weight.shape[0], -1).to(g_inverse.dtype)
        if bias is not None:
            v = torch.cat([v, bias.to(v.dtype)[:, None]], dim=1)
        u = g_inverse[i] @ v @ a_inverse[i]
        dot[i] = (v * u).sum()
        if bias is not None:
            out.biases[position].copy_(u[:, -1])
            u = u[:, :-1]
        weight_out.copy_(u.reshape(weight_out.shape))
    return dot
