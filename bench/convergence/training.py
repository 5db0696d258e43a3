"""One training run, in pieces: each continues bit for bit where the last one stopped."""

from __future__ import annotations

import json
import math
import os
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfac_fast import GrowingBatches

from .contenders import Contender, Setting, Trainer
from .problems import FULL_AT, Problem


@dataclass
class Run:
    """Losses on the whole training set; entry i was measured after ``updates[i]`` updates.

    Attributes:
        seconds: Spent in updates: forward, backward and the optimizer, without picking batches and measuring.
        threads: Of torch.
        finished: Updates made.
        diverged: Whether a loss was not finite; the run ends there.
        timed: Whether nothing else ran beside, so that the seconds mean something.
    """

    problem: str
    contender: str
    setting: Setting
    seed: int
    threads: int
    updates: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    finished: int = 0
    spent: float = 0.0
    diverged: bool = False
    timed: bool = False

    @property
    def final(self) -> float:
        return math.inf if self.diverged or not self.loss else self.loss[-1]


def measured_after(update: int) -> bool:
    """Often at first, then less: losses fall ever more slowly."""
    return update % (5 if update <= 100 else 20 if update <= 500 else 50) == 0


class Training:
    """Advances a run and keeps it in a folder, so that any process may go on with it.

    Args:
        problem: What to train.
        contender: By what.
        setting: Of the contender.
        seed: Of the initial weights and of the batches.
        folder: Where runs wait between pieces.
        updates: All updates that the run will ever have, for schedules that depend on it.
        full_at: The first update with the whole training set as its batch.
    """

    def __init__(
        self,
        problem: Problem,
        contender: Contender,
        setting: Setting,
        seed: int,
        folder: Path,
        updates: int,
        full_at: int = FULL_AT,
    ) -> None:
        self.problem, self.contender = problem, contender
        described = "".join(f"-{key}{value:g}" for key, value in sorted(setting.items()))
        self.path = folder / f"{problem.name}-{contender.name}{described}-seed{seed}.pt".replace(" ", "_")
        self.updates, self.full_at = updates, full_at
        self.run = Run(problem.name, contender.name, setting, seed, torch.get_num_threads())
        if self.path.exists():
            self.run = Run(**torch.load(self.path, weights_only=True)["run"])

    def advance(self, until: int, deadline: float, *, timed: bool = False) -> bool:
        """Trains up to an update or until ``time.monotonic()`` passes the deadline; whether the update was reached."""
        if self.done(until):
            return True
        run, problem = self.run, self.problem
        images = problem.images()
        model = problem.model(run.seed)
        trainer = self.contender.make(model, run.setting, self.updates)
        if self.path.exists():
            stored = torch.load(self.path, weights_only=True)
            model.load_state_dict(stored["model"])
            trainer.load_state_dict(stored["trainer"])
        else:
            self._measure(model, trainer, images)
        run.threads = torch.get_num_threads()
        run.timed = timed and (run.timed or not run.finished)
        batches = GrowingBatches(len(images), problem.first_batch, full_at=self.full_at, seed=run.seed)
        while not self.done(until) and time.monotonic() < deadline:
            k = run.finished + 1
            batch = images[batches.indices(k)]

            def evaluate(batch: Tensor = batch) -> Tensor:
                return problem.loss(model(batch), batch)

            def closure(evaluate: Any = evaluate) -> Tensor:
                model.zero_grad()
                loss = evaluate()
                loss.backward()
                return loss

            start = time.perf_counter()
            trainer.update(k, closure, evaluate)
            run.spent += time.perf_counter() - start
            run.finished = k
            if measured_after(k) or k == until:
                self._measure(model, trainer, images)
        self._save(model, trainer)
        return self.done(until)

    def done(self, until: int) -> bool:
        return self.run.diverged or self.run.finished >= until

    @torch.no_grad()
    def _measure(self, model: torch.nn.Module, trainer: Trainer, images: Tensor) -> None:
        run = self.run
        with trainer.shown():
            loss = float(self.problem.loss(model(images), images))
        if not math.isfinite(loss):
            run.diverged = True
            return
        if run.updates and run.updates[-1] == run.finished:
            return
        run.updates.append(run.finished)
        run.seconds.append(run.spent)
        run.loss.append(loss)

    def _save(self, model: torch.nn.Module, trainer: Trainer) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        torch.save({"run": asdict(self.run), "model": model.state_dict(), "trainer": trainer.state_dict()}, temporary)
        os.replace(temporary, self.path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """With a line per list of numbers, so that curves do not take a line per point."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[\s\d.,eE+-]+\]", lambda found: " ".join(found[0].split()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
