"""Pictures of a run: the history of `KFAC.stats`, and the spectra of the factors. Needs matplotlib.

Every function draws into the axes it is given, or into a new figure, and returns the axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .approximations.base import block_names
from .optimizer import KFAC

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def history(stats: Sequence[Mapping[str, Any]], names: Sequence[str], axes: Axes | None = None) -> Axes:
    """Figures of `KFAC.stats` against the step, on a logarithmic scale where all of them are positive.

    Args:
        stats: What ``optimizer.stats()`` gave after each step, in order. A step without a figure (ρ is measured every
            ``t1`` steps) leaves a gap that is bridged.
        names: Which figures, such as ``["loss"]`` or ``["damping", "gamma"]``.
        axes: Where to draw; None makes a figure.

    Raises:
        ValueError: No step has a figure of that name.
    """
    axes = _axes(axes)
    positive = True
    for name in names:
        points = [(step, float(entry[name])) for step, entry in enumerate(stats, 1) if name in entry]
        if not points:
            known = sorted({key for entry in stats for key in entry})
            raise ValueError(f"names has {name!r}, which no step has; there are {known}")
        axes.plot(*zip(*points, strict=True), label=name)
        positive = positive and all(value > 0 for _, value in points)
    if positive:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.legend(frameon=False)
    return axes


def spectra(optimizer: KFAC, side: str = "A", axes: Axes | None = None) -> Axes:
    """Eigenvalues of a factor of every block, largest first, over their mean: how unequal the directions are.

    A line that falls below λ's share is a factor whose small directions the damping decides.

    Args:
        optimizer: After at least one step.
        side: "A", of the layers' inputs, or "G", of their output gradients.
        axes: Where to draw; None makes a figure.

    Raises:
        ValueError: ``side`` is neither, or no factor has been committed yet.
    """
    axes = _axes(axes)
    for name, values in _eigenvalues(optimizer, side):
        relative = values.flip(0) / values.mean()
        axes.plot(range(1, len(relative) + 1), relative.clamp(min=1e-12), label=name)
    axes.set(xscale="log", yscale="log", xlabel="index", ylabel=f"eigenvalue of {side} / mean")
    axes.legend(frameon=False, fontsize="small")
    return axes


def condition(optimizer: KFAC, axes: Axes | None = None) -> Axes:
    """Condition number of the A and G of every block, without damping, as bars.

    Args:
        optimizer: After at least one step.
        axes: Where to draw; None makes a figure.

    Raises:
        ValueError: No factor has been committed yet.
    """
    axes = _axes(axes)
    names: list[str] = []
    for offset, side in ((-0.2, "A"), (0.2, "G")):
        pairs = _eigenvalues(optimizer, side)
        names = [name for name, _ in pairs]
        numbers = [float(v[-1] / v[0].clamp(min=v[-1] * torch.finfo(v.dtype).eps)) for _, v in pairs]
        axes.bar([i + offset for i in range(len(pairs))], numbers, width=0.4, label=side)
    axes.set(yscale="log", ylabel="condition number")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
    axes.legend(frameon=False)
    return axes


def _eigenvalues(optimizer: KFAC, side: str) -> list[tuple[str, Tensor]]:
    """Block name and ascending eigenvalues (float64) of every block that has been committed."""
    if side not in ("A", "G"):
        raise ValueError(f"side must be 'A' or 'G', got {side!r}")
    factors = optimizer.preconditioner.factors
    first = 0 if side == "A" else factors.count
    found = [
        (name, torch.linalg.eigvalsh(factors.running[first + i].double()))
        for i, name in enumerate(block_names(optimizer.preconditioner.approximation.layers))
        if float(factors.updates[first + i]) > 0
    ]
    if not found:
        raise ValueError("optimizer has no factors yet: make a step first")
    return found


def _axes(axes: Axes | None) -> Axes:
    if axes is not None:
        return axes
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("kfac_fast.plot needs matplotlib: pip install 'kfac-fast[plot]'") from error
    return pyplot.subplots(layout="constrained")[1]
