"""Kronecker blocks with a factor, or both, kept as its diagonal: embeddings, vocabularies, very wide layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..factors import Factors, stackable
from ..layers import KroneckerBlock, KroneckerLayer, SquareSums
from ..ops import BlockDiagonal, ConvRows, Gradient
from .block_diagonal import BlockDiagonalFisher


class DiagonalFactors(Factors):
    """`Factors` of which some are diagonals, in one flat buffer.

    In `running` a diagonal factor is a 1×1 matrix, the mean of its diagonal. Traces, π and damping, counters and the
    check for finite values then come out as for any other factor.
    """

    def __init__(
        self,
        layers: Sequence[KroneckerLayer],
        decay: float,
        dtype: torch.dtype,
        device: torch.device,
        *,
        empirical_mean: bool,
    ) -> None:
        super().__init__(layers, decay, dtype, device, empirical_mean=empirical_mean)
        blocks = [block for layer in layers for block in layer.blocks]
        sides = [(b.a, b.a_diagonal) for b in blocks] + [(b.g, b.g_diagonal) for b in blocks]
        sizes = [size if diagonal else 0 for size, diagonal in sides]
        self._sizes = torch.tensor(sizes, device=device)
        self._total = sum(sizes)
        matrices = self.running.data.numel()
        self.sums = torch.zeros(matrices + self._total, dtype=dtype, device=device)
        self.pending = BlockDiagonal(self.running.sizes, self.sums[:matrices])
        self._pending_diagonals = self.sums[matrices:]
        self.diagonals = torch.zeros(self._total, dtype=dtype, device=device)
        self._of_gradients = sum(sizes[: self.count])  # where the diagonals of the G begin
        self._pending_of = self.split(self._pending_diagonals, sizes)

    @staticmethod
    def split(flat: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Views of a flat buffer, by factor; empty where a factor is no diagonal."""
        return list(flat.split(list(sizes)))

    def by_factor(self, flat: Tensor) -> list[Tensor]:
        """Views of a buffer laid out like `diagonals`, by factor; empty where a factor is a matrix."""
        return self.split(flat, self._sizes.tolist())

    def spread(self, per_factor: Tensor) -> Tensor:
        """A number for every factor as one for every element of `diagonals`."""
        return per_factor.repeat_interleave(self._sizes, output_size=self._total)

    def _stored(self, block: KroneckerBlock) -> KroneckerBlock:
        return dataclasses.replace(
            block,
            a=1 if block.a_diagonal else block.a,
            g=1 if block.g_diagonal else block.g,
            bias=block.bias and not block.a_diagonal,
        )

    def _push(self, block: int, rows: Tensor | ConvRows | SquareSums) -> None:
        if not len(self._pending_of[block]):
            super()._push(block, rows)
            return
        for i in range(rows.groups if isinstance(rows, ConvRows) else 1):
            pending = self._pending_of[block + i]
            sums, count = self._square_sums(rows, i)
            pending[: len(sums)] += sums
            total = sums.sum()
            if len(pending) > len(sums):  # the bias
                pending[-1] += count
                total = total + count
            self._dirty = True
            super()._push(block + i, (total / len(pending)).sqrt().view(1, 1))

    def _square_sums(self, rows: Tensor | ConvRows | SquareSums, group: int) -> tuple[Tensor, int]:
        """Σ over rows of the squares, and the number of rows."""
        dtype = self.diagonals.dtype
        if isinstance(rows, SquareSums):
            return rows.sums.to(dtype), rows.rows
        if isinstance(rows, Tensor):
            return torch.linalg.vector_norm(rows, dim=0, dtype=dtype).square(), len(rows)
        # Patches are linear in the image: those of the summed squares are the sums of squared patches.
        squares = torch.linalg.vector_norm(rows.x, dim=0, keepdim=True, dtype=dtype).square()
        one = ConvRows(squares, rows.kernel, rows.stride, rows.padding, rows.dilation, rows.groups, rows.padding_mode)
        return one.patches(group).sum(0), rows.shape[0]

    @property
    def symmetric(self) -> list[Tensor]:
        return []  # not all of the sums are matrices

    def rescale(self, terms: Tensor) -> None:
        super().rescale(terms)
        if self.empirical_mean:
            self._pending_diagonals[self._of_gradients :].mul_(terms**2)

    def _commit(self, decay: Tensor, scale: Tensor, gate: Tensor) -> None:
        super()._commit(decay, scale, gate)
        updated = self.spread(decay) * self.diagonals + self.spread(scale) * self._pending_diagonals
        self.diagonals.copy_(torch.where(gate != 0, updated, self.diagonals))
        self._pending_diagonals.zero_()

    def state(self, layer: int) -> dict[str, list[Tensor]]:
        return super().state(layer) | self.diagonals_of("factor", self.diagonals, layer)

    def diagonals_of(self, name: str, flat: Tensor, layer: int) -> dict[str, list[Tensor]]:
        """A layer's diagonals in a buffer laid out like `diagonals`, as entries of a state."""
        views = self.by_factor(flat)
        state: dict[str, list[Tensor]] = {}
        for side, first in (("a", 0), ("g", self.count)):
            own = [views[first + i] for i in self.blocks_of(layer) if len(views[first + i])]
            state |= stackable(f"{side}_{name}_diagonal", own) if own else {}
        return state


