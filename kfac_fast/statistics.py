"""Owns what every store of statistics has in common: the number of loss terms, the finite gate, and the commit."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor


class Store(ABC):
    """Running averages of one kind of second moments, with the sums gathered since the last commit.

    Attributes:
        sums: The pending sums, one flat buffer, zero after a commit. Those of several ranks add up.
        rows: Rows behind every sum, on the host; 0 where there were none. Those of several ranks add up.
        nonfinite: Flags on the device that are not 0 where a sum is not finite, or None before the first rows.
    """

    sums: Tensor
    rows: list[int]
    nonfinite: Tensor | None

    @property
    def symmetric(self) -> list[Tensor]:
        """The sums as symmetric matrices, where they are: views that make up `sums` but for padding."""
        return []

    @abstractmethod
    def flush(self) -> None:
        """Adds whatever still waits to the sums."""

    @abstractmethod
    def rescale(self, terms: Tensor) -> None:
        """Turns sums over gradients of a mean over this rank's loss terms into sums over gradients of each term.

        Args:
            terms: This rank's number of loss terms, 0-d.
        """

    @abstractmethod
    def commit(self, rows: Tensor, terms: Tensor, gate: Tensor) -> None:
        """Moves the sums into the running averages and clears them.

        Args:
            rows: `rows` over all ranks, on the device in the dtype of the sums.
            terms: M, the number of loss terms, ``[1]``.
            gate: ``[1]`` int32; with 0 nothing may change.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forgets what was gathered since the last commit."""

    @abstractmethod
    def state(self, layer: int) -> dict[str, list[Tensor]]:
        """Views of all that is kept for a layer between steps; each list stacks to one tensor of a checkpoint."""


class Statistics:
    """Commits several stores together: all of them, or, where a value is not finite, none.

    Args:
        stores: On one device.
    """

    def __init__(self, stores: Sequence[Store]) -> None:
        self._stores = list(stores)
        self._terms: Tensor | None = None  # M

    def add_terms(self, terms: Tensor) -> None:
        self._terms = terms if self._terms is None else self._terms + terms

    def commit(self, reduce: Callable[[list[Tensor], list[list[Tensor]]], None] | None = None) -> Tensor | None:
        """Moves all pending sums into the running averages.

        Args:
            reduce: Adds up tensors over all ranks, in place, given also which of them are made up of symmetric matrices
                (`Store.symmetric`). With it every rank must take part in every commit.

        Returns:
            ``[1]`` int32 on the device: 1 if the sums were finite and went in, 0 if nothing was changed; None if there
            was nothing to commit.
        """
        for store in self._stores:
            store.flush()
        flags = [store.nonfinite.max() for store in self._stores if store.nonfinite is not None]
        if reduce is None and (not flags or self._terms is None):
            self.reset()
            return None
        sums = [store.sums for store in self._stores]
        counts = [len(store.rows) for store in self._stores]
        rows = torch.tensor(list(chain.from_iterable(store.rows for store in self._stores)), dtype=sums[0].dtype)
        zero = sums[0].new_zeros(())
        own_terms = zero if self._terms is None else self._terms.to(zero.dtype)
        for store in self._stores:
            store.rescale(own_terms)
        last = torch.stack([own_terms, sum(flags, zero)])
        tally = torch.cat([rows.to(zero.device, non_blocking=True), last])
        if reduce is not None:
            reduce([*sums, tally], [store.symmetric for store in self._stores])
        *of_stores, terms, bad = tally.split([*counts, 1, 1])
        # Without a term the loss ignored them all: that says nothing.
        gate = ((bad == 0) & terms.isfinite() & (terms > 0)).to(torch.int32)
        for store, seen in zip(self._stores, of_stores, strict=True):
            store.commit(seen, terms, gate)
        self.reset()
        return gate

    def reset(self) -> None:
        """Forgets what was gathered since the last commit."""
        self._terms = None
        for store in self._stores:
            store.reset()


def rectangles(shapes: Sequence[Sequence[int]], like: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Matrices of zeros in one flat buffer: the buffer, and a view of each."""
    flat = like.new_zeros(sum(math.prod(shape) for shape in shapes))
    pieces = flat.split([math.prod(shape) for shape in shapes])
    return flat, [piece.view(*shape) for piece, shape in zip(pieces, shapes, strict=True)]


def blend(updates: Tensor, seen: Tensor, gate: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """ε = min(1 − 1/k, decay) of the k-th commit (Martens & Grosse 2015, sec. 5), and the new counts of commits.

    k counts what really went in, so it depends on the gate and lives on the device with it.

    Args:
        updates: Commits of every block so far, ``[b]``.
        seen: Which blocks have rows in this commit, ``[b]`` bool. The others keep their average: ε = 1.
        gate: ``[1]`` int32.
        decay: ε_max.
    """
    k = updates + seen
    epsilon = torch.where(seen, (1 - 1 / k.clamp(min=1)).clamp(max=decay), torch.ones_like(k))
    return epsilon, torch.where(gate != 0, k, updates)
