"""The structures of the approximate Fisher matrix that `Preconditioner` can use."""

from __future__ import annotations

from .base import Approximation
from .block_diagonal import BlockDiagonalFisher
from .block_tridiagonal import BlockTridiagonalFisher
from .ekfac import EigenFisher

__all__ = ["APPROXIMATIONS", "Approximation", "BlockDiagonalFisher", "BlockTridiagonalFisher", "EigenFisher"]

APPROXIMATIONS = {kind.name: kind for kind in (BlockDiagonalFisher, BlockTridiagonalFisher, EigenFisher)}
