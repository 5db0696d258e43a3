"""The native operations of K-FAC, each one call for many blocks of many shapes.

=====================  ==========================================================
`factor_update_`       C_i ← decay_i C_i + scale_i X_iᵀX_i
`commit_`              C_i ← decay_i C_i + scale_i S_i, S_i ← 0, under a gate
`damped_inverse`       (C_i + damping_i I)⁻¹
`precondition`         G_i⁻¹ V_i A_i⁻¹ and ⟨V_i, G_i⁻¹ V_i A_i⁻¹⟩
=====================  ==========================================================

The C++/CUDA kernels run where the tensors are; `use_reference` switches to the specification in plain torch. All
arguments are checked here, once, for every backend. Nothing is differentiable.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, native, reference, schema
from .blocks import BlockDiagonal
from .reference import Gradient
from .rows import ConvRows

__all__ = [
    "BlockDiagonal",
    "ConvRows",
    "FactorStatistics",
    "Gradient",
    "Inverse",
    "Preconditioned",
    "commit_",
    "damped_inverse",
    "factor_update_",
    "precondition",
    "use_reference",
]

_backend: Any = native


@contextlib.contextmanager
def use_reference() -> Iterator[None]:
    """Runs the ops in plain torch inside the ``with`` block: for tests, and to rule the kernels out in a bug hunt."""
    global _backend
    previous, _backend = _backend, reference
    try:
        yield
    finally:
        _backend = previous


class FactorStatistics(NamedTuple):
    """What `factor_update_` found."""

    trace: Tensor  # [b] of the updated factors
    nonfinite: Tensor  # [b] int32, 1 where X_iᵀX_i has a NaN or an infinity


class Inverse(NamedTuple):
    """Result of `damped_inverse`."""

    inverse: BlockDiagonal
    info: Tensor  # [b] int32


class Preconditioned(NamedTuple):
    """Result of `precondition`."""

    results: list[Gradient]
    dot: Tensor  # [b]


@torch.no_grad()
def factor_update_(
    factors: BlockDiagonal,
    rows: Sequence[Tensor | ConvRows],
    decay: float | Tensor,
    scale: float | Tensor,
    *,
    bias: bool | Sequence[bool] = False,
    weights: Sequence[Tensor | None] | None = None,
) -> FactorStatistics:
    """Running second moments: C_i ← decay_i·C_i + scale_i·X_iᵀX_i for every block i, in place.

    Args:
        factors: The C_i, ``[n_i, n_i]`` each; exactly symmetric afterwards.
        rows: X_i, ``[m_i, d_i]`` float32, bfloat16 or float16 (accumulated in float32), float64 for float64 factors;
            any strides, ``m_i`` may be 0. On CUDA float32 is multiplied as TF32 where torch allows that for matrix
            products (``torch.set_float32_matmul_precision``). A `ConvRows` stands for the patches of a convolution, and
            for as many consecutive blocks as it has groups.
        decay: Weight of the old value, ≥ 0; 0 overwrites it, whatever it was. A number or ``[b]``.
        scale: Weight of the new moments. A number or ``[b]``.
        bias: Whether X_i has a last column of ones, so that ``n_i = d_i + 1``. One flag, or one per block.
        weights: Non-negative weights ``[m_i]`` of the rows in the dtype of the factors, or None, per block: X_iᵀX_i
            becomes X_iᵀ diag(w_i) X_i. A negative weight shows as ``nonfinite``.

    Returns:
        The trace of every updated factor and a flag for every X_iᵀX_i that is not finite, on the device.

    Raises:
        TypeError: A wrong type or dtype; a tensor subclass with a dispatch of its own, such as DTensor.
        ValueError: A wrong number of entries, shape or device. The message names the argument.
    """
    checks.check_blocks("factors", factors)
    blocks = len(factors)
    decay = checks.per_block("decay", decay, factors, minimum=0.0)
    scale = checks.per_block("scale", scale, factors)
    biases = [bias] * blocks if isinstance(bias, bool) else list(bias)
    checks.check_length("bias", biases, blocks)
    row_weights: list[Tensor | None] = [None] * blocks if weights is None else list(weights)
    checks.check_length("weights", row_weights, blocks)

    views = native.view_tensors([row.x if isinstance(row, ConvRows) else row for row in rows])
    checks.check_rows(rows, views, factors, biases, row_weights)
    return FactorStatistics(*_backend.factor_update_(factors, rows, views, decay, scale, biases, row_weights))


@torch.no_grad()
def commit_(
    factors: BlockDiagonal,
    pending: BlockDiagonal,
    decay: float | Tensor,
    scale: float | Tensor,
    gate: Tensor | None = None,
) -> Tensor:
    """Moves pending sums into the running factors: C_i ← decay_i·C_i + scale_i·S_i, then S_i ← 0.

    Args:
        factors: The C_i.
        pending: The S_i, of the same sizes, dtype and device; zero afterwards.
        decay: Weight of the old value, ≥ 0; 0 overwrites. A number or ``[b]``.
        scale: Weight of S_i. A number or ``[b]``.
        gate: ``[1]`` int32. With 0 the factors stay as they are: a batch with a NaN commits nothing, without the
            host having to look. None is 1.

    Returns:
        The trace of every factor afterwards, ``[b]``.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: A wrong shape or device. The message names the argument.
    """
    checks.check_blocks("factors", factors)
    checks.check_blocks("pending", pending, like=factors)
    if native.same_memory(pending.data, factors.data):
        raise ValueError("pending must not share its buffer with factors")
    decay = checks.per_block("decay", decay, factors, minimum=0.0)
    scale = checks.per_block("scale", scale, factors)
    if gate is None:
        gate = torch.ones(1, dtype=torch.int32, device=factors.device)
    checks.check_tensor("gate", gate, (1,), torch.int32, factors.device)
    return _backend.commit_(factors, pending, decay, scale, gate)


@torch.no_grad()
def damped_inverse(
    blocks: BlockDiagonal,
    damping: float | Tensor,
    out: BlockDiagonal | None = None,
    *,
    retry: Tensor | None = None,
) -> Inverse:
    """(C_i + damping_i·I)⁻¹ of every block, by Cholesky (Martens & Grosse 2015, sec. 6.3).

    Args:
        blocks: The symmetric C_i; only their lower triangles are read.
        damping: Added to the diagonal, ≥ 0. A number or ``[b]`` in the dtype of the blocks.
        out: Where the inverses go; may be ``blocks`` itself. A block that fails is left as it was in ``out``, so a
            running inverse keeps its last good value. None makes a new buffer, where a failed block is NaN.
        retry: The ``info`` of an earlier call. Only blocks that failed there are tried again, the others keep their
            inverse and info. Needs ``out``; updated in place and returned.

    Returns:
        The inverses, both triangles written and exactly symmetric, and ``info`` ``[b]`` int32 on the device: 0, or k
        for the first pivot, counted from 1, that is not positive and finite. One bad block leaves the others right.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: A wrong shape or device, a negative damping. The message names the argument.
    """
    checks.check_blocks("blocks", blocks)
    damping = checks.per_block("damping", damping, blocks, minimum=0.0)
    if retry is not None:
        if out is None:
            raise ValueError("retry needs out, the inverses of the earlier call")
        checks.check_tensor("retry", retry, (len(blocks),), torch.int32, blocks.device)
    info = retry if retry is not None else torch.empty(len(blocks), dtype=torch.int32, device=blocks.device)
    nan_on_failure = out is None
    if out is None:
        out = blocks.empty_like()
    else:
        checks.check_blocks("out", out, like=blocks)
    _backend.damped_inverse(blocks, damping, out, info, retry_failed=retry is not None, nan_on_failure=nan_on_failure)
    return Inverse(out, info)


@torch.no_grad()
def precondition(
    grads: Sequence[Gradient],
    g_inverse: BlockDiagonal,
    a_inverse: BlockDiagonal,
    out: Sequence[Gradient] | None = None,
) -> Preconditioned:
    """U_i = G_i⁻¹ V_i A_i⁻¹ for every layer (Martens & Grosse 2015, sec. 4.2), and ⟨V_i, U_i⟩ for the KL clip.

    Args:
        grads: V_i, ``[d_out, …]`` whose trailing dimensions are flattened to the columns, or a pair of that and the
            bias gradient ``[d_out]``, which stands for V_i's last column and is never concatenated. float32, bfloat16
            or float16 (float64 for float64 inverses).
        g_inverse: Inverses of the output-side factors, sizes ``d_out``.
        a_inverse: Inverses of the input-side factors, sizes the number of columns with the bias.
        out: Where U_i goes, same structure and shapes as ``grads``, any of their dtypes; may be ``grads`` itself. None
            allocates.

    Returns:
        The U_i, and ⟨V_i, U_i⟩ per layer as ``[b]`` on the device; its sum is the quadratic form of the KL clip.

    Raises:
        TypeError: A wrong type or dtype; an output that requires grad.
        ValueError: A wrong number of entries, shape or device. The message names the argument.
    """
    checks.check_blocks("g_inverse", g_inverse)
    checks.check_blocks("a_inverse", a_inverse)
    if (a_inverse.dtype, a_inverse.device) != (g_inverse.dtype, g_inverse.device):
        raise ValueError(
            f"a_inverse must be {g_inverse.dtype} on {g_inverse.device} like g_inverse, "
            f"got {a_inverse.dtype} on {a_inverse.device}"
        )
    checks.check_length("a_inverse", a_inverse, len(g_inverse))
    given = native.GradientViews(grads)
    checks.check_gradients("grads", given, g_inverse, a_inverse)
    if out is grads:
        wanted = given
    else:
        if out is None:
            out = [
                (torch.empty_like(g[0]), None if g[1] is None else torch.empty_like(g[1]))
                if isinstance(g, tuple)
                else torch.empty_like(g)
                for g in grads
            ]
        wanted = native.GradientViews(out)
        checks.check_gradients("out", wanted, g_inverse, a_inverse)
    checks.check_outputs(wanted, given)
    return Preconditioned(list(out), _backend.precondition(given, g_inverse, a_inverse, wanted))


schema.implementation = sys.modules[__name__]  # torch.ops.kfac_fast.*, for torch.compile
