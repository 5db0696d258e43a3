"""The block-tridiagonal inverse for chains of linear layers (Martens & Grosse 2015, sec. 4.3, App. B)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..chain import NotAChainError, Trace, chain_of
from ..factors import Factors
from ..inverses import KFACWarning
from ..layers import Block, Inputs, KroneckerBlock, KroneckerLayer
from ..layers.linear import LinearLayer
from ..ops import Gradient
from ..tape import Pass
from .base import as_matrix, eigenvectors, write_matrix
from .block_diagonal import BlockDiagonalFisher
from .cross_factors import CrossFactors

_ADVICE = "approximation='block_diagonal' and 'ekfac' take any model"


@dataclass
class _Pair:
    """What the update of a layer i and the next one j needs beside the inverses of their factors.

    Attributes:
        psi_a: Ψᴬ = A_ij A_j⁻¹, ``[a_i, a_j]``.
        psi_g: Ψᴳ = G_ij G_j⁻¹, ``[g_i, g_j]``.
        root_a: L ``[a_i, r]``, r = min(a_i, a_j), with L Lᵀ = A_i⁻¹ (Ψᴬ A_j Ψᴬᵀ) A_i⁻¹ and LᵀA_iL = diag(d).
        root_g: The same of G.
        d_a: Squared canonical correlations of the two layers' inputs ``[r]``, in [0, 1).
        d_g: The same of their output gradients.
    """

    psi_a: Tensor
    psi_g: Tensor
    root_a: Tensor
    root_g: Tensor
    d_a: Tensor
    d_g: Tensor

    @classmethod
    def between(cls, a_cross: Tensor, g_cross: Tensor) -> _Pair:
        """Zeros: layers that know nothing of each other."""
        psi_a, psi_g = torch.zeros_like(a_cross), torch.zeros_like(g_cross)
        ranks = [min(psi.shape) for psi in (psi_a, psi_g)]
        roots = [psi.new_zeros(len(psi), r) for psi, r in zip((psi_a, psi_g), ranks, strict=True)]
        return cls(psi_a, psi_g, *roots, *(psi_a.new_zeros(r) for r in ranks))

    def tensors(self) -> list[Tensor]:
        return list(vars(self).values())

    @property
    def gap(self) -> Tensor:
        """Smallest eigenvalue of Σ_{i|i+1} relative to A_i ⊗ G_i; the approximation is positive definite above 0."""
        return 1 - self.d_a.max() * self.d_g.max()


class BlockTridiagonalFisher(BlockDiagonalFisher):
    """F̂⁻¹ = Ξᵀ Λ Ξ: the gradients of a layer given those of the next are independent of all later ones.

    The factors on the diagonal are damped as in `BlockDiagonalFisher`, the cross factors are not. With P = A_i⁻¹ and
    Q = G_i⁻¹ the inverse of Σ_{i|i+1}, a difference of two Kronecker products, is

        V ↦ Q V P + L_G [(L_Gᵀ V L_A) ⊘ (1 − d_G d_Aᵀ)] L_Aᵀ,

    which is App. B with the block-diagonal inverse taken out: the sum needs roots of the size of the smaller of the two
    layers only, and where the cross factors vanish, or a pair fails, the block-diagonal inverse is what is left.

    A pair whose 1 − d_G d_Aᵀ comes close to 0, or whose numbers are not finite, is treated as if its cross factors
    were zero; that is counted and said once.

    Args:
        layers: Linear layers only. Until the first forward pass shows the order in which they feed each other, the
            order given is taken.
        factors: Their running A and G.

    Raises:
        ValueError: There is another kind of layer.
    """

    name = "block_tridiagonal"
    symmetric = False
    divisible = False
    needs_trace = True

    def __init__(self, layers: list[KroneckerLayer], factors: Factors) -> None:
        for layer in layers:
            if not isinstance(layer, LinearLayer):
                raise ValueError(
                    f"approximation='block_tridiagonal' takes chains of Linear layers, but {layer.name} is a "
                    f"{type(layer.module).__name__}; {_ADVICE}"
                )
        super().__init__(layers, factors)
        self.cross = CrossFactors(layers, factors)
        self.stores = [factors, self.cross]
        self.broken = torch.zeros(len(layers), dtype=torch.int32, device=factors.running.device)
        self._said: set[int] = set()
        self._wire(list(range(len(layers))))

    # ---- the chain --------------------------------------------------------------------------------------------------

    def _wire(self, order: list[int]) -> None:
        self._order = order
        self.cross.wire(order)
        self._pairs = [_Pair.between(a, g) for a, g in zip(self.cross.a, self.cross.g, strict=True)]

    def take_trace(self, trace: Trace) -> None:
        try:
            order = chain_of(trace, [layer.name for layer in self.layers])
        except NotAChainError as error:
            raise NotAChainError(
                f"approximation='block_tridiagonal' needs a model whose layers are a chain: {error}. {_ADVICE}"
            ) from None
        self._rewire(order)

    @property
    def order(self) -> dict[str, int]:
        return {self.layers[i].name: place for place, i in enumerate(self._order)}

    def take_order(self, order: Mapping[str, int]) -> None:
        if set(order) == set(self.order):
            self._rewire(sorted(range(len(self.layers)), key=lambda i: order[self.layers[i].name]))

    def _rewire(self, order: list[int]) -> None:
        if order == self._order:
            return
        if bool(self.cross.updates):
            before, now = ([self.layers[i].name for i in x] for x in (self._order, order))
            raise ValueError(f"the layers are a chain in the order {now}, but were one in the order {before}")
        self._wire(order)

    def add_rows(self, layer: int, inputs: Inputs, gradient: Tensor, sent: Pass, block: int = 0) -> None:
        super().add_rows(layer, inputs, gradient, sent, block)
        self.cross.add_rows(layer, inputs, gradient, sent)

    # ---- inverse ----------------------------------------------------------------------------------------------------

    def update(self, gamma: Tensor, layers: Sequence[int] | None = None) -> None:
        positions = range(len(self.layers)) if layers is None else sorted(self.cross.position[i] for i in layers)
        if layers is not None:  # a pair needs the inverses of its second layer too
            layers = [i for i, q in self.cross.position.items() if q in positions or q - 1 in positions]
        super().update(gamma, layers)
        for p in positions:
            if p < len(self._pairs):
                self._update_pair(p)

    def _update_pair(self, p: int) -> None:
        """Recomputes a pair, or takes it apart where that fails."""
        pair, count = self._pairs[p], self.factors.count
        i, j = self._order[p], self._order[p + 1]
        inverse = self.damped.inverse
        a = _correlate(inverse[i], inverse[j], self.cross.a[p])
        g = _correlate(inverse[count + i], inverse[count + j], self.cross.g[p])
        new = None if a is None or g is None else _Pair(a[0], g[0], a[1], g[1], a[2], g[2])
        # Eigenvalues carry an error of some rounding units ε, so with a gap below √ε the quotient would be noise.
        if new is not None and bool(new.gap > torch.finfo(new.gap.dtype).eps ** 0.5):
            torch._foreach_copy_(pair.tensors(), new.tensors())
            return
        torch._foreach_zero_(pair.tensors())
        self.broken[i] += 1
        self._warn(p)

    def _warn(self, p: int) -> None:
        if p in self._said:
            return
        self._said.add(p)
        first, second = (self.layers[self._order[q]].name for q in (p, p + 1))
        warnings.warn(
            f"layers {first} and {second} are too strongly correlated for this damping and precision; the pair was "
            "treated as block-diagonal. Said once per pair; raise damping if it goes on",
            KFACWarning,
            stacklevel=2,
        )

    def inverses(self, layer: int) -> list[Tensor]:
        p = self.cross.position[layer]
        own = self._pairs[p].tensors() if p < len(self._pairs) else []
        return super().inverses(layer) + own

    def apply(self, gradients: Sequence[Gradient], out: Sequence[Gradient]) -> Tensor:
        count, dtype = self.factors.count, self.factors.running.dtype
        v = [as_matrix(gradient, dtype) for gradient in gradients]
        v1 = list(v)
        for p, pair in enumerate(self._pairs):
            i, j = self._order[p], self._order[p + 1]
            v1[i] = v[i] - _sandwich(pair.psi_g, v[j], pair.psi_a.T)
        v2 = [torch.empty_like(x) for x in v]
        ops.precondition(v1, self.damped.g, self.damped.a, out=v2)
        for p, pair in enumerate(self._pairs):
            i = self._order[p]
            middle = _sandwich(pair.root_g.T, v1[i], pair.root_a)
            middle /= 1 - torch.outer(pair.d_g, pair.d_a)
            v2[i] += _sandwich(pair.root_g, middle, pair.root_a.T)
        dot = self.factors.running.data.new_empty(count)
        for p, i in enumerate(self._order):
            u = v2[i]
            if p:
                pair = self._pairs[p - 1]
                u = u - _sandwich(pair.psi_g.T, v2[self._order[p - 1]], pair.psi_a)
            dot[i] = (v[i] * u).sum()
            write_matrix(u, out[i])
        return dot

    # ---- about it ---------------------------------------------------------------------------------------------------

    def state(self, layer: int) -> dict[str, list[Tensor]]:
        p = self.cross.position[layer]
        if p < len(self._pairs):
            own = dict(vars(self._pairs[p]))
        else:
            own = dict.fromkeys(_Pair.__annotations__, self.factors.running.data.new_empty(0))
        return {
            **super().state(layer),
            **self.cross.state(layer),
            **{key: [tensor] for key, tensor in own.items()},
            "broken": [self.broken[layer : layer + 1]],
        }

    @classmethod
    def numbers(cls, block: Block) -> int:
        # Cross factors, their pending sums, Ψ and roots are rectangles between neighbours: together at most as many
        # numbers as four sets of factors, and two vectors.
        assert isinstance(block, KroneckerBlock)
        return super().numbers(block) + 4 * block.numbers + block.a + block.g

    def memory(self, layer: int) -> int:
        p = self.cross.position[layer]
        own = sum(tensor.nbytes for tensor in self._pairs[p].tensors()) if p < len(self._pairs) else 0
        numbers = sum(BlockDiagonalFisher.numbers(block) for block in self.layers[layer].blocks)
        return numbers * self.factors.sums.element_size() + 2 * self.cross.bytes(layer) + own

    def failures(self) -> Tensor:
        return super().failures() + self.broken

    def conditions(self) -> Tensor:
        result = super().conditions()
        for p, pair in enumerate(self._pairs):
            result[self._order[p]] /= pair.gap
        return result


def _correlate(p: Tensor, q: Tensor, cross: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Ψ = C Q, L and d of one side of a pair (see `_Pair`), from inverses P of the first, Q of the second, and C.

    d are the eigenvalues of P^{½} C Q Cᵀ P^{½}, or of Q^{½} Cᵀ P C Q^{½} where that is the smaller matrix, and Cholesky
    factors serve as the roots. None where that cannot be computed.
    """
    first_is_smaller = len(p) <= len(q)
    root, info = torch.linalg.cholesky_ex(p if first_is_smaller else q)
    left = root.T @ cross if first_is_smaller else root.T @ cross.T
    product = left @ (q if first_is_smaller else p) @ left.T
    found = None if bool(info) else eigenvectors((product + product.T) / 2)
    if found is None:
        return None
    d, vectors = found
    return cross @ q, root @ vectors * d.sqrt() if first_is_smaller else p @ (left.T @ vectors), d


def _sandwich(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    """Product of the three matrices, in the cheaper order."""
    (m, k), n = left.shape, right.shape[1]
    rows = middle.shape[1]
    left_first = m * k * rows + m * rows * n
    return (left @ middle) @ right if left_first <= k * rows * n + m * k * n else left @ (middle @ right)
