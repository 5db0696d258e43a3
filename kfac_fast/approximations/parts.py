"""Which layers go to which structure; across these parts the approximate Fisher matrix is block-diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..factors import Factors
from ..layers import KroneckerLayer, Layer, UnitLayer
from .base import Approximation
from .block_diagonal import BlockDiagonalFisher
from .block_tridiagonal import BlockTridiagonalFisher
from .diagonal import DiagonalFactors, DiagonalFisher
from .ekfac import EigenFisher
from .tied import TiedFisher
from .units import UnitFisher, UnitMoments

# For layers of full Kronecker blocks; the user's choice.
APPROXIMATIONS = {kind.name: kind for kind in (BlockDiagonalFisher, BlockTridiagonalFisher, EigenFisher)}


@dataclass(frozen=True)
class Settings:
    """Of all running averages.

    Attributes:
        decay: ε_max in [0, 1).
        dtype: float32 or float64.
        device: Where the parameters are.
        empirical_mean: Gradients are those of a mean over the M loss terms of a step rather than of a sum.
    """

    decay: float
    dtype: torch.dtype
    device: torch.device
    empirical_mean: bool


def assign(approximation: str, layers: Sequence[Layer]) -> list[tuple[type[Approximation], list[Layer]]]:
    """Which structure serves which layers. The first is the one that the user chose."""
    kronecker = [layer for layer in layers if isinstance(layer, KroneckerLayer)]
    tied = [half for layer in kronecker if layer.head is not None for half in (layer, layer.head)]
    untied = [layer for layer in kronecker if layer not in tied]
    rest: list[tuple[type[Approximation], list[Layer]]] = [
        (DiagonalFisher, [layer for layer in untied if _has_diagonals(layer)]),
        (TiedFisher, list(tied)),
        (UnitFisher, [layer for layer in layers if isinstance(layer, UnitLayer)]),
    ]
    full: list[Layer] = [layer for layer in untied if not _has_diagonals(layer)]
    return [(APPROXIMATIONS[approximation], full), *((kind, own) for kind, own in rest if own)]


def expected_bytes(approximation: str, layers: Sequence[Layer], dtype: torch.dtype) -> list[tuple[Layer, int]]:
    """What every layer will need for statistics, pending sums and inverses, before anything is allocated."""
    return [
        (layer, dtype.itemsize * sum(kind.numbers(block) for block in layer.blocks))
        for kind, own in assign(approximation, layers)
        for layer in own
    ]


def make_parts(approximation: str, layers: Sequence[Layer], settings: Settings) -> tuple[Factors, list[Approximation]]:
    """The parts that together serve all layers, and the factors of the first, which is the one that the user chose."""
    of = (settings.decay, settings.dtype, settings.device)
    mean = settings.empirical_mean
    parts: list[Approximation] = []
    for kind, own in assign(approximation, layers):
        units = [layer for layer in own if isinstance(layer, UnitLayer)]
        kronecker = [layer for layer in own if isinstance(layer, KroneckerLayer)]
        if issubclass(kind, UnitFisher):
            parts.append(kind(units, UnitMoments(units, *of, empirical_mean=mean)))
        elif issubclass(kind, (DiagonalFisher, TiedFisher)):
            parts.append(kind(kronecker, DiagonalFactors(kronecker, *of, empirical_mean=mean)))
        else:
            factors = Factors(kronecker, *of, empirical_mean=mean)
            parts.append(APPROXIMATIONS[approximation](kronecker, factors))
    return factors, parts


def _has_diagonals(layer: KroneckerLayer) -> bool:
    return any(block.a_diagonal or block.g_diagonal for block in layer.blocks)
