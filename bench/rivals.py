"""Other packages for second-order steps: those that are installed join `bench.models`, the others are named."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .harness import Call
from .workloads import Workload

NEVER = 10**9
DAMPING = 0.03
# Calls for the kinds of steps, and what part of all steps is of that kind.
Kinds = dict[Call, float]


def _sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, foreach=True)


def _in_turn(make: Callable[[int], Call], every: int) -> Kinds:
    """A step that updates all every `every` steps, from steps that do so always, and never after the first."""
    return {make(1): 1 / every, make(NEVER): 1 - 1 / every}


def _kfac_pytorch(package: Any, workload: Workload, lr: float, every: int) -> tuple[str, Kinds]:
    def make(inverse_every: int) -> Call:
        model = workload.model()
        sgd = _sgd(model, lr)
        preconditioner = package.KFACPreconditioner(
            model, factor_update_steps=1, inv_update_steps=inverse_every, damping=DAMPING, lr=lr
        )

        def step() -> None:
            sgd.zero_grad()
            workload.backward(model)
            preconditioner.step()
            sgd.step()

        return step

    return f"kfac-pytorch 1, inv. {every}", _in_turn(make, every)


def _asdl(package: Any, workload: Workload, lr: float, every: int) -> tuple[str, Kinds]:
    def make(inverse_every: int) -> Call:
        model = workload.model()
        sgd = _sgd(model, lr)
        config = package.PreconditioningConfig(
            data_size=len(workload.inputs),
            damping=DAMPING,
            ema_decay=0.05,
            curvature_upd_interval=1,
            preconditioner_upd_interval=inverse_every,
        )
        maker = package.KfacGradientMaker(model, config)

        def step() -> None:
            sgd.zero_grad()
            outputs = maker.setup_model_call(model, workload.inputs)
            maker.setup_loss_call(F.cross_entropy, outputs, workload.targets)
            maker.forward_and_backward()
            sgd.step()

        return step

    return f"asdfghjkl 1, inv. {every}", _in_turn(make, every)


def _singd(package: Any, workload: Workload, lr: float, every: int) -> tuple[str, Kinds]:
    def make(interval: int) -> Call:
        model = workload.model()
        optimizer = package.SINGD(model, lr=lr, damping=DAMPING, T=interval, warn_unsupported=False)
        return workload.stepper(model, optimizer)

    return f"singd {every}", _in_turn(make, every)


def _curvlinops(package: Any, workload: Workload, lr: float, every: int) -> tuple[str, Kinds]:
    """Not an optimizer: its operator for K-FAC is made anew with its inverse, and applied to the gradients."""

    def make(interval: int) -> Call:
        model = workload.model()
        sgd = _sgd(model, lr)
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        params = [p for layer in layers for p in layer.parameters()]
        inverse: Any = None

        def step() -> None:
            nonlocal inverse
            sgd.zero_grad()
            workload.backward(model)
            if inverse is None or interval == 1:
                data = [(workload.inputs, workload.targets)]
                kfac = package.KFACLinearOperator(model, nn.CrossEntropyLoss(), params, data, check_deterministic=False)
                inverse = package.KFACInverseLinearOperator(kfac, damping=DAMPING, use_heuristic_damping=True)
            updates = inverse @ [p.grad for p in params]  # the first time it makes the factors, which needs gradients
            for p, u in zip(params, updates, strict=True):
                p.grad = u.detach()
            sgd.step()

        return step

    return f"curvlinops {every}", _in_turn(make, every)


# By the name that pip knows: the module to import, and what makes the steps.
RIVALS: dict[str, tuple[str, Callable[[Any, Workload, float, int], tuple[str, Kinds]]]] = {
    "kfac-pytorch": ("kfac.preconditioner", _kfac_pytorch),
    "asdfghjkl": ("asdl", _asdl),
    "singd": ("singd.optim.optimizer", _singd),
    "curvlinops-for-pytorch": ("curvlinops", _curvlinops),
}


def installed(workload: Workload, lr: float, every: int) -> Iterator[tuple[str, Kinds]]:
    """Label and kinds of steps of every rival that is installed and takes this network.

    Args:
        workload: The network and its batch.
        lr: Learning rate.
        every: Steps between updates of the inverses, or of all where a package has one interval for both.
    """
    for name, (module, make) in RIVALS.items():
        try:
            package = importlib.import_module(module)
        except ImportError:
            print(f"{name}: left out, not installed")
            continue
        try:
            label, kinds = make(package, workload, lr, every)
            for call in kinds:
                call()
        except Exception as error:  # any: it is somebody else's package on a network that it may not know
            print(f"{name}: left out, {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}")
            continue
        yield label, kinds
