"""Batches that grow until they are the whole data set, as the adaptive rule wants them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler


class GrowingBatches(Sampler[list[int]]):
    """Random batches of m_k = min(m₁ · 2^((k−1)/b), N) of N examples at update k (Martens & Grosse 2015, sec. 13).

    Early updates learn enough from few examples; later ones need the whole set, since noise is what keeps second-order
    steps from the minimum. b is such that the batch is the whole set from update ``full_at`` on. A batch never has an
    example twice::

        loader = DataLoader(dataset, batch_sampler=GrowingBatches(len(dataset), first=1000, updates=600))

    Batch k depends on ``seed`` and k alone, so a resumed run continues with ``start=k + 1``.

    Args:
        examples: N ≥ 1.
        first: m₁, in 1…N.
        full_at: The first update with all examples, ≥ 1; the paper has 500.
        updates: The last update of an iteration, or None to go on forever.
        start: The first one, ≥ 1.
        seed: Of the choice of examples, ≥ 0.

    Raises:
        ValueError: An argument out of range; the message names it.
    """

    def __init__(
        self,
        examples: int,
        first: int,
        *,
        full_at: int = 500,
        updates: int | None = None,
        start: int = 1,
        seed: int = 0,
    ) -> None:
        bounds = {"examples": 1, "first": 1, "full_at": 1, "updates": 1, "start": 1, "seed": 0}
        for name, least in bounds.items():
            value = locals()[name]
            if name == "updates" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {name}={value!r}")
        if first > examples:
            raise ValueError(f"first must be at most examples={examples}, got first={first}")
        self.examples = examples
        self.first = first
        self.full_at = full_at
        self.updates = updates
        self.start = start
        self.seed = seed

    def size(self, update: int) -> int:
        """m_k, the number of examples of update k ≥ 1."""
        if update >= self.full_at:
            return self.examples
        doublings = math.log2(self.examples / self.first) * (update - 1) / (self.full_at - 1)
        return min(int(self.first * 2**doublings), self.examples)

    def indices(self, update: int) -> Tensor:
        """``[m_k]`` int64, the examples of update k; in order once they are all."""
        size = self.size(update)
        if size == self.examples:
            return torch.arange(size)
        # A stream per update; the factor keeps those of neighbouring seeds apart.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + update)
        return torch.randperm(self.examples, generator=generator)[:size]

    def __iter__(self) -> Iterator[list[int]]:
        update = self.start
        while self.updates is None or update <= self.updates:
            yield self.indices(update).tolist()
            update += 1

    def __len__(self) -> int:
        if self.updates is None:
            raise TypeError("these batches never end: pass updates=")
        return max(0, self.updates - self.start + 1)
