"""The store of the block-tridiagonal approximation: second moments between neighbouring layers of a chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..factors import Factors
from ..layers import Inputs, KroneckerLayer
from ..statistics import Store, blend, rectangles
from ..tape import Pass


@dataclass
class _Held:
    """A layer's rows that wait for those of its neighbours."""

    sent: Pass
    inputs: Tensor  # [m, d_in]
    gradient: Tensor  # [m, d_out]
    missing: int  # neighbours that have not come


class CrossFactors(Store):
    """A_{i,i+1} = E[a_i a_{i+1}ᵀ] and G_{i,i+1} = E[g_i g_{i+1}ᵀ] (Martens & Grosse 2015, sec. 4.3).

    Averages, ε and scale are those of `Factors`. No sum can overflow where the factors' do not, since
    |Σ x y|² ≤ Σ x² Σ y²: the gate of the factors covers these sums.

    Args:
        layers: All of them linear.
        factors: Their A and G.
    """

    def __init__(self, layers: Sequence[KroneckerLayer], factors: Factors) -> None:
        self._layers = layers
        self._factors = factors
        self.nonfinite = None
        self.wire(range(len(layers)))

    def wire(self, order: Sequence[int]) -> None:
        """Starts anew for layers that feed each other in this order."""
        self.position = {layer: p for p, layer in enumerate(order)}
        chain = [self._layers[i].blocks[0] for i in order]
        pairs = list(pairwise(chain))
        shapes = [(i.a, j.a) for i, j in pairs] + [(i.g, j.g) for i, j in pairs]
        self._running, views = rectangles(shapes, self._factors.running.data)
        self.sums, sums = rectangles(shapes, self._running)
        self.a, self.g = views[: len(pairs)], views[len(pairs) :]  # by position of the first of the two
        self._a_sums, self._g_sums = sums[: len(pairs)], sums[len(pairs) :]
        self._a_numel = sum(view.numel() for view in self.a)
        self.updates = self._running.new_zeros(1)
        self._held: dict[int, _Held] = {}
        self._checked: Pass | None = None  # the last pass whose order was that of the chain
        self._dirty = False
        self.reset()

    def reset(self) -> None:
        self._held.clear()
        self._checked = None
        if self._dirty:
            self.sums.zero_()
        self._dirty = False
        self.rows = [0]

    def flush(self) -> None:
        self._held.clear()

    def add_rows(self, layer: int, inputs: Inputs, gradient: Tensor, sent: Pass) -> None:
        """Multiplies the rows with those of the neighbours that came before, and keeps them for the others.

        Raises:
            ValueError: In this pass the layers did not run in the order of the chain, each once.
        """
        if sent is not self._checked:
            self._check(sent)
        p = self.position[layer]
        own = self._layers[layer]
        neighbours = [q for q in (p - 1, p + 1) if 0 <= q <= len(self.a)]
        dtype = self._running.dtype
        x, g = own.input_rows(*inputs), own.output_rows(gradient, *inputs)
        assert isinstance(x, Tensor) and isinstance(g, Tensor)  # noqa: PT018 - they are of a linear layer
        x, g = x.to(dtype), g.to(dtype)
        if p == 0 and sent.first:
            self.rows[0] += len(x)
        held = _Held(sent, x, g, len(neighbours))
        for q in neighbours:
            other = self._held.get(q)
            if other is None or other.sent is not sent:
                continue
            self._multiply(min(p, q), *((held, other) if p < q else (other, held)))
            held.missing -= 1
            other.missing -= 1
            if not other.missing:
                del self._held[q]
        if held.missing:
            self._held[p] = held

    def _check(self, sent: Pass) -> None:
        order = sorted(self.position, key=self.position.__getitem__)
        ran = [layer for layer, _ in sent.uses if layer in self.position]
        if ran != order:
            names = [[self._layers[i].name for i in x] for x in (ran, order)]
            raise ValueError(
                f"the model ran its layers in the order {names[0]}, but was a chain in the order {names[1]}"
            )
        self._checked = sent

    def _multiply(self, pair: int, first: _Held, second: _Held) -> None:
        self._dirty = True
        self._g_sums[pair].addmm_(first.gradient.T, second.gradient)
        if not first.sent.first:
            return
        x, y, sums = first.inputs, second.inputs, self._a_sums[pair]
        rows, columns = x.shape[1], y.shape[1]
        sums[:rows, :columns].addmm_(x.T, y)
        # The ones that stand for the biases, where there are some.
        if sums.shape[1] > columns:
            sums[:rows, columns] += x.sum(0)
        if sums.shape[0] > rows:
            sums[rows, :columns] += y.sum(0)
        if sums.shape[0] > rows and sums.shape[1] > columns:
            sums[rows, columns] += len(x)

    def rescale(self, terms: Tensor) -> None:
        if self._factors.empirical_mean:
            self.sums[self._a_numel :].mul_(terms**2)

    def commit(self, rows: Tensor, terms: Tensor, gate: Tensor) -> None:
        epsilon, self.updates = blend(self.updates, rows > 0, gate, self._factors.decay)
        a, g = self._running[: self._a_numel], self._running[self._a_numel :]
        weights = rows.clamp(min=1).reciprocal(), terms.clamp(min=1).reciprocal()
        pieces = self.sums.split([len(a), len(g)])
        for running, sums, weight in zip((a, g), pieces, weights, strict=True):
            blended = torch.addcmul(epsilon * running, sums, (1 - epsilon) * weight)
            torch.where(gate != 0, blended, running, out=running)
        self.sums.zero_()
        self._dirty = False

    def state(self, layer: int) -> dict[str, list[Tensor]]:
        p = self.position[layer]
        # The last layer has entries too, so that they are there whatever the order.
        a, g = (self.a[p], self.g[p]) if p < len(self.a) else 2 * (self._running.new_empty(0),)
        return {"a_cross": [a], "g_cross": [g], "cross_updates": [self.updates]}

    def bytes(self, layer: int) -> int:
        """Of one set of the moments between the layer and the next."""
        p = self.position[layer]
        return (self.a[p].nbytes + self.g[p].nbytes) if p < len(self.a) else 0
