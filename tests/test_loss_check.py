"""Losses that are not the likelihood's negative log-likelihood are noticed, and only those."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fast import KFAC, Adaptive, Bernoulli, Categorical, Gaussian, KFACWarning, Likelihood
from kfac_fast.loss_check import STEPS

Loss = Callable[[Tensor, Tensor], Tensor]

CLASSES = torch.arange(32) % 5
BINARY = (torch.arange(160).view(32, 5) % 3 == 0).float()
REAL = torch.linspace(-2, 3, 160).view(32, 5)
PADDED = torch.where(torch.arange(32) % 4 == 0, -100, CLASSES)

RIGHT: list[tuple[Likelihood, Tensor, Loss]] = [
    (Categorical(), CLASSES, F.cross_entropy),
    (Categorical(), PADDED, F.cross_entropy),
    (Categorical(), CLASSES, Categorical().loss),
    (Bernoulli(), BINARY, Bernoulli().loss),
    (Bernoulli(), BINARY * 0.3 + 0.4, Bernoulli().loss),
    (Bernoulli(), BINARY, lambda z, y: 5 * F.binary_cross_entropy_with_logits(z, y)),
    (Gaussian(), REAL, Gaussian().loss),
    (Gaussian(0.1), REAL, Gaussian(0.1).loss),
    (Gaussian(), REAL, lambda z, y: 2.5 * F.mse_loss(z, y)),
    (Gaussian(), REAL, lambda z, y: Gaussian().loss(z, y) + 7.0),  # a constant does no harm
]
WRONG: list[tuple[Likelihood, Tensor, Loss, str]] = [
    (Categorical(), CLASSES, lambda z, y: F.cross_entropy(z, y, reduction="sum"), "targets that do not exist"),
    (Categorical(), CLASSES, lambda z, y: F.cross_entropy(z, y, label_smoothing=0.05), "targets that do not exist"),
    (Categorical(), CLASSES, lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([1.0, 2, 1, 1, 1])), "targets that do not exist"),
    (Categorical(), CLASSES, lambda z, y: 0.5 * F.cross_entropy(z, y), "targets that do not exist"),
    (Bernoulli(), BINARY, F.binary_cross_entropy_with_logits, "it was"),
    (Bernoulli(), BINARY, lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum"), "targets that do not exist"),
    (Bernoulli(), BINARY, lambda z, y: 5 * F.binary_cross_entropy_with_logits(z, y, pos_weight=torch.tensor(3.0)), "do"),
    (Gaussian(), REAL, F.mse_loss, "it was"),
    (Gaussian(), REAL, lambda z, y: F.mse_loss(z, y, reduction="sum"), "it was"),
    (Gaussian(2.0), REAL, Gaussian().loss, "it was"),
]  # fmt: skip


def train(likelihood: Likelihood, y: Tensor, loss: Loss, steps: int, micro_batches: int = 1) -> list[str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    optimizer = KFAC(model, likelihood=likelihood, adaptive=Adaptive(), damping=1.0)
    x = torch.randn(32, 6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for part, target in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            value = loss(model(part), target) / micro_batches
            value.backward()
            total = total + value.detach()
        return total

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.step(closure)
    return [str(w.message) for w in caught if issubclass(w.category, KFACWarning)]


@pytest.mark.parametrize("case", range(len(RIGHT)))
def test_the_likelihoods_own_loss_passes(case: int) -> None:
    assert train(*RIGHT[case], steps=STEPS + 1) == []


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_another_loss_is_said_once(case: int) -> None:
    likelihood, y, loss, reason = WRONG[case]
    (message,) = train(likelihood, y, loss, steps=STEPS + 1)
    assert f"the loss is not the mean negative log-likelihood of {likelihood!r}" in message
    assert reason in message


def test_micro_batches_count_together() -> None:
    assert train(Categorical(), CLASSES, F.cross_entropy, steps=3, micro_batches=4) == []
    assert len(train(Categorical(), CLASSES, lambda z, y: 4 * F.cross_entropy(z, y), steps=3, micro_batches=4)) == 1


def test_a_likelihood_that_implies_nothing_is_not_checked() -> None:
    class Poisson(Likelihood):
        def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return (targets * outputs - outputs.exp()).sum(-1)

        def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return torch.poisson(outputs.exp(), generator)

    assert train(Poisson(), BINARY, lambda z, y: 3 * Poisson().loss(z, y), steps=3) == []