class DiagonalFisher(BlockDiagonalFisher):
    """U = G⁻¹ V A⁻¹ where one of the factors, or both, is diagonal.

    Args:
        layers: In the order in which rows and gradients come.
        factors: Their running factors.
    """

    name = "diagonal"
    factors: DiagonalFactors

    def __init__(self, layers: list[KroneckerLayer], factors: DiagonalFactors) -> None:
        super().__init__(layers, factors)
        self.diagonals = torch.ones_like(factors.diagonals)  # of the inverses
        self._kept = list(range(factors.count))

    def update(self, gamma: Tensor, layers: Sequence[int] | None = None) -> None:
        super().update(gamma, layers)
        # A factor that was never committed is zero and has damping 1.
        inverse = (self.factors.diagonals + self.factors.spread(self.damped.damping(gamma))).reciprocal()
        if layers is not None:
            chosen = self._blocks_of(layers)
            mask = torch.zeros(2 * self.factors.count, dtype=torch.bool)
            mask[[first + i for first in (0, self.factors.count) for i in chosen]] = True
            inverse = torch.where(self.factors.spread(mask.to(inverse.device)), inverse, self.diagonals)
        self.diagonals.copy_(inverse)

    def inverses(self, layer: int) -> list[Tensor]:
        views = self.factors.by_factor(self.diagonals)
        own = [first + i for first in (0, self.factors.count) for i in self.factors.blocks_of(layer)]
        return [views[i] if len(views[i]) else self.damped.inverse[i] for i in own]

    def keep(self, layers: Sequence[int]) -> None:
        self._kept = self._blocks_of(layers)

    def apply(self, gradients: Sequence[Gradient], out: Sequence[Gradient]) -> Tensor:
        views, count = self.factors.by_factor(self.diagonals), self.factors.count
        sides = [view if len(view) else matrix for view, matrix in zip(views, self.damped.inverse, strict=True)]
        dots = [_apply(v, u, sides[i], sides[count + i]) for v, u, i in zip(gradients, out, self._kept, strict=True)]
        return torch.stack(dots) if dots else self.diagonals.new_zeros(0)

    def state(self, layer: int) -> dict[str, list[Tensor]]:
        inverse = self.factors.diagonals_of("inverse", self.diagonals, layer)
        return self.factors.state(layer) | self.damped.state(layer) | inverse

    def conditions(self) -> Tensor:
        of_matrices = self.damped.conditions()
        of_diagonals = [
            view.max() / view.min() if len(view) else None for view in self.factors.by_factor(self.diagonals)
        ]
        pairs = zip(of_matrices, of_diagonals, strict=True)
        return torch.stack([whole if own is None else own for whole, own in pairs]).view(2, -1).prod(0)


def _apply(gradient: Gradient, out: Gradient, a: Tensor, g: Tensor) -> Tensor:
    """U = G⁻¹ V A⁻¹ with the inverses as matrices or diagonals, into ``out``; ⟨V, U⟩."""
    weight, bias = gradient if isinstance(gradient, tuple) else (gradient, None)
    into, bias_into = out if isinstance(out, tuple) else (out, None)
    v = weight.reshape(weight.shape[0], -1).to(a.dtype)
    u = _left(g, v)
    if bias is None:
        u = _right(u, a)
        into.copy_(u.view(into.shape) if u.is_contiguous() else u.reshape(into.shape))
        return (v * u).sum()
    b = bias.to(a.dtype)
    last = _left(g, b.unsqueeze(1))
    whole = _right(u, a[..., :-1, :-1] if a.ndim == 2 else a[:-1])
    if a.ndim == 2:  # the bias is a column of V, and A joins it with the others
        whole = torch.addmm(whole, last, a[-1:, :-1])
        last = last * a[-1, -1] + u @ a[:-1, -1:]
    else:
        last = last * a[-1]
    into.copy_(whole.reshape(into.shape))
    assert bias_into is not None
    bias_into.copy_(last.squeeze(1))
    return (v * whole).sum() + (b * last.squeeze(1)).sum()


def _left(inverse: Tensor, v: Tensor) -> Tensor:
    return inverse @ v if inverse.ndim == 2 else inverse.unsqueeze(1) * v


def _right(v: Tensor, inverse: Tensor) -> Tensor:
    return v @ inverse if inverse.ndim == 2 else v * inverse
