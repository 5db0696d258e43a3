"""Who takes part, with which settings, and how a setting is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Muon, Optimizer

from kfac_fast import KFAC, Adaptive

from .problems import L2

Setting = dict[str, float]
Closure = Callable[[], Tensor]


class Trainer:
    """Optimizers that share a model, as one."""

    shown: Callable[[], AbstractContextManager[None]] = nullcontext  # inside, the model has the weights to measure

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers

    def update(self, k: int, closure: Closure, evaluate: Closure) -> None:
        """The k-th update, counted from 1. ``evaluate`` is the loss without a backward pass."""
        first, *others = self.optimizers
        first.step(closure)
        for optimizer in others:
            optimizer.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        for optimizer, one in zip(self.optimizers, state, strict=True):
            optimizer.load_state_dict(one)


class Nesterov(Trainer):
    """SGD with Nesterov momentum under the schedule of Sutskever et al. 2013, sec. 3:

    μ_t = min(1 − 2^(−1−log₂(⌊t/period⌋+1)), μ_max), and at most 0.9 for the last hundred updates. Their period of 250
    is for 750,000 updates and gets to μ = 0.96 in 3,000. One of 25 gets to 0.996 and is the better rival on CURVES.
    """

    def __init__(self, model: nn.Module, setting: Setting, updates: int) -> None:
        self.sgd = SGD(model.parameters(), lr=setting["lr"], momentum=0.5, nesterov=True, weight_decay=L2)
        self.largest, self.period, self.updates = setting["momentum"], int(setting["period"]), updates
        super().__init__(self.sgd)

    def update(self, k: int, closure: Closure, evaluate: Closure) -> None:
        momentum = min(1 - 2 ** (-1 - math.log2((k - 1) // self.period + 1)), self.largest)
        self.sgd.param_groups[0]["momentum"] = min(momentum, 0.9) if k > self.updates - 100 else momentum
        super().update(k, closure, evaluate)


class AdaptiveKFAC(Trainer):
    def __init__(self, model: nn.Module, config: Adaptive, **options: Any) -> None:
        fixed = {"likelihood": "bernoulli", "factor_fraction": 1 / 8, "weight_decay": L2}
        self.kfac = KFAC(model, adaptive=config, **fixed, **options)
        if config.averaging is not None:
            self.shown = self.kfac.averaged
        super().__init__(self.kfac)

    def update(self, k: int, closure: Closure, evaluate: Closure) -> None:
        self.kfac.step(closure, evaluate)


def muon(model: nn.Module, setting: Setting, updates: int) -> Trainer:
    """Muon for the matrices, Adam at a tenth of its rate for the biases, which Muon does not take."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return Trainer(Muon(matrices, lr=setting["lr"], weight_decay=0.0), Adam(others, lr=setting["lr"] / 10))


@dataclass(frozen=True)
class Contender:
    """An optimizer that takes part.

    Attributes:
        name: As the tables show it.
        make: From a model, a setting and the number of updates.
        updates: Of its final runs.
        grid: Settings that are tried with a seed of their own.
        rounds: (updates, survivors): all settings are tried for the first number, the best go on to the second, …
    """

    name: str
    make: Callable[[nn.Module, Setting, int], Trainer]
    updates: int
    grid: tuple[Setting, ...] = ({},)
    rounds: tuple[tuple[int, int], ...] = ()


def rates(values: Sequence[float]) -> tuple[Setting, ...]:
    return tuple({"lr": value} for value in values)


def kfac(config: Adaptive, **options: Any) -> Callable[[nn.Module, Setting, int], Trainer]:
    return lambda model, setting, updates: AdaptiveKFAC(model, config, **options)


SHORT, NESTEROV = 300, 3_000

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("K-FAC", kfac(Adaptive()), SHORT),
        Contender("K-FAC, no momentum", kfac(Adaptive(momentum=False)), SHORT),
        Contender("K-FAC, γ = √(λ+η)", kfac(Adaptive(gamma="sqrt")), SHORT),
        Contender("K-FAC, block-tridiagonal", kfac(Adaptive(), approximation="block_tridiagonal"), SHORT),
        Contender(
            "K-FAC, block-tridiagonal, no momentum",
            kfac(Adaptive(momentum=False), approximation="block_tridiagonal"),
            SHORT,
        ),
        Contender(
            "SGD-Nesterov",
            Nesterov,
            NESTEROV,
            tuple(
                {"lr": lr, "momentum": momentum, "period": period}
                for lr, (momentum, period) in product(
                    (0.001, 0.003, 0.01, 0.03), ((0.999, 250), (0.9, 25), (0.99, 25), (0.995, 25))
                )
            ),
            ((250, 6), (1_000, 3), (NESTEROV, 1)),
        ),
        Contender(
            "AdaGrad",
            lambda model, setting, updates: Trainer(Adagrad(model.parameters(), **setting, weight_decay=L2)),
            SHORT,
            rates((0.003, 0.01, 0.03, 0.1)),
            ((200, 1),),
        ),
        Contender(
            "Adam",
            lambda model, setting, updates: Trainer(Adam(model.parameters(), **setting, weight_decay=L2)),
            SHORT,
            rates((0.0003, 0.001, 0.003, 0.01)),
            ((200, 1),),
        ),
        Contender("Muon", muon, SHORT, rates((0.003, 0.01, 0.03, 0.1)), ((200, 1),)),
    )
}
