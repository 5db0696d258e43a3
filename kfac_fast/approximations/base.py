"""`Approximation`: what an approximate inverse Fisher has to do, whatever its structure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..chain import Trace
from ..layers import Block, Inputs, Layer
from ..ops import Gradient
from ..statistics import Store
from ..tape import Pass


class Approximation(ABC):
    """Turns the statistics of some layers into an approximate inverse Fisher matrix and applies it to gradients.

    Layers are numbered from 0 in the order given; their blocks follow each other in that order.

    Attributes:
        name: What the user calls it.
        needs_trace: Whether it has to know how the layers feed each other.
        symmetric: Whether the matrices in `inverses` are, so that one triangle says all.
        divisible: Whether the inverses of a layer need no others, so that ranks can share them; see `keep`.
        layers: The layers it serves.
        stores: Its running statistics; they are committed together with all others.
    """

    name: ClassVar[str]
    needs_trace: ClassVar[bool] = False
    symmetric: ClassVar[bool] = False
    divisible: ClassVar[bool] = False
    layers: Sequence[Layer]
    stores: list[Store]

    # ---- statistics -------------------------------------------------------------------------------------------------

    def take_trace(self, trace: Trace) -> None:  # noqa: B027 - most need none
        """Called before the first rows if `needs_trace`. What it raises, the model's forward pass raises."""

    @property
    def order(self) -> dict[str, int]:
        """The place of every layer by name, where the shapes in `state` depend on it."""
        return {}

    def take_order(self, order: Mapping[str, int]) -> None:  # noqa: B027 - most need none
        """Takes the `order` of a checkpoint, before its state is loaded; that of other layers is left out.

        Raises:
            ValueError: The layers are known to have another order.
        """

    @abstractmethod
    def add_rows(self, layer: int, inputs: Inputs, gradient: Tensor, sent: Pass, block: int = 0) -> None:
        """Takes one use's rows; see `tape.Sink`."""

    @abstractmethod
    def seen(self, layer: int) -> bool:
        """Whether the layer has rows waiting for the next commit."""

    # ---- inverse ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def update(self, gamma: Tensor, layers: Sequence[int] | None = None) -> None:
        """Recomputes the inverses from the running statistics.

        Args:
            gamma: γ of every block, on the device; λ = γ².
            layers: Only of these; None is all.
        """

    @abstractmethod
    def inverses(self, layer: int) -> list[Tensor]:
        """Views of all that `update` writes for a layer and `apply` reads.

        For whoever keeps a copy, or sends it to ranks that did not compute it.
        """

    def inverse_bytes(self, layer: int) -> int:
        """Memory of `inverses`."""
        return sum(view.numel() * view.element_size() for view in self.inverses(layer))

    def keep(self, layers: Sequence[int]) -> None:
        """Gives up the inverses of all other layers: only these are updated from now on, and `apply` takes only theirs.

        In `state` the inverses of the others are on the meta device: shapes without content.
        """
        raise ValueError(f"inverses of approximation={self.name!r} are not divided over ranks: share='replicate'")

    @abstractmethod
    def apply(self, gradients: Sequence[Gradient], out: Sequence[Gradient]) -> Tensor:
        """Natural gradients U of V, and ⟨V, U⟩.

        Args:
            gradients: V of every block.
            out: Where U goes, same structure.

        Returns:
            ⟨V, U⟩ of every block, on the device. Their sum is positive; alone they need not be.
        """

    # ---- about it ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def state(self, layer: int) -> dict[str, list[Tensor]]:
        """Views of all that is kept for a layer between steps; each list stacks to one tensor of a checkpoint."""

    @classmethod
    @abstractmethod
    def numbers(cls, block: Block) -> int:
        """How many numbers are kept for a block, or at most: what can be said before anything is allocated."""

    def memory(self, layer: int) -> int:
        """Bytes kept for a layer."""
        return sum(self.numbers(block) for block in self.layers[layer].blocks) * self.stores[0].sums.element_size()

    @abstractmethod
    def failures(self) -> Tensor:
        """How often the inverse of every block had to be replaced by something safer, on the device."""

    @abstractmethod
    def conditions(self) -> Tensor:
        """Estimated condition number of every damped block, on the device."""


def block_names(layers: Sequence[Layer]) -> list[str]:
    """Of every block, for warnings."""
    return [layer.name + (f"[{block.label}]" if block.label else "") for layer in layers for block in layer.blocks]


def eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues ``[n]``, none below 0, and eigenvectors ``[n, n]`` of a positive semi-definite matrix.

    None if it is not finite or the iteration fails. The host waits for the device, as torch.linalg.eigh does anyway.
    """
    if not bool(matrix.isfinite().all()):
        return None
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        return None
    return (values.clamp(min=0), vectors) if bool(vectors.isfinite().all()) else None


def as_matrix(gradient: Gradient, dtype: torch.dtype) -> Tensor:
    """V ``[d_out, d_in (+1)]`` with the bias as last column."""
    weight, bias = gradient if isinstance(gradient, tuple) else (gradient, None)
    matrix = weight.reshape(len(weight), -1).to(dtype)
    return matrix if bias is None else torch.cat([matrix, bias.to(dtype).unsqueeze(1)], 1)


def write_matrix(matrix: Tensor, out: Gradient) -> None:
    """Inverse of `as_matrix`, into ``out``."""
    weight, bias = out if isinstance(out, tuple) else (out, None)
    if bias is not None:
        bias.copy_(matrix[:, -1])
        matrix = matrix[:, :-1]
    weight.copy_(matrix.reshape(weight.shape))
