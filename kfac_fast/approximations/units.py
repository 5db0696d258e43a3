"""Scale and shift of normalisation layers: a 2×2 block of the Fisher matrix per unit, without a Kronecker form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..layers import Block, Inputs, UnitLayer
from ..ops import Gradient
from ..statistics import Store, blend
from ..tape import Pass
from .base import Approximation
from .block_diagonal import BUFFERS

# Rows wait until this many bytes are there: `factors.QUEUE_BYTES` for layers that are small.
QUEUE_BYTES = 4 * 2**20


class UnitMoments(Store):
    """Second moments of the gradients of scale and shift of all units of all layers, three numbers each.

    They are sums over the examples of a step, divided by the number of loss terms: the exact 2×2 blocks.

    Args:
        layers: In the order in which `add_rows` numbers them.
        decay: ε_max in [0, 1).
        dtype: float32 or float64.
        device: Where the parameters are.
        empirical_mean: Gradients are those of a mean over the M loss terms of a step rather than of a sum.
    """

    def __init__(
        self,
        layers: Sequence[UnitLayer],
        decay: float,
        dtype: torch.dtype,
        device: torch.device,
        *,
        empirical_mean: bool,
    ) -> None:
        self._layers = layers
        self._decay = decay
        self.empirical_mean = empirical_mean
        self.units = [block.units for layer in layers for block in layer.blocks]
        self._ends = list(accumulate(self.units, initial=0))
        self._lengths = torch.tensor(self.units, device=device)
        total = self._ends[-1]
        self.running = torch.zeros(3, total, dtype=dtype, device=device)  # E[scale²], E[scale·shift], E[shift²]
        self.sums = torch.zeros(3 * total, dtype=dtype, device=device)
        self._pending = self.sums.view(3, total)
        self.updates = torch.zeros(len(layers), dtype=dtype, device=device)  # k, see `blend`
        # A layer without a shift has moments with it of zero, and a gradient of zero.
        self._has_shift = self.spread(
            torch.tensor([float("bias" in layer.parameters) for layer in layers]).to(self.sums)
        )
        self._queue: dict[int, list[tuple[int, Tensor, Tensor]]] = defaultdict(list)  # by number of rows
        self._queued_bytes = 0
        self._dirty = False
        self.reset()

    def reset(self) -> None:
        """Forgets the rows since the last commit."""
        self._queue.clear()
        self._queued_bytes = 0
        if self._dirty:
            self.sums.zero_()
        self._dirty = False
        self.rows = [0] * len(self._layers)
        self.nonfinite = None

    def columns(self, layer: int) -> slice:
        """The units of a layer."""
        return slice(self._ends[layer], self._ends[layer + 1])

    def spread(self, per_layer: Tensor) -> Tensor:
        """A number for every layer as one for every unit."""
        return per_layer.repeat_interleave(self._lengths, output_size=self._ends[-1])

    def add_rows(self, layer: int, inputs: Inputs, gradient: Tensor, examples: int) -> None:
        """Queues the gradients of one use."""
        dtype = self.running.dtype
        scale, shift = self._layers[layer].gradients(gradient, examples, *inputs)
        self._queue[len(scale)].append((layer, scale.to(dtype), shift.to(dtype)))
        self._queued_bytes += 2 * scale.numel() * self.running.element_size()
        self.rows[layer] += len(scale)
        if self._queued_bytes > QUEUE_BYTES:
            self.flush()

    def flush(self) -> None:
        for waiting in self._queue.values():
            scale = torch.cat([s for _, s, _ in waiting], 1)
            shift = torch.cat([s for _, _, s in waiting], 1)
            moments = torch.stack([scale.square().sum(0), (scale * shift).sum(0), shift.square().sum(0)])
            units = torch.cat([torch.arange(self._ends[i], self._ends[i + 1]) for i, _, _ in waiting])
            self._pending.index_add_(1, units.to(self.sums.device, non_blocking=True), moments)
            self._dirty = True
        if self._queue:
            self.nonfinite = (~self.sums.isfinite().all()).to(torch.int32).view(1)
        self._queue.clear()
        self._queued_bytes = 0

    def rescale(self, terms: Tensor) -> None:
        if self.empirical_mean:
            self.sums.mul_(terms**2)

    def commit(self, rows: Tensor, terms: Tensor, gate: Tensor) -> None:
        epsilon, self.updates = blend(self.updates, rows > 0, gate, self._decay)
        decay = self.spread(epsilon)
        new = self._pending / terms.clamp(min=1)
        new[1:] *= self._has_shift
        self.running.copy_(torch.where(gate != 0, decay * self.running + (1 - decay) * new, self.running))
        self.sums.zero_()
        self._dirty = False

    def state(self, layer: int) -> dict[str, list[Tensor]]:
        return {"moments": [self.running[:, self.columns(layer)]], "updates": [self.updates[layer : layer + 1]]}


class UnitFisher(Approximation):
    """U = (F + λI)⁻¹ V for the 2×2 block F of every unit, λ = γ². All units of all layers in a few operations.

    Args:
        layers: In the order in which rows and gradients come.
        moments: Their running second moments.
    """

    name = "units"
    divisible = True

    def __init__(self, layers: Sequence[UnitLayer], moments: UnitMoments) -> None:
        self.layers = layers
        self.moments = moments
        self.stores = [moments]
        self.inverse = torch.zeros_like(moments.running)  # elements (1,1), (1,2), (2,2)
        self.inverse[::2] = 1
        self.keep(range(len(layers)))

    def add_rows(self, layer: int, inputs: Inputs, gradient: Tensor, sent: Pass, block: int = 0) -> None:
        self.moments.add_rows(layer, inputs, gradient, sent.examples)

    def seen(self, layer: int) -> bool:
        return self.moments.rows[layer] > 0

    def update(self, gamma: Tensor, layers: Sequence[int] | None = None) -> None:
        damping = torch.where(self.moments.updates > 0, gamma.square(), torch.ones_like(gamma))
        damping = self.moments.spread(damping)  # 1 where the moments are still zero: the plain gradient
        scale, both, shift = self.moments.running
        # By Schur complements, which are at least the damping: nothing cancels as in a determinant.
        scale, shift = scale + damping, shift + damping
        first = (scale - both.square() / shift).clamp(min=damping).reciprocal()
        last = (shift - both.square() / scale).clamp(min=damping).reciprocal()
        inverse = torch.stack([first, -both / shift * first, last])
        if layers is not None:
            chosen = torch.zeros(len(self.layers), dtype=torch.bool)
            chosen[list(layers)] = True
            inverse = torch.where(self.moments.spread(chosen.to(inverse.device)), inverse, self.inverse)
        self.inverse.copy_(inverse)

    def inverses(self, layer: int) -> list[Tensor]:
        return [self.inverse[:, self.moments.columns(layer)]]

    def keep(self, layers: Sequence[int]) -> None:
        self._kept = list(layers)
        self._units = [self.moments.units[i] for i in layers]
        self._lengths = torch.tensor(self._units, dtype=torch.long, device=self.inverse.device)

    def apply(self, gradients: Sequence[Gradient], out: Sequence[Gradient]) -> Tensor:
        dtype = self.inverse.dtype
        if not self._kept:
            return self.inverse.new_zeros(0)
        scale = torch.cat([_weight(v).to(dtype) for v in gradients])
        shift = torch.cat(
            [
                scale.new_zeros(()).expand(n) if bias is None else bias.to(dtype)
                for n, bias in zip(self._units, map(_bias, gradients), strict=True)
            ]
        )
        whole = len(self._kept) == len(self.layers)
        first, both, last = self.inverse if whole else torch.cat([v for i in self._kept for v in self.inverses(i)], 1)
        new_scale, new_shift = first * scale + both * shift, both * scale + last * shift
        pairs = list(zip(map(_weight, out), new_scale.split(self._units), strict=True))
        for bias, values in zip(map(_bias, out), new_shift.split(self._units), strict=True):
            if bias is not None:
                pairs.append((bias, values))
        torch._foreach_copy_([into for into, _ in pairs], [values for _, values in pairs])
        return torch.segment_reduce(scale * new_scale + shift * new_shift, "sum", lengths=self._lengths)

    def state(self, layer: int) -> dict[str, list[Tensor]]:
        return self.moments.state(layer) | {"inverse": self.inverses(layer)}

    @classmethod
    def numbers(cls, block: Block) -> int:
        return BUFFERS * block.numbers

    def failures(self) -> Tensor:
        return torch.zeros(len(self.layers))  # a 2×2 block with damping has an inverse

    def conditions(self) -> Tensor:
        first, both, last = self.inverse
        mean, spread = (first + last) / 2, (((first - last) / 2).square() + both.square()).sqrt()
        of_units = ((mean + spread) / (mean - spread)).split(self.moments.units)
        return torch.stack([own.max() for own in of_units])


def _weight(gradient: Gradient) -> Tensor:
    return gradient[0] if isinstance(gradient, tuple) else gradient


def _bias(gradient: Gradient) -> Tensor | None:
    return gradient[1] if isinstance(gradient, tuple) else None
