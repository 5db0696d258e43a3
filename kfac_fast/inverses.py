"""Owns the damping, the damped inverses of the factors, and what happens when one fails."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .factors import Factors
from .ops import BlockDiagonal
from .ops.native import reading_is_free

RETRIES = 3  # each with ten times the damping of the one before


class KFACWarning(UserWarning):
    """Something about the curvature that the user should know and that training survives."""


class Inverses:
    """(A + πγI)⁻¹ and (G + γ/π I)⁻¹ of every block, π = √((tr A/dim A)/(tr G/dim G)) (Martens & Grosse 2015, sec. 6.3).

    A factor without a positive, finite trace gives π = 1. A block that was never committed gets identities, which is
    the plain gradient.

    When a factor is not positive definite in its precision, its block, and no other, goes down this ladder: float64 at
    the same damping; ten times the damping, at most three times; eigenvalues floored at the damping; the last good
    inverse; the plain gradient. Off the CPU the host does not wait for the outcome: ten times the damping, up to three
    times, on the device, else the last good inverse; the host reads the outcome at the next update and may then use
    the dearer rungs.

    Args:
        factors: The running factors.
        names: Of every block, for warnings.
    """

    def __init__(self, factors: Factors, names: list[str]) -> None:
        self._factors = factors
        self._names = names
        count = factors.count
        self._kept = list(range(2 * count))  # factors whose inverses are here, in order
        self.failures = torch.zeros(2 * count, dtype=torch.int32, device=factors.sides.device)  # by factor
        # Whether there is an inverse of a committed factor: on the CPU, where asking does not wait.
        self.inverted = torch.zeros(2 * count, dtype=torch.bool)
        self._damping = torch.ones_like(factors.sides)  # of the last update
        self._info: Tensor | None = None  # of the last update, not yet read by the host
        self._warned: set[int] = set()

    @functools.cached_property
    def inverse(self) -> BlockDiagonal:
        """The inverses that are kept, identities at first."""
        running = self._factors.running
        blocks = BlockDiagonal.zeros([running.sizes[i] for i in self._kept], running.dtype, running.device)
        for block in blocks:
            block.fill_diagonal_(1)
        return blocks

    @functools.cached_property
    def a(self) -> BlockDiagonal:
        """Inverses of the A that are kept."""
        return self.inverse[: len(self._kept) // 2]

    @functools.cached_property
    def g(self) -> BlockDiagonal:
        """Inverses of the G that are kept."""
        return self.inverse[len(self._kept) // 2 :]

    def keep(self, blocks: Sequence[int]) -> None:
        """Keeps the inverses of these blocks only; to be called before there are any."""
        self._kept = [first + i for first in (0, self._factors.count) for i in blocks]

    def damping(self, gamma: Tensor) -> Tensor:
        """Damping of every factor ``[2b]`` from γ ``[b]``: πγ for the A, γ/π for the G."""
        return factored_damping(self._factors, gamma)

    def update(self, gamma: Tensor, blocks: Sequence[int] | None = None) -> None:
        """Recomputes inverses with γ ``[b]``, one number per block; of these blocks only, or of all."""
        self._read_last_outcome()
        running, kept = self._factors.running, self._kept
        damping = self.damping(gamma)
        self._damping = damping
        if len(kept) < len(running):
            running = BlockDiagonal.pack([running[i] for i in kept]) if kept else running[:0]
            damping, blocks = damping[kept], None
        if blocks is None:
            _, info = ops.damped_inverse(running, damping, self.inverse)
        else:
            # Blocks that were not chosen are those that need no retry.
            info = torch.zeros(2 * self._factors.count, dtype=torch.int32)
            info[[first + i for first in (0, self._factors.count) for i in blocks]] = 1
            _, info = ops.damped_inverse(running, damping, self.inverse, retry=info.to(running.device))
        if reading_is_free(running.device) or not bool(self.inverted[kept].all()):
            # The first update has no last good inverse to fall back on, so here the host waits on any device.
            for position in info.nonzero().flatten().tolist():
                self._rescue(position, float(damping[position]))
            self.inverted[kept] |= (self._factors.updates > 0).cpu()[kept]
            return
        first = info.clone()
        for attempt in range(1, RETRIES + 1):
            ops.damped_inverse(running, damping * 10.0**attempt, self.inverse, retry=info)
        self.failures[kept] += (first != 0).to(torch.int32)
        self._info = first

    def state(self, layer: int) -> dict[str, list[Tensor]]:
        """A layer's inverses, counters of failures, and whether there is an inverse; see `Store.state`."""
        return {
            **self.matrices(layer),
            "failures": self._factors.per_side(self.failures, layer),
            "inverted": self._factors.per_side(self.inverted, layer),
        }

    def matrices(self, layer: int) -> dict[str, list[Tensor]]:
        """A layer's inverses, as entries of a state; on the meta device where they are not kept."""
        running, own = self._factors.running, self._factors.blocks_of(layer)
        views = dict(zip(self._kept, self.inverse, strict=True))
        return {
            f"{side}_inverse": [
                views[i] if i in views else torch.empty_like(running[i], device="meta")
                for i in range(first + own.start, first + own.stop)
            ]
            for side, first in (("a", 0), ("g", self._factors.count))
        }

    def conditions(self) -> Tensor:
        """‖C + damping·I‖₁ ‖inverse‖₁ of every factor ``[2b]``: at least its condition number, at most √n times it.

        The damping is that of the last update, C is today's. NaN where the inverse is not kept.
        """
        found = torch.full_like(self._factors.sides, torch.nan)
        for i, inverse in zip(self._kept, self.inverse, strict=True):
            block = self._factors.running[i]
            damped = block + self._damping[i] * torch.eye(len(block), dtype=block.dtype, device=block.device)
            found[i] = torch.linalg.matrix_norm(damped, 1) * torch.linalg.matrix_norm(inverse, 1)
        return found

    def _read_last_outcome(self) -> None:
        if self._info is not None:
            for position in self._info.nonzero().flatten().tolist():
                self._warn(self._kept[position], "was inverted with more damping, or kept its last inverse")
            self._info = None

    def _rescue(self, position: int, damping: float) -> None:
        block = self._kept[position]
        self.failures[block] += 1
        out = self.inverse[position]
        factor = self._factors.running[block].double()
        if not bool(factor.isfinite().all()):
            self._keep_last(position)
            return
        factor = (factor + factor.T) / 2
        eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        for attempt in range(RETRIES + 1):
            damped = factor + damping * 10.0**attempt * eye
            root, info = torch.linalg.cholesky_ex(damped)
            if not int(info):
                inverse = torch.cholesky_inverse(root).to(out.dtype)
                if bool(inverse.isfinite().all()):
                    out.copy_((inverse + inverse.T) / 2)
                    self._warn(
                        block, "was inverted in float64" + (f" with {10**attempt} times the damping" if attempt else "")
                    )
                    return
        floor = max(damping, torch.finfo(out.dtype).tiny ** 0.5)
        values, vectors = torch.linalg.eigh(factor)
        inverse = ((vectors / (values.clamp(min=0) + floor)) @ vectors.T).to(out.dtype)
        if bool(inverse.isfinite().all()):
            out.copy_((inverse + inverse.T) / 2)
            self._warn(block, "was inverted with its eigenvalues floored at the damping")
        else:
            self._keep_last(position)

    def _keep_last(self, position: int) -> None:
        block = self._kept[position]
        if bool(self.inverted[block]):
            self._warn(block, "kept its last good inverse")
            return
        partner = (position + len(self._kept) // 2) % len(self._kept)
        for i in (position, partner):
            self.inverse[i].copy_(torch.eye(len(self.inverse[i])))
        self._warn(block, "has no inverse yet: its layer takes the plain gradient")

    def _warn(self, block: int, outcome: str) -> None:
        if block in self._warned:
            return
        self._warned.add(block)
        count = self._factors.count
        side = "A" if block < count else "G"
        warnings.warn(
            f"factor {side} of {self._names[block % count]} is not positive definite at this damping; it {outcome}. "
            "Said once per factor; raise damping if it goes on",
            KFACWarning,
            stacklevel=2,
        )


def factored_damping(factors: Factors, gamma: Tensor) -> Tensor:
    """Damping of every factor ``[2b]`` from γ ``[b]``: πγ for the A, γ/π for the G; 1 for one that is still zero."""
    mean_trace = factors.trace / factors.sides
    ratio = mean_trace[: factors.count] / mean_trace[factors.count :]
    pi = torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio)).sqrt()
    damping = torch.cat([pi * gamma, gamma / pi])
    return torch.where(factors.updates > 0, damping, torch.ones_like(damping))


def gamma_of(damping: float) -> float:
    """γ = √λ, the damping of each factor that together damps the block by about λ (sec. 6.3, without ℓ2)."""
    return math.sqrt(damping)
