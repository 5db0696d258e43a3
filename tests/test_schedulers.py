"""Every scheduler of torch.optim.lr_scheduler."""

from __future__ import annotations

import copy
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


def change(optimizer: KFAC, model: torch.nn.Module) -> torch.Tensor:
    """What one more step changes."""
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    backward(model, 1)
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


def test_clipped_steps_follow_the_schedule() -> None:
    """A tenth of the rate is a tenth of the step, though the clip alone decides how long the step is."""
    model = mlp(DOUBLE)
    optimizer = KFAC(model, lr=0.5, kl_clip=1e-6, momentum=0.0)
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    other, lower = copy.deepcopy((model, optimizer))
    later = copy.deepcopy(model)
    resumed = KFAC(later, lr=0.05, kl_clip=1e-6, momentum=0.0)
    resumed.load_state_dict(optimizer.state_dict())
    lower.param_groups[0]["lr"] = resumed.param_groups[0]["lr"] = 0.05
    full = change(optimizer, model)
    assert optimizer.stats()["clip"] < 0.1
    assert torch.allclose(change(lower, other), full / 10, rtol=1e-9, atol=1e-15)
    assert torch.allclose(change(resumed, later), full / 10, rtol=1e-9, atol=1e-15)


def test_clipped_steps_follow_a_warm_up() -> None:
    """The first steps of a scheduler that rises to its highest rate are shorter by as much as their rate."""
    runs = []
    for shares in ([0.25, 0.5, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]):
        model = mlp(DOUBLE)
        optimizer = KFAC(model, lr=0.5, kl_clip=1e-8, momentum=0.0)
        scheduler = lr_scheduler.LambdaLR(optimizer, shares.__getitem__)
        steps = []
        for share in shares[:3]:
            steps.append(change(optimizer, model).norm() / share)
            assert optimizer.stats()["clip"] < 0.1
            optimizer.zero_grad()
            scheduler.step()
        runs.append(steps)
    assert [float(step) for step in runs[0]] == pytest.approx([float(step) for step in runs[1]], rel=0.01)


@pytest.mark.parametrize("highest", [-1.0, float("nan"), "much"])
def test_a_highest_rate_that_is_none_is_refused(highest: object) -> None:
    optimizer = KFAC(mlp())
    state = optimizer.state_dict()
    state["param_groups"][0]["highest_lr"] = highest
    with pytest.raises(ValueError, match="highest_lr must be a number >= 0, got highest_lr="):
        optimizer.load_state_dict(state)
