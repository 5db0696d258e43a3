"""The whole optimizer step (forward, backward, update), as a multiple of SGD with momentum in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fast import KFAC
from kfac_fast.data import curves_autoencoder
from kfac_fast.ops import native

from .harness import Call, Case
from .stopwatch import Stopwatch
from .workloads import ManyLayers

Loss = Callable[[Tensor], Tensor]
STEPS = 10  # looked at for the time inside kernels: one round of the inverses


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, loss: Loss) -> Call:
    def step() -> None:
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()

    return step


def kernel_share(step: Call) -> dict[str, float]:
    """Milliseconds that a step spends inside the ops' native calls."""
    watch = Stopwatch()
    undo = watch.wrap(native, "_run", "kernels")
    try:
        for _ in range(STEPS):
            step()
    finally:
        undo()
    return {"kernels_ms": 1e3 * watch.seconds["kernels"] / STEPS}


def case(name: str, make: Callable[[], nn.Module], x: Tensor, loss: Loss, bar: float, **options: object) -> Case:
    """A bar is at most `bar` times SGD; a row wants rival / ours at least something."""

    def calls() -> tuple[Call, Call]:
        sgd_model, model = make(), make()
        sgd = torch.optim.SGD(sgd_model.parameters(), lr=1e-4, momentum=0.9, foreach=True)
        kfac = KFAC(model, lr=1e-4, **options)  # type: ignore[arg-type]
        return stepper(model, kfac, x, loss), stepper(sgd_model, sgd, x, loss)

    return Case("step", name, "SGD momentum", calls, 1 / bar, extra=kernel_share)


def bernoulli(y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(y, torch.full_like(y, 0.3), reduction="none").sum(1).mean()


def classes(y: Tensor) -> Tensor:
    return F.cross_entropy(y, torch.zeros(len(y), dtype=torch.long))


def cases() -> Iterator[Case]:
    x = torch.randn(128, 128)
    yield case("200 layers, everything every step", ManyLayers, x, classes, 3.0, inverse_every=1)
    yield case("200 layers, inverses every 10", ManyLayers, x, classes, 2.0, inverse_every=10)
    for batch, bars in ((1000, (2.8, 1.7)), (128, (4.5, 2.2))):
        images = torch.rand(batch, 784)
        every = {"likelihood": "bernoulli", "inverse_every": 1}
        yield case(f"CURVES {batch}, everything", curves_autoencoder, images, bernoulli, bars[0], **every)
        some = {"likelihood": "bernoulli", "inverse_every": 10, "factor_fraction": 1 / 8}
        yield case(f"CURVES {batch}, τ₁ = 1/8, inv. 10", curves_autoencoder, images, bernoulli, bars[1], **some)
