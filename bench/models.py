"""The whole step on four networks, as a multiple of SGD with momentum in the same run, and where its time goes.

A K-FAC schedule is not run for its whole cycle, which may be 100 steps. Each *kind* of step (plain, with factors, with
inverses, with both) is timed by itself, in turn with SGD's, and the times are combined by how often a cycle has each.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kfac_fast import KFAC
from kfac_fast.preconditioner import ALWAYS_INVERT_FIRST

from . import rivals
from .harness import REPEATS, Call, Row, count_for, line, stretch
from .memory import peak_mebibytes
from .parts import PARTS, split
from .workloads import Workload, workloads

MIN_REPEATS, SECONDS = 3, 20.0  # a large network gets fewer repeats
LR = 1e-4  # of everyone: small, so that a thousand steps on one batch change little


@dataclass(frozen=True)
class Schedule:
    """When K-FAC updates what."""

    factor_every: int
    inverse_every: int
    factor_fraction: float

    @property
    def name(self) -> str:
        fraction = "" if self.factor_fraction == 1 else f" τ₁ = 1/{round(1 / self.factor_fraction)}"
        return f"K-FAC {self.factor_every}{fraction}, inv. {self.inverse_every}"

    def kinds(self) -> dict[int, float]:
        """The number of a step of each kind, and what part of all steps is of that kind."""
        cycle = math.lcm(self.factor_every, self.inverse_every)
        kinds = [(step % self.factor_every == 0, step % self.inverse_every == 0) for step in range(cycle)]
        return {cycle + kinds.index(kind): count / cycle for kind, count in Counter(kinds).items()}

    def optimizer(self, model: nn.Module) -> KFAC:
        return KFAC(
            model,
            lr=LR,
            factor_every=self.factor_every,
            inverse_every=self.inverse_every,
            factor_fraction=self.factor_fraction,
        )


OFTEN, SELDOM, SELDOM_PART = Schedule(1, 20, 1 / 8), Schedule(10, 100, 1.0), Schedule(10, 100, 1 / 8)
SCHEDULES = (OFTEN, SELDOM, SELDOM_PART)
# At most so many times SGD's step.
BARS = {
    "resnet": {OFTEN: 1.35, SELDOM: 1.10, SELDOM_PART: 1.10},
    "transformer": {OFTEN: 1.5, SELDOM: 1.25, SELDOM_PART: 1.25},
}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, foreach=True)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, foreach=True)


class Muon:
    """Muon for matrices, AdamW for the rest, as Muon's authors have it."""

    def __init__(self, model: nn.Module) -> None:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        self._both = [
            torch.optim.Muon(matrices, lr=LR),
            torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=LR, foreach=True),
        ]

    @staticmethod
    def refuses(model: nn.Module) -> str | None:
        """Why there is no Muon for this model, or None."""
        if not hasattr(torch.optim, "Muon"):
            return f"torch {torch.__version__} has no Muon"
        share = sum(p.numel() for p in model.parameters() if p.ndim == 2) / sum(p.numel() for p in model.parameters())
        return None if share > 0.5 else f"it takes matrices only, {share:.0%} of the parameters"

    def zero_grad(self) -> None:
        for optimizer in self._both:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self._both:
            optimizer.step()


# Whose peak memory is measured, by their names in the table.
PEAKS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": sgd, "AdamW": adamw, **{schedule.name: schedule.optimizer for schedule in (OFTEN, SELDOM)}
}  # fmt: skip


@dataclass
class Contender:
    """What is timed.

    Attributes:
        name: In the table.
        kinds: Calls for its kinds of steps, and what part of all steps is of that kind.
        bar: At most so many times SGD's step.
        optimizer: K-FAC's, for the time by part.
        model: Its model.
        schedule: Its schedule.
    """

    name: str
    kinds: dict[Call, float]
    bar: float | None = None
    optimizer: KFAC | None = None
    model: nn.Module | None = None
    schedule: Schedule | None = None


def _simple(workload: Workload, make: Callable[[nn.Module], Any]) -> Call:
    model = workload.model()
    return workload.stepper(model, make(model))


