"""Owns the running Kronecker factors: queues rows, sums them, commits the sums at the optimizer's step."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from . import ops
from .layers import Layer
from .ops import BlockDiagonal, ConvRows

# Rows wait until this many bytes are there, so that one grouped call serves many layers; keeping all rows of a large
# network for one call would hold what autograd frees.
QUEUE_BYTES = 32 * 2**20


class Factors:
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
        self, layers: list[Layer], decay: float, dtype: torch.dtype, device: torch.device, *, empirical_mean: bool
    ) -> None:
        self._layers = layers
        self._decay = decay
        self._empirical_mean = empirical_mean
        a_sizes = [layer.a_size for layer in layers for _ in range(layer.blocks)]
        g_sizes = [layer.g_size for layer in layers for _ in range(layer.blocks)]
        self.count = len(a_sizes)  # blocks A ⊗ G
        self.first_block: list[int] = []  # of every layer
        block = 0
        for layer in layers:
            self.first_block.append(block)
            block += layer.blocks
        self.running = BlockDiagonal.zeros(a_sizes + g_sizes, dtype, device)
        self.pending = self.running.empty_like()
        self.pending.data.zero_()
        self.trace = torch.zeros(2 * self.count, dtype=dtype, device=device)
        self.updates = torch.zeros(2 * self.count, dtype=dtype, device=device)  # k, on the device: see `commit`
        self._bias = [layer.bias is not None for layer in layers for _ in range(layer.blocks)] + [False] * self.count
        self._empty_rows = [
            self.running.data.new_empty(0, n - b) for n, b in zip(self.running.sizes, self._bias, strict=True)
        ]
        self._queue: dict[int, list[Tensor | ConvRows]] = defaultdict(list)  # by first of the blocks the rows are for
        self._queued_bytes = 0
        self.reset()

    def reset(self) -> None:
        """Forgets the rows since the last commit."""
        self._queue.clear()
        self._queued_bytes = 0
        if getattr(self, "_dirty", False):
            self.pending.data.zero_()
        self._dirty = False
        self._rows = [0] * self.count  # R of every block
        self._terms: Tensor | None = None  # M
        self._nonfinite: Tensor | None = None

    @property
    def has_pending(self) -> bool:
        return bool(self._queue) or self._dirty

    def blocks_of(self, layer: int) -> range:
        """The blocks of a layer, as positions among the A."""
        first = self.first_block[layer]
        return range(first, first + self._layers[layer].blocks)

    def seen(self, layer: int) -> bool:
        """Whether the layer has rows waiting for the next commit."""
        return self._rows[self.first_block[layer]] > 0

    def add_rows(self, layer: int, inputs: Tensor | None, gradient: Tensor) -> None:
        """Queues one call's rows; see `capture.Sink`."""
        block = self.first_block[layer]
        if inputs is not None:
            rows = self._layers[layer].input_rows(self._cast(inputs))
            self._push(block, rows)
            for i in range(block, block + self._layers[layer].blocks):
                self._rows[i] += rows.shape[0]
        self._push(self.count + block, self._layers[layer].output_rows(self._cast(gradient)))
        if self._queued_bytes > QUEUE_BYTES:
            self.flush()

    def add_terms(self, terms: Tensor) -> None:
        self._terms = terms if self._terms is None else self._terms + terms

    def _cast(self, rows: Tensor) -> Tensor:
        # float32 factors take half precision as it is; float64 has to agree.
        narrow = rows.dtype != torch.float64
        return rows if narrow == (self.running.dtype != torch.float64) else rows.to(self.running.dtype)

    def _push(self, block: int, rows: Tensor | ConvRows) -> None:
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
            self._nonfinite = nonfinite if self._nonfinite is None else self._nonfinite | nonfinite
            self._dirty = True
        self._queued_bytes = 0

    def commit(self) -> Tensor | None:
        """Moves the pending sums into the running factors.

        Returns:
            ``[1]`` int32 on the device: 1 if they were finite and went in, 0 if nothing was changed; None if there was
            nothing to commit.
        """
        self.flush()
        if not self._dirty or self._nonfinite is None or self._terms is None:
            self.reset()
            return None
        gate = (self._nonfinite.max() == 0).to(torch.int32).reshape(1)
        data = self.running.data
        rows = torch.tensor(self._rows + self._rows, dtype=data.dtype).to(data.device, non_blocking=True)
        seen = rows > 0
        terms = self._terms.to(data.dtype).clamp(min=1)
        weight = torch.cat([rows[: self.count].clamp(min=1).reciprocal(), terms.reciprocal().expand(self.count)])
        if self._empirical_mean:  # rows are 1/M of the gradients of the sum
            weight[self.count :] = terms
        k = self.updates + seen
        epsilon = torch.where(seen, (1 - 1 / k.clamp(min=1)).clamp(max=self._decay), torch.ones_like(k))
        self.trace = ops.commit_(self.running, self.pending, epsilon, (1 - epsilon) * weight, gate)
        # k counts what really went in, so it depends on the gate and lives on the device with it.
        self.updates = torch.where(gate != 0, k, self.updates)
        self._dirty = False  # commit_ zeroed the sums
        self.reset()
        return gate
