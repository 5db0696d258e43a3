"""The four networks of `bench.models`, each with one batch: what is timed is a step, not training."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.models.resnet import ResNet20
from examples.models.transformer import CharTransformer

from .harness import Call

CLASSES = 10
VOCABULARY, CONTEXT, WIDTH = 256, 32, 256


@dataclass(frozen=True)
class Workload:
    """A network and what it is trained on.

    Attributes:
        name: With the batch, as the tables show it.
        model: Makes it.
        inputs: One batch.
        targets: Classes, ``[N]``, or ``[N, T]`` for outputs ``[N, T, C]``.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor

    def backward(self, model: nn.Module) -> None:
        """Forward and backward pass."""
        F.cross_entropy(model(self.inputs).flatten(0, -2), self.targets.flatten()).backward()

    def stepper(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Call:
        """One training step."""

        def step() -> None:
            optimizer.zero_grad()
            self.backward(model)
            optimizer.step()

        return step


class ManyLayers(nn.Module):
    """200 small Linear layers side by side: Python and launches, not arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        generator = random.Random(0)
        widths = [(generator.randint(8, 128), generator.randint(8, 128)) for _ in range(200)]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in widths)

    def forward(self, x: Tensor) -> Tensor:
        h = [layer(x[:, : layer.in_features]).tanh().mean(1) for layer in self.layers]
        return torch.stack(h, 1)


def perceptron() -> nn.Module:
    """784–512–512–512–10."""
    widths = [784, 512, 512, 512]
    hidden = [m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], CLASSES))


def workloads() -> dict[str, Workload]:
    """By a short name."""

    def classes(*shape: int, count: int = CLASSES) -> Tensor:
        return torch.randint(count, shape)

    text = classes(128, CONTEXT + 1, count=VOCABULARY)
    return {
        "mlp": Workload("MLP 784–512³–10, batch 512", perceptron, torch.rand(512, 784), classes(512)),
        "resnet": Workload("ResNet-20 32×32, batch 128", ResNet20, torch.randn(128, 3, 32, 32), classes(128)),
        "transformer": Workload(
            f"transformer 4 × {WIDTH}, {128 * CONTEXT} tokens",
            lambda: CharTransformer(VOCABULARY, CONTEXT, WIDTH),
            text[:, :-1],
            text[:, 1:],
        ),
        "layers": Workload("200 small layers, batch 128", ManyLayers, torch.randn(128, 128), classes(128, count=200)),
    }
