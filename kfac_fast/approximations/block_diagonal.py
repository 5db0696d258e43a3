"""One block A ⊗ G per layer, inverted factor by factor (Martens & Grosse 2015, sec. 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import ops
from ..factors import Factors
from ..inverses import Inverses
from ..layers import Block, Inputs, KroneckerLayer
from ..ops import Gradient
from ..tape import Pass
from .base import Approximation, block_names

BUFFERS = 3  # running factors, pending sums, inverses


class BlockDiagonalFisher(Approximation):
    """U = G⁻¹ V A⁻¹ for every block.

    Args:
        layers: In the order in which rows and gradients come.
        factors: Their running A and G.
    """

    name = "block_diagonal"
    symmetric = True
    divisible = True

    def __init__(self, layers: list[KroneckerLayer], factors: Factors) -> None:
        self.layers = layers
        self.factors = factors
        self.stores = [factors]
        self.damped = Inverses(factors, block_names(layers))

    def add_rows(self, layer: int, inputs: Inputs, gradient: Tensor, sent: Pass, block: int = 0) -> None:
        self.factors.add_rows(layer, inputs, gradient, block, first=sent.first)

    def seen(self, layer: int) -> bool:
        return self.factors.seen(layer)

    def update(self, gamma: Tensor, layers: Sequence[int] | None = None) -> None:
        self.damped.update(gamma, None if layers is None else self._blocks_of(layers))

    def inverses(self, layer: int) -> list[Tensor]:
        return [view for views in self.damped.matrices(layer).values() for view in views]

    def inverse_bytes(self, layer: int) -> int:
        return sum(block.numbers for block in self.layers[layer].blocks) * self.factors.sums.element_size()

    def keep(self, layers: Sequence[int]) -> None:
        self.damped.keep(self._blocks_of(layers))

    def _blocks_of(self, layers: Sequence[int]) -> list[int]:
        return [block for layer in layers for block in self.factors.blocks_of(layer)]

    def apply(self, gradients: Sequence[Gradient], out: Sequence[Gradient]) -> Tensor:
        return ops.precondition(gradients, self.damped.g, self.damped.a, out=out).dot

    def state(self, layer: int) -> dict[str, list[Tensor]]:
        return {**self.factors.state(layer), **self.damped.state(layer)}

    @classmethod
    def numbers(cls, block: Block) -> int:
        return BUFFERS * block.numbers

    def failures(self) -> Tensor:
        return self.damped.failures.view(2, -1).sum(0)

    def conditions(self) -> Tensor:
        return self.damped.conditions().view(2, -1).prod(0)
