"""Owns the running Kronecker factors: queues rows, sums them, commits the sums at the optimizer's step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .layers import Inputs, KroneckerBlock, KroneckerLayer, SquareSums
from .ops import BlockDiagonal, ConvRows
from .statistics import Store, blend

# Rows wait until this many bytes are there, so that one grouped call serves many layers; keeping all rows of a large
# network for one call would hold what autograd frees.
QUEUE_BYTES = 32 * 2**20


class Factors(Store):
    """All A and G of a network in one `BlockDiagonal`: first the A of every block, then the G.

    A is a mean over rows, G a sum over rows divided by the number M of loss terms, so that A ⊗ G is the Fisher of one
    loss term whatever the number of positions that share the weight (docs/algorithm.md, scale convention). Sums of one
    step gather in ``pending`` and are committed together, C ← ε C + (1−ε) S/count with ε = min(1 − 1/k, decay) at the
    k-th commit of a block (Martens & Grosse 2015, sec. 5), unless a value in them is not finite: then nothing is.

    Args:
        layers: In the order in which `add_rows` numbers them.
        decay: ε_max in [0, 1).
        dtype: float32 or float64.
        device: Where the parameters are.
        empirical_mean: Rows of G are gradients of a mean over the M loss terms of a step rather than of a sum.
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
        self._layers = layers
        self.decay = decay
        self.empirical_mean = empirical_mean  # rows of G are 1/M of the gradients of the sum
        blocks = [self._stored(block) for layer in layers for block in layer.blocks]
        self.count = len(blocks)  # blocks A ⊗ G
        self.first_block: list[int] = []  # of every layer
        first = 0
        for layer in layers:
            self.first_block.append(first)
            first += len(layer.blocks)
        self.running = BlockDiagonal.zeros([b.a for b in blocks] + [b.g for b in blocks], dtype, device)
        self.pending = self.running.empty_like()
        self.sums = self.pending.data.zero_()
        self.sides = torch.tensor(self.running.sizes, dtype=dtype).to(device)
        self.trace = torch.zeros(2 * self.count, dtype=dtype, device=device)
        self.updates = torch.zeros_like(self.trace)  # k, on the device: see `statistics.blend`
        self._bias = [block.bias for block in blocks] + [False] * self.count
        self._empty_rows = [
            self.running.data.new_empty(0, n - b) for n, b in zip(self.running.sizes, self._bias, strict=True)
        ]
        self._queue: dict[int, list[Tensor | ConvRows]] = defaultdict(list)  # by first of the blocks the rows are for
        self._queued_bytes = 0
        self._dirty = False
        self.reset()

    def _stored(self, block: KroneckerBlock) -> KroneckerBlock:
        """The block whose A and G stand in `running` for this one."""
        return block

    def reset(self) -> None:
        """Forgets the rows since the last commit."""
        self._queue.clear()
        self._queued_bytes = 0
        if self._dirty:
            self.sums.zero_()
        self._dirty = False
        self.rows = [0] * self.count  # R of every block
        self.nonfinite = None

    @property
    def has_pending(self) -> bool:
        return bool(self._queue) or self._dirty

    def blocks_of(self, layer: int) -> range:
        """The blocks of a layer, as positions among the A."""
        first = self.first_block[layer]
        return range(first, first + len(self._layers[layer].blocks))

    def seen(self, layer: int) -> bool:
        """Whether the layer has rows waiting for the next commit."""
        return any(self.rows[block] > 0 for block in self.blocks_of(layer))

    def add_rows(self, layer: int, inputs: Inputs, gradient: Tensor, block: int = 0, *, first: bool = True) -> None:
        """Queues one use's rows, from the layer's given block on; see `tape.Sink`.

        Rows of A are new only if this is the ``first`` gradient of the use.
        """
        block += self.first_block[layer]
        inputs = tuple(self.cast(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
        if first:
            rows = self._layers[layer].input_rows(*inputs)
            for i in range(block, block + (rows.groups if isinstance(rows, ConvRows) else 1)):
                self.rows[i] += rows.rows if isinstance(rows, SquareSums) else rows.shape[0]
            self._push(block, rows)
        self._push(self.count + block, self._layers[layer].output_rows(self.cast(gradient), *inputs))
        if self._queued_bytes > QUEUE_BYTES:
            self.flush()

    def cast(self, rows: Tensor) -> Tensor:
        """Rows as the factors take them: dense; in half precision for float32 factors too, float64 has to agree."""
        rows = rows if rows.layout == torch.strided else rows.to_dense()
        narrow = rows.dtype != torch.float64
        return rows if narrow == (self.running.dtype != torch.float64) else rows.to(self.running.dtype)

    def _push(self, block: int, rows: Tensor | ConvRows | SquareSums) -> None:
        """Queues rows for a factor, or the first of several; ``block`` counts the A, then the G."""
        assert not isinstance(rows, SquareSums)  # these are for diagonal factors
        self._queue[block].append(rows)
        tensor = rows.x if isinstance(rows, ConvRows) else rows
        self._queued_bytes += tensor.numel() * tensor.element_size()

    def flush(self) -> None:
        """Adds the queued rows to the pending sums, in as few grouped calls as they allow."""
        while self._queue:
            rows: list[Tensor | ConvRows] = []
            block = 0
            while block < 2 * self.count:
                waiting = self._queue.get(block)
                entry = waiting.pop() if waiting else self._empty_rows[block]
                if waiting is not None and not waiting:
                    del self._queue[block]
                rows.append(entry)
                block += entry.groups if isinstance(entry, ConvRows) else 1
            nonfinite = ops.factor_update_(self.pending, rows, 1.0, 1.0, bias=self._bias).nonfinite
            self.nonfinite = nonfinite if self.nonfinite is None else self.nonfinite | nonfinite
            self._dirty = True
        self._queued_bytes = 0

    @property
    def symmetric(self) -> list[Tensor]:
        return self.pending.unpack()

    def rescale(self, terms: Tensor) -> None:
        if self.empirical_mean:
            self.pending[self.count :].data.mul_(terms**2)

    def commit(self, rows: Tensor, terms: Tensor, gate: Tensor) -> None:
        weight = torch.cat([rows.clamp(min=1).reciprocal(), terms.clamp(min=1).reciprocal().expand(self.count)])
        seen = (rows > 0).repeat(2)
        epsilon, self.updates = blend(self.updates, seen, gate, self.decay)
        self._commit(epsilon, (1 - epsilon) * weight, gate)
        self._dirty = False

    def _commit(self, decay: Tensor, scale: Tensor, gate: Tensor) -> None:
        """C ← decay C + scale S, S ← 0, with a coefficient for every factor."""
        self.trace = ops.commit_(self.running, self.pending, decay, scale, gate)

    def state(self, layer: int) -> dict[str, list[Tensor]]:
        return {
            **self.matrices_of("factor", self.running, layer),
            "updates": self.per_side(self.updates, layer),
            "trace": self.per_side(self.trace, layer),
        }

    def matrices_of(self, name: str, blocks: BlockDiagonal, layer: int) -> dict[str, list[Tensor]]:
        """A layer's blocks in a buffer laid out like `running`, as entries ``a_name`` and ``g_name`` of a state."""
        state: dict[str, list[Tensor]] = {}
        for side, first in (("a", 0), ("g", self.count)):
            state |= stackable(f"{side}_{name}", [blocks[first + i] for i in self.blocks_of(layer)])
        return state

    def per_side(self, values: Tensor, layer: int) -> list[Tensor]:
        """A layer's entries of a vector over all A and G: of the A, of the G."""
        own = self.blocks_of(layer)
        return [values[first + own.start : first + own.stop] for first in (0, self.count)]


def stackable(key: str, tensors: list[Tensor]) -> dict[str, list[Tensor]]:
    """Entries of a state: one for all these tensors if they have one shape, else one for each."""
    if len({tensor.shape for tensor in tensors}) == 1:
        return {key: tensors}
    return {f"{key}_{i}": [tensor] for i, tensor in enumerate(tensors)}
