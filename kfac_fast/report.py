"""`Report`: which parameters are preconditioned, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from torch import nn

from .layers import Layer


@dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        name: In the model.
        shape: Of the parameter.
        kind: The `Layer` class that covers it, or "base update".
        factors: Sides of A and G and how many such blocks, ``(a, g, blocks)``; None under the base update.
        bytes: Memory of statistics, pending sums and inverses; counted at the layer's first parameter.
        reason: Why it is not covered; empty when it is.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    factors: tuple[int, int, int] | None
    bytes: int
    reason: str

    @property
    def covered(self) -> bool:
        return self.factors is not None

    @classmethod
    def of(cls, name: str, parameter: nn.Parameter, found: Layer | str, memory: int) -> Row:
        shape = tuple(parameter.shape)
        if isinstance(found, str):
            return cls(name, shape, "base update", None, 0, found if parameter.requires_grad else "it is frozen")
        a, g, blocks = found.a_size, found.g_size, found.blocks
        return cls(name, shape, type(found).__name__, (a, g, blocks), memory, "")


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
        for row in self._rows:
            shape = "×".join(map(str, row.shape)) or "scalar"
            if row.factors is None:
                lines.append((row.name, shape, f"{row.kind}: {row.reason}", "", "", ""))
            else:
                a, g, blocks = row.factors
                times = f"{blocks}×" if blocks > 1 else ""
                lines.append((row.name, shape, row.kind, f"{times}{a}²", f"{times}{g}²", _readable(row.bytes)))
        widths = [max(len(line[i]) for line in lines) for i in range(6)]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        covered = sum(row.covered for row in self._rows)
        return "\n".join([*table, f"{covered} of {len(self)} parameters preconditioned, {_readable(self.bytes)}"])


def _readable(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
