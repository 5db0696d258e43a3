"""The adaptive step on CURVES as a multiple of SGD with momentum, and where its time goes.

Sixty steps from the start, the calibration of λ included, in turn with sixty of SGD, three times over. The steps of the
rounds are the same ones, so that the shortest time of each is taken: what disturbs a round does not count.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kfac_fast import KFAC, Adaptive
from kfac_fast.data import curves, curves_autoencoder

from .harness import Row, line
from .stopwatch import Stopwatch

STEPS, ROUNDS, BATCH = 60, 3, 1_000
PAPER = {"t1": 5, "t2": 20, "t3": 20}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], float | None]] = {
    "paper's constants": (PAPER, {"factor_fraction": 1 / 8}, 2.5),
    "paper's constants, γ searched": ({**PAPER, "gamma": "search"}, {"factor_fraction": 1 / 8}, 2.5),
    "paper's constants, λ₀ = 10": (PAPER, {"factor_fraction": 1 / 8, "damping": 10.0}, 2.5),
    "defaults (T₃ = 5, τ₁ = 1)": ({}, {}, None),
}


def _model() -> nn.Sequential:
    return curves_autoencoder(generator=torch.Generator().manual_seed(0))


def _loss(logits: Tensor, images: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


def _sgd(images: Tensor) -> Callable[[], None]:
    model = _model()
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=True)

    def step() -> None:
        sgd.zero_grad()
        _loss(model(images), images).backward()
        sgd.step()

    return step


def _kfac(images: Tensor, constants: dict[str, Any], options: dict[str, Any], split: Stopwatch) -> Callable[[], None]:
    model = _model()
    kfac = KFAC(model, adaptive=Adaptive(**constants), likelihood="bernoulli", weight_decay=1e-5, **options)
    rule, pre = kfac.rule, kfac.preconditioner
    assert rule is not None
    split.wrap(pre.capture.own_pass, "run", "statistics")
    split.wrap(pre, "update_factors", "statistics")
    split.wrap(pre, "update_inverses", "inverses")
    split.wrap(pre, "precondition", "natural gradient")
    split.wrap(rule.products, "forms", "products")

    def closure() -> Tensor:
        with split.part("gradient"):
            kfac.zero_grad()
            loss = _loss(model(images), images)
            loss.backward()
        return loss

    def evaluate() -> Tensor:
        with split.part("loss after"):
            return _loss(model(images), images)

    def step() -> None:
        with split.part("the rest"):
            kfac.step(closure, evaluate)

    return step


def run() -> list[Row]:
    images = curves(BATCH, 0).train
    sgd = [float("inf")] * STEPS
    ours = {name: [float("inf")] * STEPS for name in CASES}
    rounds: dict[str, list[float]] = defaultdict(list)
    splits = {name: [Stopwatch() for _ in range(ROUNDS)] for name in CASES}
    for turn in range(ROUNDS):
        steps = {name: _kfac(images, *CASES[name][:2], splits[name][turn]) for name in CASES}
        plain = _sgd(images)
        plain()  # threads and libraries are up
        spent: dict[str, float] = defaultdict(float)
        for i in range(STEPS):
            for name, step in {"": plain, **steps}.items():
                start = time.perf_counter()
                step()
                seconds = time.perf_counter() - start
                spent[name] += seconds
                best = ours[name] if name else sgd
                best[i] = min(best[i], seconds)
        for name in CASES:
            rounds[name].append(spent[""] / spent[name])
    rows = []
    for name, (_, _, most) in CASES.items():
        times, rival = sum(ours[name]) / STEPS, sum(sgd) / STEPS
        row = Row(
            "adaptive", name, "SGD momentum", times, rival, rival / times, min(rounds[name]), max(rounds[name]),
            None if most is None else 1 / most, {"times_sgd": times / rival},
        )  # fmt: skip
        print(line(row))
        # Parts of the calmest round, as multiples of an SGD step.
        split = min(splits[name], key=lambda s: sum(s.seconds.values())).seconds
        row.extra |= {part: seconds / STEPS / rival for part, seconds in split.items()}
        print(
            f"{'':16}  {times / rival:.2f} times SGD: "
            + ", ".join(f"{p} {s / STEPS / rival:.2f}" for p, s in split.items())
        )
        rows.append(row)
    return rows
