"""Every scheduler of torch.optim.lr_scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import DOUBLE, backward, mlp
from torch.optim import lr_scheduler, swa_utils

from kfac_fast import KFAC, Preconditioner

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.5, total_iters=2), lr_scheduler.ExponentialLR(o, gamma=0.8)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, gamma=0.8)], milestones=[2]
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3),
}  # fmt: skip


def test_every_public_scheduler_is_tried() -> None:
    """Those that torch lists, and every class there that is one."""
    found = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert set(SCHEDULERS) == (found | set(lr_scheduler.__all__)) - {"LRScheduler"}


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers(name: str, tensor: bool) -> None:
    """Learning rate and momentum of every step are the scheduler's: the run is SGD's on natural gradients."""
    runs = []
    for kfac in (True, False):
        model = mlp(DOUBLE)
        lr = torch.tensor(0.05, dtype=DOUBLE) if tensor else 0.05
        pre = None if kfac else Preconditioner(model, damping=0.1)
        optimizer: torch.optim.Optimizer = (
            KFAC(model, lr=lr, damping=0.1, kl_clip=None, nesterov=False)
            if kfac
            else torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        )
        scheduler = SCHEDULERS[name](optimizer)
        rates = []
        for step in range(7):
            optimizer.zero_grad()
            backward(model, step)
            if pre is not None:
                pre.step()
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates.append(float(optimizer.param_groups[0]["lr"]))
        assert len(set(rates)) > 1
        runs.append((rates, [p.detach() for p in model.parameters()]))
    assert runs[0][0] == pytest.approx(runs[1][0])
    assert all(torch.allclose(p, q, atol=1e-12) for p, q in zip(runs[0][1], runs[1][1], strict=True))
