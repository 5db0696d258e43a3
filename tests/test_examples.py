"""The example models: the block of every parameter, and that ``KFAC(model)`` and nothing else trains them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from examples.models.tasks import TASKS
from kfac_fast import KFAC

# What a module's own parameters are to be covered by. A module of another type fails the test.
KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "LinearLayer",
    nn.Conv2d: "ConvLayer",
    nn.ConvTranspose2d: "ConvTransposeLayer",
    nn.Embedding: "EmbeddingLayer",
    nn.LayerNorm: "LayerNormLayer",
    nn.GroupNorm: "GroupNormLayer",
    nn.BatchNorm2d: "BatchNormLayer",
    nn.LSTM: "RecurrentLayer",
    nn.MultiheadAttention: "AttentionLayer",
}

# How many parameters of each model have which block.
COUNTS = {
    "transformer": {"EmbeddingLayer": 2, "AttentionLayer": 16, "LinearLayer": 18, "LayerNormLayer": 18},
    "lstm": {"EmbeddingLayer": 1, "RecurrentLayer": 8, "LinearLayer": 2},
    "resnet": {"ConvLayer": 21, "BatchNormLayer": 38, "LinearLayer": 2},
    "separable": {"ConvLayer": 6, "BatchNormLayer": 8, "LinearLayer": 2},
    "unet": {"ConvLayer": 12, "ConvTransposeLayer": 4, "GroupNormLayer": 2},
    "mixer": {"ConvLayer": 2, "LayerNormLayer": 10, "LinearLayer": 18},
}


@pytest.mark.parametrize("name", TASKS)
def test_every_parameter_has_the_block_of_its_module(name: str) -> None:
    model = TASKS[name].model()
    optimizer = KFAC(model)
    modules = dict(model.named_modules())
    counted: Counter[str] = Counter()
    for row in optimizer.report():
        owner = modules[row.name.removesuffix("out_proj.weight").removesuffix("out_proj.bias").rpartition(".")[0]]
        assert row.kind == KINDS[type(owner)], f"{row.name}: {row.reason}"
        counted[row.kind] += 1
    assert dict(counted) == COUNTS[name]
    assert sum(counted.values()) == len(list(model.parameters()))


@pytest.mark.parametrize("name", TASKS)
def test_it_trains_with_nothing_else(name: str) -> None:
    torch.manual_seed(0)
    task = TASKS[name]
    model = task.model()
    optimizer = KFAC(model)
    x, y = task.batch(8, torch.Generator().manual_seed(0))
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = task.loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]
    assert optimizer.stats()["failures"] == 0
    for part in optimizer.preconditioner.parts:  # statistics came for every block of every layer
        for layer in range(len(part.layers)):
            assert all(bool((count == 6).all()) for count in part.state(layer)["updates"])
