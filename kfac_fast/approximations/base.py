"""`Approximation`: what an approximate inverse Fisher has to do, whatever its structure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ..layers import Inputs, Layer
from ..ops import Gradient
from ..statistics import Store
from ..tape import Pass


class Approximation(ABC):
    """Turns the statistics of some layers into an approximate inverse Fisher matrix and applies it to gradients.

    Layers are numbered from 0 in the order given; their blocks follow each other in that order.

    Attributes:
        name: What the user calls it.
        layers: The layers it serves.
        stores: Its running statistics; they are committed together with all others.
        failures: How often the inverse of each part (a factor, a block) had to be replaced by something safer, on the
            device.
    """

    name: ClassVar[str]
    layers: Sequence[Layer]
    stores: list[Store]
    failures: Tensor

    @abstractmethod
    def add_rows(self, layer: int, inputs: Inputs, gradient: Tensor, sent: Pass, block: int = 0) -> None:
        """Takes one use's rows; see `tape.Sink`."""

    @abstractmethod
    def seen(self, layer: int) -> bool:
        """Whether the layer has rows waiting for the next commit."""

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

    @abstractmethod
    def apply(self, gradients: Sequence[Gradient], out: Sequence[Gradient]) -> Tensor:
        """Natural gradients U of V, and ⟨V, U⟩.

        Args:
            gradients: V of every block.
            out: Where U goes, same structure.

        Returns:
            ⟨V, U⟩ of every block, on the device.
        """

    @abstractmethod
    def state(self, layer: int) -> dict[str, list[Tensor]]:
        """Views of all that is kept for a layer between steps; each list stacks to one tensor of a checkpoint."""

    @abstractmethod
    def memory(self, layer: int) -> int:
        """Bytes kept for a layer."""
