"""The collectives between ranks, and packed triangles to send symmetric matrices at half their size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes that train one model together.

    Args:
        group: Their process group; None is one process by itself, for which every method does nothing.

    Attributes:
        rank: Of this process within the group.
        size: Number of ranks.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank: int = 0 if group is None else dist.get_rank(group)
        self.size: int = 1 if group is None else dist.get_world_size(group)

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all ranks, in place; every rank gets the same bits."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over all ranks of a tensor on the CPU."""
        return numbers if self.size == 1 else self.add_up(numbers.to(self.device, copy=True)).cpu()

    def mean(self, value: float) -> float:
        """The mean over all ranks of one number each."""
        return float(self.total(torch.tensor(value, dtype=torch.float64))) / self.size

    def differs(self, value: Tensor | None) -> bool:
        """Whether ranks have different bits in this float64 scalar; None goes with any.

        NaN equals NaN here, where ``ReduceOp.MAX`` over floating point is not defined.
        """
        lowest_bits = torch.iinfo(torch.int64).min
        if value is None:
            both = torch.full((2,), lowest_bits, device=self.device)
        else:
            bits = value.detach().to(self.device, torch.float64).reshape(1).view(torch.int64)
            both = torch.cat([bits, ~bits])
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.group)
        highest, inverted_lowest = both.tolist()
        return bool(highest != ~inverted_lowest and highest != lowest_bits)

    def from_owners(self, pieces: Sequence[Tensor]) -> None:
        """Every rank's piece goes to all others, in place; pieces differ in size, an empty one is not sent.

        Args:
            pieces: One buffer per rank; each rank has filled its own.
        """
        work = [
            dist.broadcast(piece, dist.get_global_rank(self.group, source), self.group, async_op=True)
            for source, piece in enumerate(pieces)
            if piece.numel()
        ]
        for sent in work:
            sent.wait()

    def swap(self, pieces: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Sends a piece to every rank and receives one from each.

        Args:
            pieces: For each rank, flat.
            sizes: Number of elements that come from each rank.
        """
        if self.size == 1:
            return list(pieces)
        received, sent = pieces[0].new_empty(sum(sizes)), torch.cat(list(pieces))
        dist.all_to_all_single(received, sent, list(sizes), [p.numel() for p in pieces], group=self.group)
        return list(received.split(list(sizes)))

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, on every rank; pickled, so for rare and small things."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @property
    def device(self) -> torch.device:
        """Where the group's backend takes tensors."""
        nccl = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def reduction(ranks: Ranks, dtype: torch.dtype | None) -> Callable[[list[Tensor], list[list[Tensor]]], None] | None:
    """For `Statistics.commit`: adds up pending sums over all ranks in one collective, counts included.

    Symmetric sums go as packed triangles. With a narrower ``dtype`` the counts, which must stay exact, go in a second,
    tiny collective. None for one process.
    """
    if ranks.size == 1:
        return None

    def add_up(tensors: list[Tensor], symmetric: list[list[Tensor]]) -> None:
        *sums, tally = tensors
        sent: list[tuple[Tensor, bool]] = []
        for store, blocks in zip(sums, symmetric, strict=True):
            sent += [(block, True) for block in blocks] or [(store, False)]
        if dtype is None:
            sent.append((tally, False))
        buffer = Parcel(sent, dtype or tally.dtype, tally.device)
        buffer.write()
        ranks.add_up(buffer.flat)
        buffer.read()
        if dtype is not None:
            ranks.add_up(tally)

    return add_up


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Parcel:
    """A flat buffer for tensors that travel together, symmetric matrices as packed triangles.

    Args:
        tensors: Each with whether it is a symmetric matrix.
        dtype: Of the buffer.
        device: Of the buffer.
    """

    def __init__(self, tensors: Sequence[tuple[Tensor, bool]], dtype: torch.dtype, device: torch.device) -> None:
        self._tensors = tensors
        sizes = [packed_numel(len(t)) if symmetric else t.numel() for t, symmetric in tensors]
        self.flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        self._pieces = self.flat.split(sizes)

    def write(self) -> None:
        """From the tensors to the buffer."""
        for (tensor, symmetric), piece in zip(self._tensors, self._pieces, strict=True):
            if symmetric:
                pack(tensor, piece)
            else:
                piece.copy_(tensor.flatten())

    def read(self) -> None:
        """From the buffer to the tensors."""
        for (tensor, symmetric), piece in zip(self._tensors, self._pieces, strict=True):
            if symmetric:
                unpack(piece, tensor)
            else:
                tensor.copy_(piece.view(tensor.shape))


# ---- packed triangles -----------------------------------------------------------------------------------------------
#
# A symmetric matrix with n = k + m rows, k = ⌈n/2⌉, becomes two dense rectangles: its lower left corner [m, k], and a
# [k, m+1] with the lower triangle of the first diagonal block below and the upper triangle of the second above. No
# index tensors: it needs no memory and runs at the speed of copies.


def packed_numel(n: int) -> int:
    """Number of elements of the triangle of an n × n matrix, diagonal included."""
    return n * (n + 1) // 2


def _rectangles(packed: Tensor, n: int) -> tuple[Tensor, Tensor, int, int]:
    k = (n + 1) // 2
    m = n - k
    corner, rest = packed.split([m * k, k * (m + 1)])
    return corner.view(m, k), rest.view(k, m + 1), k, m


def pack(matrix: Tensor, packed: Tensor) -> None:
    """Writes the triangle of a symmetric matrix ``[n, n]`` to ``packed``, ``[packed_numel(n)]`` of any dtype."""
    corner, rest, k, m = _rectangles(packed, len(matrix))
    corner.copy_(matrix[k:, :k])
    rest[:, k:].zero_()
    rest[:, :k].copy_(matrix[:k, :k].tril())
    rest[:m, 1:].add_(matrix[k:, k:].triu())


def unpack(packed: Tensor, matrix: Tensor) -> None:
    """Writes both triangles of ``matrix`` from what `pack` made."""
    corner, rest, k, m = _rectangles(packed, len(matrix))
    matrix[k:, :k].copy_(corner)
    matrix[:k, k:].copy_(corner.T)
    lower, upper = rest[:, :k].tril(), rest[:m, 1:].triu()
    matrix[:k, :k].copy_(lower + lower.tril(-1).T)
    matrix[k:, k:].copy_(upper + upper.triu(1).T)
