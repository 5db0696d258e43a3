"""`KFAC(model)`, with nothing else said, trains classifiers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fast import KFAC
from kfac_fast.data import digits


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, epochs: int) -> None:
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for i in torch.randperm(len(x), generator=order).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()


@pytest.mark.parametrize("make", [mlp, convolutional])
def test_defaults_reach_97_percent_on_the_digits_within_five_epochs(make) -> None:
    x_train, y_train, x_test, y_test = digits()
    model = make()
    train(model, KFAC(model), x_train, y_train, epochs=5)
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).double().mean()
    assert accuracy >= 0.97


def test_the_same_seed_gives_the_same_run() -> None:
    x_train, y_train, _, _ = digits()
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        model = mlp()
        train(model, KFAC(model), x_train[:256], y_train[:256], epochs=1)
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(runs[0], runs[1])
