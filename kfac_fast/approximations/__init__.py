"""The structures of the approximate Fisher matrix that `Preconditioner` can use."""

from __future__ import annotations

from .base import Approximation
from .block_diagonal import BlockDiagonalFisher
from .block_tridiagonal import BlockTridiagonalFisher
from .ekfac import EigenFisher
from .parts import APPROXIMATIONS, Settings, expected_bytes, make_parts

__all__ = [
    "APPROXIMATIONS",
    "Approximation",
    "BlockDiagonalFisher",
    "BlockTridiagonalFisher",
    "EigenFisher",
    "Settings",
    "expected_bytes",
    "make_parts",
]
