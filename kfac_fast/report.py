"""`Report`: which parameters are preconditioned, as data and as a table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from .layers import Block, Found, KroneckerBlock, Layer, UnitBlock


@dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        name: In the model.
        shape: Of the parameter.
        kind: The `Layer` classes that cover it, joined by " + ", or "base update".
        blocks: The blocks of these layers that cover it; empty under the base update.
        bytes: Memory of statistics, pending sums and inverses; counted at the layer's first parameter.
        reason: Why it is not covered; empty when it is.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    blocks: tuple[Block, ...]
    bytes: int
    reason: str

    @property
    def covered(self) -> bool:
        return bool(self.blocks)

    @classmethod
    def of(cls, found: Found, memory: int) -> Row:
        shape = tuple(found.parameter.shape)
        if not found.layers:
            reason = found.reason if found.parameter.requires_grad else "it is frozen"
            return cls(found.name, shape, "base update", (), 0, reason)
        blocks = tuple(
            block
            for layer in found.layers
            for block in layer.blocks
            if any(layer.parameters[name] is found.parameter for name in block.parameters)
        )
        kinds = " + ".join(type(layer).__name__ for layer in found.layers)
        return cls(found.name, shape, kinds, blocks, memory, "")

    def _sides(self, describe: Callable[[Block], str]) -> str:
        """One side of the blocks: "3×64²", a diagonal of 50,000 as "50000"."""
        counted = Counter(map(describe, self.blocks))
        return " + ".join(f"{times}×{side}" if times > 1 else side for side, times in counted.items())

    def cells(self) -> tuple[str, str, str, str, str, str]:
        """Its line in the table."""
        shape = "×".join(map(str, self.shape)) or "scalar"
        if not self.covered:
            return self.name, shape, f"{self.kind}: {self.reason}", "", "", ""
        return self.name, shape, self.kind, self._sides(_a), self._sides(_g), readable(self.bytes)


def _a(block: Block) -> str:
    if isinstance(block, KroneckerBlock):
        return f"{block.a}" if block.a_diagonal else f"{block.a}²"
    return f"{block.units}×2²" if isinstance(block, UnitBlock) else ""


def _g(block: Block) -> str:
    if isinstance(block, KroneckerBlock):
        return f"{block.g}" if block.g_diagonal else f"{block.g}²"
    return ""


class Report(Sequence[Row]):
    """A sequence of `Row`; printing it gives a table."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)

    @property
    def bytes(self) -> int:
        """Memory of all statistics, pending sums and inverses."""
        return sum(row.bytes for row in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __str__(self) -> str:
        lines = [("parameter", "shape", "block", "A", "G", "memory")]
        lines += [row.cells() for row in self._rows]
        widths = [max(len(line[i]) for line in lines) for i in range(6)]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        covered = sum(row.covered for row in self._rows)
        return "\n".join([*table, f"{covered} of {len(self)} parameters preconditioned, {readable(self.bytes)}"])


def readable(count: float) -> str:
    """A number of bytes with three digits."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def bytes_by_kind(layers: Sequence[tuple[Layer, int]]) -> dict[str, int]:
    """Sums by kind of layer of the bytes that layers need."""
    figures: dict[str, int] = defaultdict(int)
    for layer, count in layers:
        figures[type(layer).__name__] += count
    return dict(figures)


def refuse_beyond(limit: int, layers: Sequence[tuple[Layer, int]]) -> None:
    """Raises a ValueError if layers need more bytes than this."""
    total = sum(count for _, count in layers)
    if total <= limit:
        return
    kinds = ", ".join(f"{kind} {readable(count)}" for kind, count in bytes_by_kind(layers).items())
    layer, largest = max(layers, key=lambda pair: pair[1])
    raise ValueError(
        f"factors, pending sums and inverses would need {readable(total)} ({total} bytes), more than "
        f"max_factor_bytes={limit}: {kinds}; most of all {layer.name or 'the model'} with {readable(largest)}. Leave "
        "layers out with Blocks(exclude=…), or keep only the diagonal of large factors with Blocks(max_side=…)"
    )
