"""Trains one model with one optimizer and records how the loss falls with steps and with seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SETS_ITS_OWN = math.nan  # in place of a learning rate


@dataclass(frozen=True)
class Contender:
    """An optimizer that takes part, and the learning rates of which its best is shown."""

    name: str
    make: Callable[[nn.Module, float], Optimizer]
    rates: tuple[float, ...]
    settings: str  # what else the optimizer was given, in words
    longer: int = 1  # times as many steps, so that a cheap step has as many seconds


@dataclass(frozen=True)
class Task:
    """What every contender of one part of the demo trains, and what is measured on the way."""

    name: str
    title: str
    model: Callable[[], nn.Module]  # returns the same initial weights every time
    loss: Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> mean over the batch
    train: tuple[Tensor, Tensor]  # inputs, targets
    probe: tuple[Tensor, Tensor]  # the part of `train` that the loss is reported on
    test: tuple[Tensor, Tensor]
    score: Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) of `test`
    score_name: str
    contenders: tuple[Contender, ...]
    batch: int
    steps: int
    measure_every: int
    marks: tuple[int, ...]  # steps after which the table gives the loss
    goals: tuple[float, ...]  # losses that the table gives the seconds to
    threads: int
    plateau: tuple[str, float] | None = None  # the name of a loss that is hard to get below, and its value


@dataclass
class Run:
    """One training run. Entry i of each list was measured after ``steps[i]`` steps."""

    contender: str
    rate: float
    model: nn.Module
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # spent in steps, measuring excluded
    loss: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    diverged_at: int | None = None

    def measure(self, task: Task, step: int, seconds: float) -> None:
        inputs, targets = task.probe
        test_inputs, test_targets = task.test
        with torch.no_grad():
            loss = task.loss(self.model(inputs), targets).item()
            score = task.score(self.model(test_inputs), test_targets).item()
        if math.isfinite(loss):
            self.steps.append(step)
            self.seconds.append(seconds)
            self.loss.append(loss)
            self.score.append(score)
        else:
            self.diverged_at = step

    def at(self, values: list[float], step: int) -> float | None:
        """The entry of ``values`` measured after ``step`` steps, if the run got that far."""
        return values[self.steps.index(step)] if step in self.steps else None

    def seconds_to(self, goal: float) -> float | None:
        """Seconds until the loss was first measured at or below ``goal``, if it ever was."""
        return next((seconds for seconds, loss in zip(self.seconds, self.loss, strict=True) if loss <= goal), None)

    def after(self, seconds: float) -> float:
        """The last loss measured within these seconds."""
        return [loss for spent, loss in zip(self.seconds, self.loss, strict=True) if spent <= seconds][-1]


def train(task: Task, contender: Contender, rate: float, on_step: Callable[[], None]) -> Run:
    """Trains for ``task.steps`` steps (times ``contender.longer``), or until the loss is no longer finite.

    The seconds count forward pass, backward pass and update. They leave out picking the batch and measuring. The
    optimizer gets a closure, which every torch optimizer takes and one that tries a step before it settles needs.
    """
    model = task.model()
    optimizer = contender.make(model, rate)
    run = Run(contender.name, rate, model)
    run.measure(task, 0, 0.0)
    seconds = 0.0
    steps = task.steps * contender.longer
    for step, indices in enumerate(batches(len(task.train[0]), task.batch, steps), start=1):
        inputs, targets = (data[indices] for data in task.train)

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = task.loss(model(inputs), targets)
            loss.backward()
            return loss

        start = time.perf_counter()
        loss = optimizer.step(closure)
        seconds += time.perf_counter() - start
        on_step()
        if not math.isfinite(loss.item()):
            run.diverged_at = step
        elif step % task.measure_every == 0 or step == steps:
            run.measure(task, step, seconds)
        if run.diverged_at is not None:
            break
    return run


def batches(examples: int, batch: int, steps: int) -> Tensor:
    """``[steps, batch]`` indices of examples: epoch after epoch, shuffled, the same for every contender."""
    generator = torch.Generator().manual_seed(0)
    epochs = -(-steps * batch // examples)
    order = torch.cat([torch.randperm(examples, generator=generator) for _ in range(epochs)])
    return order[: steps * batch].view(steps, batch)


def warm_up(task: Task) -> None:
    """A few untimed steps, so that the first contender does not pay for starting threads and libraries."""
    model = task.model()
    for indices in batches(len(task.train[0]), task.batch, 3):
        inputs, targets = (data[indices] for data in task.train)
        task.loss(model(inputs), targets).backward()


def best(runs: list[Run]) -> Run:
    """The run with the lowest final loss; if none came to the end, the one that lasted longest."""
    return min(runs, key=lambda run: (run.diverged_at is not None, -(run.diverged_at or 0), run.loss[-1]))
