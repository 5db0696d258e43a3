"""How many kernels a training step launches, counted in the simulated CUDA backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import Simulator, cpu_table
from torch import nn

from kfac_fast import KFAC, factors

BATCH, WIDTH, CLASSES = 8, 12, 3


def launches(simulator: Simulator, layers: int) -> tuple[int, int]:
    """Of the second backward pass and the second step of a network with so many hidden layers."""
    hidden = [part for _ in range(layers) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(WIDTH, CLASSES))
    optimizer = KFAC(model, inverse_every=1)
    x, y = torch.randn(BATCH, WIDTH), torch.randint(CLASSES, (BATCH,))
    counts = (0, 0)
    with cpu_table(simulator.table):
        for _ in range(2):
            optimizer.zero_grad()
            before = simulator.launches()
            F.cross_entropy(model(x), y).backward()
            between = simulator.launches()
            optimizer.step()
            counts = between - before, simulator.launches() - between
    return counts


def test_launches_of_a_step_do_not_grow_with_the_number_of_layers(simulator: Simulator) -> None:
    few, many = launches(simulator, 2), launches(simulator, 15)
    assert few == many
    assert few[1] > 0


def test_launches_for_captured_rows_grow_with_their_bytes_only(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, width = 15, 4
    once = sum(launches(simulator, layers))
    budget = 2 * BATCH * WIDTH * width * 4  # four hidden layers' inputs and output gradients
    monkeypatch.setattr(factors, "QUEUE_BYTES", budget)
    rows = layers * 2 * BATCH * WIDTH * width + BATCH * (WIDTH + CLASSES) * width
    flushes = rows // budget + 1
    assert once < sum(launches(simulator, layers)) <= once * flushes
