"""An embedding and an output layer with one weight: the sum of both uses' blocks, inverted as the sum it is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..inverses import factored_damping
from ..layers import Block, Inputs, KroneckerBlock, KroneckerLayer
from ..ops import Gradient
from ..statistics import rectangles
from ..tape import Pass
from .base import Approximation
from .diagonal import DiagonalFactors


class TiedFisher(Approximation):
    """The weight ``[n, d]`` is a table of n entries, for the embedding, and a matrix of n outputs, for the head.

    Without the correlation between the two uses, its Fisher block is D₁ ⊗ G + D₂ ⊗ A: D₁ how often entries are used,
    G the second moments of the embedding's output gradients, A those of the head's inputs, D₂ the diagonal of those of
    its output gradients. So there is one d × d matrix per entry, d₁ G + d₂ A, and one basis X that diagonalises all of
    them: Xᵀ G X = I, Xᵀ A X = Λ. For row v of the gradient, hence,

        u = X ((d₁ + d₂ Λ)⁻¹ ∘ Xᵀ v),

    without a Kronecker approximation of the sum. All four factors are damped as usual, each use with half of λ. A bias
    of the head is a block of its own, D₂.

    Args:
        layers: Embedding, its head, embedding, its head, …
        factors: Their running factors.
    """

    name = "tied"
    divisible = True

    def __init__(self, layers: Sequence[KroneckerLayer], factors: DiagonalFactors) -> None:
        self.layers = layers
        self.factors = factors
        self.stores = [factors]
        self._embeddings = [_block(layer) for layer in layers[::2]]
        self._biases = [_block(layer).bias for layer in layers[1::2]]
        like = factors.diagonals
        sizes = [(block.a, block.g) for block in self._embeddings]
        self._bases = rectangles([(d, d) for _, d in sizes], like)[1]  # X
        self._ratios = rectangles([(d,) for _, d in sizes], like)[1]  # Λ
        self._weights = rectangles([(2, n) for n, _ in sizes], like)[1]  # d₁ and d₂
        for basis, weights in zip(self._bases, self._weights, strict=True):
            basis.fill_diagonal_(1)
            weights[0] = 1  # the plain gradient
        self._kept = list(range(len(self._embeddings)))  # pairs
        self._failures = torch.zeros(len(layers), dtype=torch.int32)

    def add_rows(self, layer: int, inputs: Inputs, gradient: Tensor, sent: Pass, block: int = 0) -> None:
        self.factors.add_rows(layer, inputs, gradient, block, first=sent.first)

    def seen(self, layer: int) -> bool:
        return self.factors.seen(layer)

    def update(self, gamma: Tensor, layers: Sequence[int] | None = None) -> None:
        damping = factored_damping(self.factors, gamma / math.sqrt(2))
        running, diagonals, count = (
            self.factors.running,
            self.factors.by_factor(self.factors.diagonals),
            len(self.layers),
        )
        committed = (self.factors.updates > 0).to(damping.dtype)
        for pair, block in enumerate(self._embeddings):
            embedding, head = 2 * pair, 2 * pair + 1
            if layers is not None and embedding not in layers and head not in layers:
                continue
            d1 = (diagonals[embedding] + damping[embedding]) * committed[embedding]
            d2 = (diagonals[count + head] + damping[count + head]) * committed[head]
            g = _damped(running[count + embedding], damping[count + embedding])
            a = _damped(running[head][: block.g, : block.g], damping[head])
            found = _joint_basis(g, a)
            if found is None:
                self._failures[embedding] += 1
                continue
            self._bases[pair].copy_(found[0])
            self._ratios[pair].copy_(found[1])
            self._weights[pair][0] = torch.where(committed[embedding] + committed[head] > 0, d1, torch.ones_like(d1))
            self._weights[pair][1] = d2

    def inverses(self, layer: int) -> list[Tensor]:
        pair = layer // 2
        return [] if layer % 2 else [self._bases[pair], self._ratios[pair], self._weights[pair]]

    def keep(self, layers: Sequence[int]) -> None:
        self._kept = [layer // 2 for layer in layers if layer % 2 == 0]

    def apply(self, gradients: Sequence[Gradient], out: Sequence[Gradient]) -> Tensor:
        dots: list[Tensor] = []
        for k, pair in enumerate(self._kept):
            basis, ratios, (d1, d2) = self._bases[pair], self._ratios[pair], self._weights[pair]
            v, into = gradients[2 * k], out[2 * k]
            assert isinstance(v, Tensor)
            assert isinstance(into, Tensor)
            v = v.t().to(basis.dtype)  # [n, d]
            u = (v @ basis / torch.addr(d1.unsqueeze(1), d2, ratios)) @ basis.t()
            into.copy_(u.t())
            dots.append((v * u).sum())
            head, head_out = gradients[2 * k + 1], out[2 * k + 1]
            dots.append(_bias(head, head_out, d2) if self._biases[pair] else dots[-1].new_zeros(()))
        return torch.stack(dots) if dots else self.factors.diagonals.new_zeros(0)

    def state(self, layer: int) -> dict[str, list[Tensor]]:
        if layer % 2:  # both stand under one parameter
            return {f"head_{key}": views for key, views in self.factors.state(layer).items()}
        names = ("basis", "ratios", "weights")
        inverses = {name: [view] for name, view in zip(names, self.inverses(layer), strict=True)}
        return self.factors.state(layer) | inverses | {"failures": [self._failures[layer]]}

    @classmethod
    def numbers(cls, block: Block) -> int:
        assert isinstance(block, KroneckerBlock)
        # Running sums and pending ones; the embedding's block stands for the inverse of both.
        return 2 * block.numbers + (block.g**2 + block.g + 2 * block.a if block.a_diagonal else 0)

    def failures(self) -> Tensor:
        return self._failures

    def conditions(self) -> Tensor:
        numbers: list[Tensor] = []
        for ratios, (d1, d2) in zip(self._ratios, self._weights, strict=True):
            values = torch.addr(d1.unsqueeze(1), d2, ratios)
            numbers += [values.max() / values.min(), d2.max() / d2.min()]
        return torch.stack(numbers)


def _block(layer: KroneckerLayer) -> KroneckerBlock:
    (block,) = layer.blocks
    return block


def _damped(matrix: Tensor, damping: Tensor) -> Tensor:
    damped = matrix.double()
    return damped + damping * torch.eye(len(damped), dtype=damped.dtype, device=damped.device)


def _joint_basis(g: Tensor, a: Tensor) -> tuple[Tensor, Tensor] | None:
    """X and Λ with Xᵀ G X = I and Xᵀ A X = Λ, in float64; None if G is not positive definite."""
    root, info = torch.linalg.cholesky_ex(g)
    if int(info):
        return None
    half = torch.linalg.solve_triangular(root, a, upper=False)  # L⁻¹ A
    whole = torch.linalg.solve_triangular(root, half.t(), upper=False)
    if not bool(whole.isfinite().all()):
        return None
    values, vectors = torch.linalg.eigh((whole + whole.t()) / 2)
    return torch.linalg.solve_triangular(root.t(), vectors, upper=True), values.clamp(min=0)


def _bias(gradient: Gradient, out: Gradient, d2: Tensor) -> Tensor:
    """The head's bias: its input is always 1, its block is D₂."""
    bias, into = gradient[1], out[1]
    assert bias is not None
    assert into is not None
    b = bias.to(d2.dtype)
    u = torch.where(d2 > 0, b / d2, b)
    into.copy_(u)
    return (b * u).sum()
