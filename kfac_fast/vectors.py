"""Vectors over all trained parameters: one flat buffer, with a view per parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class ParameterVector:
    """A flat vector with an entry per element of the parameters.

    The buffers live as long as the optimizer: a step then allocates nothing of the size of the network.

    Args:
        parameters: In the order of the entries; all of one dtype and device.
        names: One per parameter.
        data: ``[n]`` to use as the buffer; None makes one.

    Attributes:
        data: ``[n]``, zeros at first if it is its own.
        views: ``data`` in the shapes of the parameters.
        by_name: The views by name.
    """

    def __init__(self, parameters: Sequence[Tensor], names: Sequence[str], data: Tensor | None = None) -> None:
        if data is None:
            size = sum(p.numel() for p in parameters)
            data = torch.zeros(size, dtype=parameters[0].dtype, device=parameters[0].device)
        self.data = data
        self._shapes = [p.shape for p in parameters]
        self._names = list(names)
        self._make_views()

    def _make_views(self) -> None:
        pieces = self.data.split([shape.numel() for shape in self._shapes])
        self.views = [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]
        self.by_name = dict(zip(self._names, self.views, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "_shapes": self._shapes, "_names": self._names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy's views have to be of its own data.
        self.__dict__.update(state)
        self._make_views()

    @torch.no_grad()
    def copy_(self, tensors: Sequence[Tensor]) -> None:
        """Takes the values of these tensors, one per parameter."""
        torch._foreach_copy_(self.views, list(tensors))

    @torch.no_grad()
    def copy_gradients_(self, parameters: Sequence[Tensor], decay: float) -> None:
        """Takes the gradients, zero where there is none, and adds ``decay`` times the parameters."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if not decay:
            self.copy_(gradients)
            return
        for view, gradient, p in zip(self.views, gradients, parameters, strict=True):
            torch.add(gradient, p, alpha=decay, out=view)

    def dot(self, other: ParameterVector) -> float:
        return float(torch.dot(self.data, other.data))
