"""The store of EKFAC: second moments of per-example gradients in the eigenbases of the factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..factors import Factors
from ..layers import Inputs, KroneckerBlock, KroneckerLayer
from ..ops import BlockDiagonal, ConvRows
from ..statistics import Store, blend, rectangles
from ..tape import Pass

# Examples are taken in pieces whose rows and gradients need about this much memory.
PIECE_BYTES = 16 * 2**20


class Spectra(Store):
    """S = E[(U_Gᵀ (Σ g aᵀ) U_A)∘²], the inner sum over the positions of an example (George et al. 2018, sec. 3).

    It is the diagonal of the Fisher block in the basis U_G ⊗ U_A, without the assumption that a and g are independent.
    Where the examples cannot be told apart in a layer's rows, every position counts as one. Averages, ε and scale are
    those of the G of `Factors`. Sums of a block that has no bases yet are dropped.

    Args:
        layers: In the order in which `add_rows` numbers them.
        factors: Their A and G.
        bases: U_A and U_G, laid out like the factors.
        based_on: Commits ``[2b]`` of the factors that the bases were made from; 0 is none.
    """

    def __init__(
        self, layers: Sequence[KroneckerLayer], factors: Factors, bases: BlockDiagonal, based_on: Tensor
    ) -> None:
        self._layers = layers
        self._factors = factors
        self._bases = bases
        self._based_on = based_on
        self._blocks = [block for layer in layers for block in layer.blocks]
        shapes = [(block.g, block.a) for block in self._blocks]
        self._flat, self.running = rectangles(shapes, bases.data)
        self.sums, self._sums = rectangles(shapes, bases.data)
        self._numel = torch.tensor([g * a for g, a in shapes], dtype=torch.int64).to(bases.device)
        self.updates = bases.data.new_zeros(len(shapes))  # k of every block
        self._waiting: dict[tuple[int, int], tuple[Pass, list[_Use]]] = {}  # by layer and block
        self._dirty = False
        self.reset()

    def reset(self) -> None:
        self._waiting.clear()
        if self._dirty:
            self.sums.zero_()
        self._dirty = False
        self.rows = [0] * len(self._blocks)
        self.nonfinite = None

    def add_rows(self, layer: int, inputs: Inputs, gradient: Tensor, sent: Pass, block: int) -> None:
        """Adds one use's rows; where a pass brings several uses, when the last has come: examples have one gradient."""
        use = _Use.of(self._layers[layer], inputs, gradient, sent.examples)
        sent_before, uses = self._waiting.pop((layer, block), (sent, []))
        if sent_before is not sent:  # that pass brought fewer: the outputs did not depend on all
            self._add(layer, block, uses)
            uses = []
        uses.append(use)
        if len(uses) < sent.count(layer, block):
            self._waiting[layer, block] = sent, uses
        else:
            self._add(layer, block, uses)

    def flush(self) -> None:
        for (layer, block), (_, uses) in self._waiting.items():
            self._add(layer, block, uses)
        self._waiting.clear()
        if self._dirty:
            self.nonfinite = (~self.sums.isfinite()).any().to(torch.int32).reshape(1)

    def _add(self, layer: int, block: int, uses: list[_Use]) -> None:
        self._dirty = True
        if len({use.examples for use in uses}) > 1:
            for use in uses:
                self._add(layer, block, [use])
            return
        first = self._factors.first_block[layer] + block
        for group in range(uses[0].groups):
            self.rows[first + group] += uses[0].examples
            self._add_squares(first + group, group, uses)

    def _add_squares(self, index: int, group: int, uses: list[_Use]) -> None:
        """Σ over examples of (U_Gᵀ E U_A)∘² with E = Σ g aᵀ over uses and positions."""
        block, sums = self._blocks[index], self._sums[index]
        u_a, u_g = self._bases[index], self._bases[self._factors.count + index]
        positions = sum(use.positions for use in uses)
        # Turning the rows or turning the gradient made of them: whichever is less work.
        rows_first = positions * (block.a**2 + block.g**2) <= block.a * block.g * (block.a + block.g)
        per_example = 2 * u_a.element_size() * max(positions * (block.a + block.g), block.a * block.g * (positions > 1))
        step = max(1, PIECE_BYTES // per_example)
        for start in range(0, uses[0].examples, step):
            gradients: Tensor | None = None  # [n, g, a]
            for use in uses:
                a, g = use.piece(start, step, group, block, u_a.dtype)  # [n, t, a], [n, t, g]
                if rows_first:
                    a, g = a @ u_a, g @ u_g
                if positions == 1:
                    sums.addmm_(g[:, 0].square().T, a[:, 0].square())
                    continue
                e = g.mT @ a
                gradients = e if gradients is None else gradients.add_(e)
            if gradients is not None:
                if not rows_first:
                    gradients = u_g.T @ (gradients @ u_a)
                sums += gradients.square_().sum(0)

    def rescale(self, terms: Tensor) -> None:
        if self._factors.empirical_mean:
            self.sums.mul_(terms**2)

    def commit(self, rows: Tensor, terms: Tensor, gate: Tensor) -> None:
        seen = (rows > 0) & (self._based_on[: len(rows)] > 0)
        epsilon, self.updates = blend(self.updates, seen, gate, self._factors.decay)
        weight = (1 - epsilon) * terms.clamp(min=1).reciprocal()
        epsilon, weight = (x.repeat_interleave(self._numel, output_size=len(self._flat)) for x in (epsilon, weight))
        blended = torch.addcmul(epsilon * self._flat, weight, self.sums)
        # ε = 1 must not let through what was dropped: 0 · NaN is NaN.
        torch.where((gate != 0) & (weight > 0), blended, self._flat, out=self._flat)
        self.sums.zero_()
        self._dirty = False

    def state(self, layer: int) -> dict[str, list[Tensor]]:
        own = self._factors.blocks_of(layer)
        spectra = {f"spectrum_{n}": [self.running[i]] for n, i in enumerate(own)}
        return {**spectra, "spectrum_updates": [self.updates[own.start : own.stop]]}


@dataclass
class _Use:
    """The rows of one use, by example.

    Attributes:
        a: Inputs without the bias, ``[N, T, d]``, or the patches of images.
        g: Output gradients, ``[N, T, g]``, or the positions of images.
        examples: N.
        positions: T.
    """

    a: Tensor | ConvRows
    g: Tensor | ConvRows
    examples: int
    positions: int

    @classmethod
    def of(cls, layer: KroneckerLayer, inputs: Inputs, gradient: Tensor, examples: int) -> _Use:
        a, g = layer.input_rows(*inputs), layer.output_rows(gradient, *inputs)
        assert isinstance(a, (Tensor, ConvRows))  # known squares alone are for diagonal factors
        count = a.shape[0]
        if isinstance(a, ConvRows):
            return cls(a, g, len(a.x), count // len(a.x))
        assert isinstance(g, Tensor)
        lead = tuple(inputs[0].shape[:-1])
        if examples not in lead or math.prod(lead) != count:
            lead, examples = (count,), count
        at = lead.index(examples)
        a, g = (rows.unflatten(0, lead).movedim(at, 0).reshape(examples, -1, rows.shape[-1]) for rows in (a, g))
        return cls(a, g, examples, count // examples)

    @property
    def groups(self) -> int:
        return self.a.groups if isinstance(self.a, ConvRows) else 1

    def piece(
        self, start: int, count: int, group: int, block: KroneckerBlock, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Rows of some examples, ``[n, T, a]`` with the 1 for the bias and ``[n, T, g]``."""
        a, g = (_piece(rows, start, count, group).to(dtype) for rows in (self.a, self.g))
        return F.pad(a, (0, 1), value=1.0) if block.bias else a, g


def _piece(rows: Tensor | ConvRows, start: int, count: int, group: int) -> Tensor:
    if isinstance(rows, Tensor):
        return rows[start : start + count]
    x = rows.x[start : start + count]
    part = ConvRows(x, rows.kernel, rows.stride, rows.padding, rows.dilation, rows.groups, rows.padding_mode)
    return part.patches(group).unflatten(0, (len(x), -1))
