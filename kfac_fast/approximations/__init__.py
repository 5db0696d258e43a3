"""The structures of the approximate Fisher matrix that `Preconditioner` can use."""

from __future__ import annotations

from .base import Approximation
from .block_diagonal import BlockDiagonalFisher
from .block_tridiagonal import BlockTridiagonalFisher

__all__ = ["APPROXIMATIONS", "Approximation", "BlockDiagonalFisher", "BlockTridiagonalFisher"]

APPROXIMATIONS = {kind.name: kind for kind in (BlockDiagonalFisher, BlockTridiagonalFisher)}
