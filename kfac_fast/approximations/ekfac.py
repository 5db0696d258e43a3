"""EKFAC: the Kronecker factors give a basis, the gradients themselves the eigenvalues in it (George et al. 2018)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..factors import Factors
from ..inverses import KFACWarning
from ..layers import Block, Inputs, KroneckerBlock, KroneckerLayer
from ..ops import Gradient
from ..tape import Pass
from .base import Approximation, as_matrix, block_names, eigenvectors, write_matrix
from .spectra import Spectra


class EigenFisher(Approximation):
    """U = U_G [(U_Gᵀ V U_A) ⊘ (S + λ)] U_Aᵀ, with U_A and U_G the eigenvectors of A and G.

    S is what K-FAC takes to be the product of the eigenvalues of A and G; here it is the mean square of per-example
    gradients in that basis, renewed by every batch of statistics, while the basis is renewed by `update` only. In the
    first basis S starts as that product, which counts as its first estimate. When the basis changes, S becomes the
    diagonal in the new basis of the matrix it stood for in the old one.

    A block whose factors have no eigenvectors in their precision, or are not finite, keeps its basis and S; that is
    counted and said once. A block without a basis takes the plain gradient.

    Args:
        layers: In the order in which rows and gradients come.
        factors: Their running A and G.
    """

    name = "ekfac"

    def __init__(self, layers: list[KroneckerLayer], factors: Factors) -> None:
        self.layers = layers
        self.factors = factors
        self.bases = factors.running.empty_like()
        for basis in self.bases:
            basis.copy_(torch.eye(len(basis)))
        self.based_on = torch.zeros_like(factors.updates)  # commits of the factors that the bases were made from
        self.spectra = Spectra(layers, factors, self.bases, self.based_on)
        self.stores = [factors, self.spectra]
        self._damping = factors.running.data.new_ones(factors.count)  # λ
        self._failures = torch.zeros(factors.count, dtype=torch.int32, device=factors.running.device)
        self._names = block_names(layers)
        self._said: set[int] = set()

    def add_rows(self, layer: int, inputs: Inputs, gradient: Tensor, sent: Pass, block: int = 0) -> None:
        self.factors.add_rows(layer, inputs, gradient, block, first=sent.first)
        self.spectra.add_rows(layer, inputs, gradient, sent, block)

    def seen(self, layer: int) -> bool:
        return self.factors.seen(layer)

    def update(self, gamma: Tensor, layers: Sequence[int] | None = None) -> None:
        chosen = range(len(self.layers)) if layers is None else layers
        blocks = [block for layer in chosen for block in self.factors.blocks_of(layer)]
        # With the same factors (another γ is tried, statistics are not due) the bases would be the same.
        changed = (self.factors.updates != self.based_on).view(2, -1).any(0).tolist()
        for block in blocks:
            if changed[block]:
                self._rebase(block)
        based = self.based_on[: self.factors.count] > 0
        damping = torch.where(based, gamma.square(), torch.ones_like(gamma))
        self._damping[blocks] = damping[blocks]

    def _rebase(self, block: int) -> None:
        sides = [block, self.factors.count + block]
        found = [eigenvectors(self.factors.running[side]) for side in sides]
        if found[0] is None or found[1] is None:
            self._failures[block] += 1
            self._warn(block)
            return
        (d_a, new_a), (d_g, new_g) = found[0], found[1]
        old_a, old_g = (self.bases[side] for side in sides)
        s = self.spectra.running[block]
        if bool(self.spectra.updates[block] > 0):
            s.copy_((new_g.T @ old_g).square() @ s @ (old_a.T @ new_a).square())
        else:
            s.copy_(torch.outer(d_g, d_a))
            self.spectra.updates[block] = 1
        old_a.copy_(new_a)
        old_g.copy_(new_g)
        self.based_on[sides] = self.factors.updates[sides]

    def _warn(self, block: int) -> None:
        if block in self._said:
            return
        self._said.add(block)
        warnings.warn(
            f"the factors of {self._names[block]} have no eigenvectors in their precision; the block kept its last "
            "basis, or the plain gradient. Said once per block",
            KFACWarning,
            stacklevel=2,
        )

    def inverses(self, layer: int) -> list[Tensor]:
        own, count = self.factors.blocks_of(layer), self.factors.count
        views = [view for i in own for view in (self.bases[i], self.bases[count + i], self.spectra.running[i])]
        vectors = (self.based_on[: self.factors.count], self.based_on[count:], self._damping, self.spectra.updates)
        return views + [vector[own.start : own.stop] for vector in vectors]

    def apply(self, gradients: Sequence[Gradient], out: Sequence[Gradient]) -> Tensor:
        count, dtype = self.factors.count, self.factors.running.dtype
        dot = self.factors.running.data.new_empty(count)
        for i, (gradient, result) in enumerate(zip(gradients, out, strict=True)):
            u_a, u_g = self.bases[i], self.bases[count + i]
            turned = u_g.T @ as_matrix(gradient, dtype) @ u_a
            divided = turned / (self.spectra.running[i] + self._damping[i])
            dot[i] = (turned * divided).sum()
            write_matrix(u_g @ divided @ u_a.T, result)
        return dot

    def state(self, layer: int) -> dict[str, list[Tensor]]:
        own = self.factors.blocks_of(layer)
        return {
            **self.factors.state(layer),
            **self.spectra.state(layer),
            **self.factors.matrices_of("basis", self.bases, layer),
            "based_on": self.factors.per_side(self.based_on, layer),
            "damping": [self._damping[own.start : own.stop]],
            "failures": [self._failures[own.start : own.stop]],
        }

    @classmethod
    def numbers(cls, block: Block) -> int:
        assert isinstance(block, KroneckerBlock)
        # Factors, their pending sums and bases; S and its pending sums.
        return 3 * block.numbers + 2 * block.a * block.g

    def failures(self) -> Tensor:
        return self._failures

    def conditions(self) -> Tensor:
        damped = [s + damping for s, damping in zip(self.spectra.running, self._damping, strict=True)]
        return torch.stack([s.max() / s.min() for s in damped]) if damped else self._damping
