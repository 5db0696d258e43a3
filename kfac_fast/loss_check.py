"""Notices a loss that is not the likelihood's negative log-likelihood, which the quadratic model would misjudge."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .inverses import KFACWarning
from .likelihoods import Likelihood
from .tape import Batch

STEPS = 20  # that are looked at, at most; usually the first one decides


class LossCheck:
    """Compares the loss of the first steps with what its own gradient at the outputs implies, and warns once.

    The targets are not known, but the gradient of a negative log-likelihood tells them, p − M g for a softmax; they
    have to be possible targets, and the loss has to have the value that belongs to them, up to a constant.

    Args:
        likelihood: What the loss should belong to. One of the user's own that has no `Likelihood.implied` is not
            checked.
    """

    def __init__(self, likelihood: Likelihood) -> None:
        self._likelihood = likelihood
        self._losses: list[float] = []
        self._implied: list[float] = []
        self.open = True

    def look(self, loss: float, batches: Sequence[Batch]) -> None:
        """At the mean loss of a step, which must be finite, and its batches."""
        terms = sum(float(batch.counted.sum()) for batch in batches)
        total, possible = 0.0, True
        for batch in batches:
            assert batch.outputs is not None
            assert batch.gradient is not None
            implied = self._likelihood.implied(batch.outputs, batch.gradient * terms)
            if implied is None:
                self.open = False
                return
            total += float(torch.where(batch.counted, implied.loss, 0.0).sum(dtype=torch.float64))
            possible = possible and bool((implied.possible | ~batch.counted).all())
        if not possible:
            self._warn(
                "its gradient belongs to targets that do not exist: a sum instead of a mean, label smoothing, class "
                "weights or another factor are the usual causes"
            )
            return
        self._losses.append(loss)
        self._implied.append(total / max(terms, 1.0))
        self._compare()

    def _compare(self) -> None:
        losses, implied = (torch.tensor(x, dtype=torch.float64) for x in (self._losses, self._implied))
        apart = losses - implied
        scale, change = float(losses.abs().max()), float(_spread(losses))
        if float(apart.abs().max()) <= 1e-3 * scale:
            self.open = False
        elif change > 0.01 * scale or len(self._losses) == STEPS:
            self.open = False
            # A constant, like the ½ log 2π of a normal distribution, has no gradient and does no harm.
            if float(_spread(apart)) > 0.05 * change:
                self._warn(
                    f"it was {self._losses[0]:.4g} where its gradient belongs to {self._implied[0]:.4g}: a mean over "
                    "the outputs, as in nn.MSELoss() and nn.BCEWithLogitsLoss(), or another factor are the usual causes"
                )

    def _warn(self, reason: str) -> None:
        self.open = False
        warnings.warn(
            f"the loss is not the mean negative log-likelihood of {self._likelihood!r}: {reason}. Learning rate, "
            "momentum and damping are derived from that one; use likelihood.loss, or a loss that equals it up to a "
            "constant",
            KFACWarning,
            stacklevel=5,
        )


def _spread(x: Tensor) -> Tensor:
    return x.max() - x.min()
