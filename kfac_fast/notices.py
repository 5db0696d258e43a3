"""`Notices`: warns once about layers that have no curvature, or not all of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from .inverses import KFACWarning
from .models import Original


class Notices:
    """What the user should know about the layers, each said once.

    Args:
        names: Of the layers.
        original: The model as it was.
    """

    def __init__(self, names: Sequence[str], original: Original) -> None:
        self._names = [name or "the model itself" for name in names]
        self._original = original
        self._told: set[object] = set()

    def unseen(self, layers: Sequence[int]) -> None:
        """Of layers that have a gradient, but no statistics."""
        self._warn(
            "unseen",
            layers,
            "no curvature statistics for layers that have a gradient: {}. They take the plain gradient until there are "
            "some. Causes: the outputs do not depend on them (the loss has other terms), the model itself was not "
            "called (only parts of it, or a functorch transform or functional_call of it), a weight is used without "
            "its module, or the model was compiled and run before the optimizer was made (then make the optimizer from "
            "the compiled model)",
        )

    def used_elsewhere(self, layers: Sequence[int]) -> None:
        """Of layers whose weights a forward pass also uses where no module shows it."""
        self._warn(
            "used elsewhere",
            layers,
            "weights are used outside of their modules too, which their curvature leaves out: {}. A head that shares "
            "the weight of an embedding should be a module (head.weight = embedding.weight); where the model takes "
            "gradients in its own forward pass, leave these layers out with blocks=Blocks(exclude=…)",
        )

    def changes(self) -> None:
        """Of modules and parameters that were replaced or unfrozen."""
        for name, change in self._original.changes().items():
            if name not in self._told:
                self._told.add(name)
                warnings.warn(
                    f"module {name!r}: {change} when the optimizer was made. It is not preconditioned, and not trained "
                    "unless it is in the optimizer: make a new one, or add the parameters with add_param_group",
                    KFACWarning,
                    stacklevel=4,
                )

    def _warn(self, kind: str, layers: Sequence[int], text: str) -> None:
        new = [i for i in layers if (kind, i) not in self._told]
        if new:
            self._told.update((kind, i) for i in new)
            warnings.warn(text.format(", ".join(self._names[i] for i in new)), KFACWarning, stacklevel=5)