def _kfac(workload: Workload, schedule: Schedule, bar: float | None) -> Contender:
    model = workload.model()
    optimizer = schedule.optimizer(model)
    step = workload.stepper(model, optimizer)

    def numbered(number: int) -> Call:
        def call() -> None:
            optimizer.preconditioner.steps = number
            step()

        return call

    for _ in range(ALWAYS_INVERT_FIRST):
        step()
    kinds = {numbered(number): part for number, part in schedule.kinds().items()}
    return Contender(schedule.name, kinds, bar, optimizer, model, schedule)


def contenders(name: str, workload: Workload) -> Iterator[Contender]:
    """All that are timed beside SGD."""
    yield Contender("AdamW", {_simple(workload, adamw): 1.0})
    if reason := Muon.refuses(workload.model()):
        print(f"Muon: left out, {reason}")
    else:
        yield Contender("Muon", {_simple(workload, Muon): 1.0})
    for schedule in SCHEDULES:
        yield _kfac(workload, schedule, BARS.get(name, {}).get(schedule))
    for label, kinds in rivals.installed(workload, LR, OFTEN.inverse_every):
        yield Contender(label, kinds)


def measure(name: str, workload: Workload, repeats: int = REPEATS) -> Iterator[Row]:
    """A row for every contender, timed in turn with SGD."""
    base_model = workload.model()
    base_optimizer = sgd(base_model)
    base = workload.stepper(base_model, base_optimizer)
    entries = list(contenders(name, workload))
    counts = {call: count_for(call) for call in (base, *(call for entry in entries for call in entry.kinds))}
    times: list[tuple[float, list[float]]] = []
    start = time.perf_counter()
    while len(times) < MIN_REPEATS or (len(times) < repeats and time.perf_counter() - start < SECONDS):
        rival = stretch(base, counts[base])
        own = [sum(part * stretch(call, counts[call]) for call, part in entry.kinds.items()) for entry in entries]
        times.append((rival, own))
    threads = torch.get_num_threads()
    memory = {who: peak_mebibytes(name, who, threads) for who in PEAKS}
    for i, entry in enumerate(entries):
        ratios = sorted(rival / own[i] for rival, own in times)
        extra = {"cost": 1 / statistics.median(ratios)}
        if entry.name in memory:
            extra |= {"peak_mib": memory[entry.name], "sgd_peak_mib": memory["SGD"]}
        if entry.optimizer is not None and entry.schedule is not None:
            parts = split(workload, entry.optimizer, entry.schedule.kinds(), base_optimizer, (entry.model, base_model))
            extra |= {f"{part}_ms": milliseconds for part, milliseconds in parts.items()}
        yield Row(
            "model",
            f"{workload.name}: {entry.name}",
            "SGD momentum",
            statistics.median(own[i] for _, own in times),
            statistics.median(rival for rival, _ in times),
            statistics.median(ratios),
            ratios[len(ratios) // 10],
            ratios[-1 - len(ratios) // 10],
            None if entry.bar is None else 1 / entry.bar,
            extra,
        )


def run(containing: str = "", repeats: int = REPEATS) -> list[Row]:
    """Measures and prints the networks whose short name contains this."""
    rows = []
    for name, workload in workloads().items():
        if containing not in name:
            continue
        for row in measure(name, workload, repeats):
            rows.append(row)
            print(line(dataclasses.replace(row, extra={})))
            print(f"{'':<16}{describe(row)}", flush=True)
    return rows


def describe(row: Row) -> str:
    """The figures beside a row."""
    text = f"{row.extra['cost']:.2f} times SGD"
    if "peak_mib" in row.extra:
        text += f"; peak {row.extra['peak_mib']:.0f} MiB (SGD {row.extra['sgd_peak_mib']:.0f})"
    if "model_ms" in row.extra:
        text += "; ms: " + ", ".join(f"{part} {row.extra[f'{part}_ms']:.2f}" for part in PARTS)
        text += f"; kernels {row.extra['kernels_ms']:.2f}, Python of step() {row.extra['python_ms']:.2f}"
    return text
