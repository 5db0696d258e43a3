"""The whole optimizer step (forward, backward, update), as a multiple of SGD with momentum in the same run."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fast import KFAC
from kfac_fast.data import curves_autoencoder

from .harness import Row, compare

Loss = Callable[[Tensor], Tensor]


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


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, loss: Loss) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()

    return step


def ratio(name: str, make: Callable[[], nn.Module], x: Tensor, loss: Loss, bar: float, **options: object) -> Row:
    sgd_model, model = make(), make()
    sgd = torch.optim.SGD(sgd_model.parameters(), lr=1e-4, momentum=0.9, foreach=True)
    kfac = KFAC(model, lr=1e-4, **options)  # type: ignore[arg-type]
    # A bar is at most `bar` times SGD; compare() wants rival / ours at least something.
    row = compare(
        "step", name, "SGD momentum", stepper(model, kfac, x, loss), stepper(sgd_model, sgd, x, loss), 1 / bar,
    )  # fmt: skip
    row.extra["times_sgd"] = 1 / row.ratio
    row.extra["at_most"] = bar
    print(f"{'':16}  {1 / row.ratio:.2f} times SGD (at most {bar})")
    return row


def bernoulli(y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(y, torch.full_like(y, 0.3), reduction="none").sum(1).mean()


def classes(y: Tensor) -> Tensor:
    return F.cross_entropy(y, torch.zeros(len(y), dtype=torch.long))


def run() -> list[Row]:
    rows = []
    x = torch.randn(128, 128)
    rows.append(ratio("200 layers, everything every step", ManyLayers, x, classes, 3.0, inverse_every=1))
    rows.append(ratio("200 layers, inverses every 10", ManyLayers, x, classes, 2.0, inverse_every=10))
    for batch, bars in ((1000, (2.8, 1.7)), (128, (4.5, 2.2))):
        images = torch.rand(batch, 784)
        every = {"likelihood": "bernoulli", "inverse_every": 1}
        rows.append(ratio(f"CURVES {batch}, everything", curves_autoencoder, images, bernoulli, bars[0], **every))
        some = {"likelihood": "bernoulli", "inverse_every": 10, "factor_fraction": 1 / 8}
        rows.append(ratio(f"CURVES {batch}, τ₁ = 1/8, inv. 10", curves_autoencoder, images, bernoulli, bars[1], **some))
    return rows
