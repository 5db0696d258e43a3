"""`BlockDiagonal`: square blocks of different sizes in one flat, aligned buffer."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

from .. import _C

FACTOR_DTYPES = (torch.float32, torch.float64)


@functools.lru_cache(maxsize=256)
def _plan(sizes: tuple[int, ...]) -> _C.Plan:
    return _C.Plan(sizes)


class BlockDiagonal:
    """A block-diagonal matrix: block ``i`` is ``[sizes[i], sizes[i]]``, row-major, in one flat buffer.

    One allocation, one collective and one kernel launch then serve every layer of a network. Each block starts at a
    multiple of 16 elements; what stands in the padding in between means nothing.

    Indexing with an integer gives that block as a view ``[n, n]``; with a slice (step 1) a ``BlockDiagonal`` that
    shares the buffer.

    Args:
        sizes: The side of every block, each ≥ 1.
        data: The buffer, ``[BlockDiagonal.numel_for(sizes)]``, contiguous, float32 or float64.

    Raises:
        TypeError: ``data`` is not a float32 or float64 tensor.
        ValueError: A size below 1, or a buffer whose shape does not fit the sizes.
    """

    __slots__ = ("_sizes", "_views", "data", "plan")

    def __init__(self, sizes: Sequence[int], data: Tensor) -> None:
        self._sizes = _checked_sizes(sizes)
        self.plan = _plan(self._sizes)
        if not isinstance(data, Tensor) or data.dtype not in FACTOR_DTYPES:
            got = data.dtype if isinstance(data, Tensor) else type(data).__name__
            raise TypeError(f"data must be a float32 or float64 tensor, got {got}")
        if data.shape != (self.plan.numel,) or not data.is_contiguous():
            raise ValueError(
                f"data must be contiguous with shape ({self.plan.numel},) for these {len(self._sizes)} sizes, "
                f"got shape {tuple(data.shape)}"
            )
        self.data = data
        self._views: list[Tensor] | None = None

    @staticmethod
    def numel_for(sizes: Sequence[int]) -> int:
        """Number of elements of the buffer for these sizes, padding included."""
        return _plan(_checked_sizes(sizes)).numel

    @classmethod
    def zeros(
        cls, sizes: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> BlockDiagonal:
        """Blocks of zeros."""
        return cls(sizes, torch.zeros(cls.numel_for(sizes), dtype=dtype, device=device))

    @classmethod
    def pack(cls, blocks: Sequence[Tensor]) -> BlockDiagonal:
        """Copies square matrices of one dtype and device into a new buffer.

        Raises:
            ValueError: The list is empty, or a matrix is not square or differs in dtype or device from the first.
        """
        if not blocks:
            raise ValueError("blocks must hold at least one matrix, got an empty list; use BlockDiagonal.zeros([])")
        first = blocks[0]
        for i, block in enumerate(blocks):
            if block.ndim != 2 or block.shape[0] != block.shape[1]:
                raise ValueError(f"blocks[{i}] must be a square matrix, got shape {tuple(block.shape)}")
            if block.dtype != first.dtype or block.device != first.device:
                raise ValueError(
                    f"blocks[{i}] must be {first.dtype} on {first.device} like blocks[0], "
                    f"got {block.dtype} on {block.device}"
                )
        packed = cls.zeros([block.shape[0] for block in blocks], first.dtype, first.device)
        with torch.no_grad():
            for view, block in zip(packed.unpack(), blocks, strict=True):
                view.copy_(block)
        return packed

    def unpack(self) -> list[Tensor]:
        """Every block as a view ``[n, n]`` of the buffer."""
        if self._views is None:
            data = self.data
            self._views = [
                data.as_strided((n, n), (n, 1), data.storage_offset() + offset)
                for n, offset in zip(self._sizes, self.plan.offsets, strict=True)
            ]
        return list(self._views)

    def empty_like(self) -> BlockDiagonal:
        """A buffer of the same geometry with undefined content."""
        return BlockDiagonal(self._sizes, torch.empty_like(self.data))

    def clone(self) -> BlockDiagonal:
        """A copy with its own buffer."""
        return BlockDiagonal(self._sizes, self.data.clone())

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the blocks, in order."""
        return self._sizes

    @property
    def dtype(self) -> torch.dtype:
        """Of all blocks."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """Of all blocks."""
        return self.data.device

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> BlockDiagonal: ...
    def __getitem__(self, index: int | slice) -> Tensor | BlockDiagonal:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"a slice of a BlockDiagonal must have step 1, got {step}")
            sizes = self._sizes[start:stop]
            offset = self.plan.offsets[start] if sizes else 0
            return BlockDiagonal(sizes, self.data.narrow(0, offset, self.numel_for(sizes)))
        return self.unpack()[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unpack())

    def __reduce__(self) -> tuple[type[BlockDiagonal], tuple[tuple[int, ...], Tensor]]:
        return BlockDiagonal, (self._sizes, self.data)

    def __deepcopy__(self, memo: dict[int, object]) -> BlockDiagonal:
        return self.clone()

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self._sizes[:6])) + (", …" if len(self) > 6 else "")
        return f"BlockDiagonal({len(self)} blocks [{shown}], {self.dtype}, {self.device})"


def _checked_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    result = tuple(sizes)
    for i, n in enumerate(result):
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"sizes[{i}] must be an integer >= 1, got {n!r}")
    return result
