"""``python -m bench.convergence.models``: how many updates K-FAC and a tuned rival need, on a transformer and a ResNet.

Everybody with a schedule is tuned on about as many settings, with a seed of its own; the best four are run with three
seeds, and the best mean counts. Schedules are alike, over each one's own number of updates, and K-FAC has half as
many; in adaptive mode it needs none. Runs wait in a folder and go on where they were; ``--piece`` stops them after some
seconds (exit status 3: not done yet). Updates are compared, not seconds, so other work may run beside.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from examples.models.resnet import ResNet20
from examples.models.tasks import CONTEXT, image_batch, per_character, source_text, text_batch
from examples.models.transformer import CharTransformer
from kfac_fast import KFAC, Adaptive

from ..harness import machine
from .contenders import Contender, Setting, Trainer
from .report import by_contender, first_at, mean
from .training import Run, write_json

BATCH = 128
MEASURED, MEASURED_EVERY = 256, 10  # training examples, always the same ones; updates
TUNING_SEED, SEEDS = 100, (0, 1, 2)
CANDIDATES = 4  # settings of everybody that are run with all seeds: one seed may flatter a setting
WARM_UP = 0.05  # of the updates; a cosine down to zero follows


@dataclass(frozen=True)
class Problem:
    """A model with its data, and who trains it: first the rival, then K-FAC in one way or two."""

    name: str
    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    contenders: tuple[Contender, ...]


class Scheduled(Trainer):
    """One optimizer under the schedule that everybody has."""

    def __init__(self, optimizer: Optimizer, updates: int) -> None:
        super().__init__(optimizer)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # as torch's own schedulers do
        self.updates = updates

    def update(self, k: int, closure: Callable[[], Tensor], evaluate: Callable[[], Tensor]) -> None:
        warm_up = WARM_UP * self.updates
        done = max(0.0, k - warm_up) / (self.updates - warm_up)
        share = min(1.0, k / warm_up) * (1 + math.cos(math.pi * done)) / 2
        for group in self.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] * share
        super().update(k, closure, evaluate)


def adamw(model: nn.Module, setting: Setting, updates: int) -> Trainer:
    options = {"lr": setting["lr"], "weight_decay": setting["weight_decay"]}
    return Scheduled(AdamW(model.parameters(), betas=(0.9, setting["beta2"]), **options), updates)


def nesterov(model: nn.Module, setting: Setting, updates: int) -> Trainer:
    return Scheduled(SGD(model.parameters(), **setting, nesterov=True), updates)


class ScheduledKFAC(Scheduled):
    """K-FAC under the same schedule; with ``damping_end`` λ falls to that by the same factor in every update."""

    def __init__(self, model: nn.Module, setting: Setting, updates: int) -> None:
        options = dict(setting)
        first = options["damping"]
        self.falls = (options.pop("damping_end", first) / first) ** (1 / updates)
        super().__init__(KFAC(model, **options, factor_fraction=1 / 4, inverse_every=1), updates)

    def update(self, k: int, closure: Callable[[], Tensor], evaluate: Callable[[], Tensor]) -> None:
        for group in self.optimizers[0].param_groups:
            group["damping"] *= self.falls
        super().update(k, closure, evaluate)


class AdaptiveKFAC(Trainer):
    """K-FAC that sets itself: only what is in the setting is chosen."""

    def __init__(self, model: nn.Module, setting: Setting, updates: int) -> None:
        config = Adaptive(gamma="sqrt", settle=int(setting["settle"]))
        self.kfac = KFAC(model, adaptive=config, factor_fraction=1 / 4)
        super().__init__(self.kfac)

    def update(self, k: int, closure: Callable[[], Tensor], evaluate: Callable[[], Tensor]) -> None:
        self.kfac.step(closure, evaluate)


def grid(**values: tuple[float, ...]) -> tuple[Setting, ...]:
    return tuple(dict(zip(values, each, strict=True)) for each in product(*values.values()))


@functools.cache
def scattered() -> tuple[Tensor, Tensor]:
    """8,192 handwritten digits under noise, each somewhere in 16×16 pixels, and their classes."""
    generator = torch.Generator().manual_seed(1)
    digits, classes = image_batch(8192, generator)
    images = 0.3 * torch.randn(len(digits), 1, 16, 16, generator=generator)
    corners = torch.randint(9, (len(digits), 2), generator=generator)
    for image, digit, (row, column) in zip(images, digits, corners.tolist(), strict=True):
        image[:, row : row + 8, column : column + 8] += digit
    return images, classes


def scattered_batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images, classes = scattered()
    chosen = torch.randint(len(images), (size,), generator=generator)
    return images[chosen], classes[chosen]


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            "transformer",
            "Character-level transformer of 4 layers, Python source text",
            lambda: CharTransformer(source_text()[1], CONTEXT),
            text_batch,
            per_character,
            (
                Contender(
                    "AdamW",
                    adamw,
                    300,
                    grid(lr=(0.002, 0.004, 0.008, 0.016, 0.032), beta2=(0.99, 0.999), weight_decay=(0.01,))
                    + grid(lr=(0.016,), beta2=(0.99,), weight_decay=(0.1, 0.3))
                    + grid(lr=(0.011, 0.023), beta2=(0.99, 0.999), weight_decay=(0.01, 0.1, 0.3)),
                ),
                Contender(
                    "K-FAC",
                    ScheduledKFAC,
                    150,
                    grid(lr=(0.3,), damping=(0.0003, 0.001, 0.003), kl_clip=(0.001, 0.003), weight_decay=(0.0, 0.03))
                    + grid(
                        lr=(0.3,),
                        damping=(0.001,),
                        damping_end=(1e-5, 1e-6, 1e-7),
                        kl_clip=(0.001, 0.003),
                        weight_decay=(0.0, 0.03),
                    ),
                ),
                Contender("K-FAC, adaptive", AdaptiveKFAC, 150, grid(settle=(0, 30))),
            ),
        ),
        Problem(
            "resnet",
            "ResNet-20 with BatchNorm, width 8, digits scattered over 16×16 pixels",
            lambda: ResNet20(channels=1, width=8),
            scattered_batch,
            F.cross_entropy,
            (
                Contender(
                    "SGD-Nesterov",
                    nesterov,
                    300,
                    grid(lr=(0.03, 0.1, 0.3, 1.0), momentum=(0.9, 0.95))
                    + grid(lr=(0.1, 0.3, 1.0), momentum=(0.8,))
                    + grid(lr=(0.1, 0.3), momentum=(0.7,)),
                ),
                Contender(
                    "K-FAC",
                    ScheduledKFAC,
                    150,
                    grid(lr=(0.3,), damping=(0.001, 0.003, 0.01), kl_clip=(0.001, 0.003, 0.01))
                    + grid(lr=(0.3,), damping=(0.01,), damping_end=(1e-6, 1e-5), kl_clip=(0.003, 0.01)),
                ),
            ),
        ),
    )
}


def train(problem: Problem, contender: Contender, setting: Setting, seed: int, waiting: Path, until: float) -> Run:
    """One run. The seed is that of the weights and of the batches; the examples for the loss are the same for all.

    Raises:
        TimeoutError: ``time.monotonic()`` is beyond ``until``; what has been done waits in a file.
    """
    torch.manual_seed(seed)
    model = problem.model()
    trainer = contender.make(model, setting, contender.updates)
    generator = torch.Generator().manual_seed(seed)
    fixed = problem.batch(MEASURED, torch.Generator().manual_seed(2**31))
    run = Run(problem.name, contender.name, setting, seed, torch.get_num_threads())
    first = 0
    if waiting.exists():
        stored = torch.load(waiting, weights_only=True)
        run = Run(**stored["run"])
        model.load_state_dict(stored["model"])
        trainer.load_state_dict(stored["trainer"])
        generator.set_state(stored["generator"])
        first = run.finished + 1
    for k in range(first, contender.updates + 1):
        if k > first and time.monotonic() > until:
            waiting.parent.mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "trainer": trainer.state_dict(), "generator": generator.get_state()}
            torch.save({"run": asdict(run), **state}, waiting)
            raise TimeoutError
        if k:
            x, y = problem.batch(BATCH, generator)

            def evaluate(x: Tensor = x, y: Tensor = y) -> Tensor:
                return problem.loss(model(x), y)

            def closure(evaluate: Callable[[], Tensor] = evaluate) -> Tensor:
                model.zero_grad()
                loss = evaluate()
                loss.backward()
                return loss

            trainer.update(k, closure, evaluate)
        run.finished = k
        if k % MEASURED_EVERY == 0 or k == contender.updates:
            loss = measure(model, problem, *fixed)
            if not math.isfinite(loss):
                run.diverged = True
                break
            run.updates.append(k)
            run.seconds.append(0.0)
            run.loss.append(loss)
    waiting.unlink(missing_ok=True)
    return run


@torch.no_grad()
def measure(model: nn.Module, problem: Problem, x: Tensor, y: Tensor) -> float:
    """The loss as in training, with the batch's own statistics, and no trace left in the running ones."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss = problem.loss(model(x), y).item()
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    return loss


def finished(problem: Problem, contender: Contender, setting: Setting, seed: int, folder: Path, until: float) -> Run:
    """The run from its file, or trained now.

    Raises:
        TimeoutError: It is not finished, and ``time.monotonic()`` is beyond ``until``.
    """
    described = "".join(f"-{key}{value:g}" for key, value in setting.items())
    path = folder / f"{problem.name}-{contender.name}-{contender.updates}{described}-seed{seed}.json"
    if path.exists():
        return Run(**json.loads(path.read_text()))
    if time.monotonic() > until:
        raise TimeoutError
    run = train(problem, contender, setting, seed, path.with_suffix(".pt"), until)
    write_json(path, asdict(run))
    print(f"{path.stem}: {run.final:.4f}", flush=True)
    return run


def compare(problem: Problem, folder: Path, until: float, partial: bool) -> dict[str, Any]:
    """All runs of a problem; with ``partial`` those that are there."""
    tuning: list[Run] = []
    finals: list[Run] = []

    def collect(setting: Setting, seed: int, contender: Contender) -> list[Run]:
        try:
            return [finished(problem, contender, setting, seed, folder, until)]
        except TimeoutError:
            if not partial:
                raise
            return []

    for contender in problem.contenders:
        tried = [run for setting in contender.grid for run in collect(setting, TUNING_SEED, contender)]
        tuning += tried
        for candidate in sorted(tried, key=lambda run: run.final)[:CANDIDATES]:
            finals += [run for seed in SEEDS for run in collect(candidate.setting, seed, contender)]
    return {"runs": [asdict(run) for run in finals], "tuning": [asdict(run) for run in tuning]}


def better(runs: list[Run]) -> list[Run]:
    """Those of the setting with the lowest mean loss, of the settings that have been run with the most seeds."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.setting), []).append(run)
    return min(groups.values(), key=lambda group: (-len(group), mean([run.final for run in group])))


def table(results: dict[str, Any]) -> str:
    """How soon K-FAC is where the rival ends: means over seeds, and the range of the final losses.

    A model without final runs of everybody shows the best runs of the tuning.
    """
    lines = [
        "| model | optimizer | settings tried | best | seeds | updates | final training loss | "
        "updates to the rival's mean loss | runs that reach the rival's of their seed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in [name for name in PROBLEMS if name in results]:
        groups = {
            contender: better(runs)
            for contender, runs in by_contender([Run(**run) for run in results[name]["runs"]]).items()
        }
        tried = by_contender([Run(**run) for run in results[name]["tuning"]])
        if set(groups) != set(tried):
            groups = {name: [min(runs, key=lambda run: run.final)] for name, runs in tried.items()}
        rival, *_ = groups.values()
        goals, updates = {run.seed: run.final for run in rival}, rival[0].finished
        for contender, runs in groups.items():
            finals = [run.final for run in runs]
            reached = [first_at(run, mean(list(goals.values()))) for run in runs]
            ahead = [first_at(run, goals[run.seed]) is not None for run in runs if run.seed in goals]
            soon = mean([each[0] if each else math.inf for each in reached])
            to_goal = f"{soon:.0f} (1/{updates / soon:.1f})"
            if math.isinf(soon):
                to_goal = f"reached by {sum(each is not None for each in reached)} of {len(reached)} runs"
            cells = [
                name,
                contender,
                str(len(tried[contender])),
                ", ".join(f"{key} {value:g}" for key, value in runs[0].setting.items()),
                ", ".join(str(run.seed) for run in runs),
                str(runs[0].finished),
                f"{mean(finals):.3f} ({min(finals):.3f}–{max(finals):.3f})",
                "" if runs is rival else to_goal,
                "" if runs is rival else f"{sum(ahead)} of {len(ahead)}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.convergence.models", description=__doc__.split("\n")[0])
    parser.add_argument("--problem", choices=PROBLEMS, action="append", help="default: all")
    parser.add_argument("--piece", type=float, default=float("inf"), help="stop after about this many seconds")
    parser.add_argument("--report", action="store_true", help="train nothing, write what has been finished")
    parser.add_argument("--folder", type=Path, default=Path("build/convergence-models"), help="where runs wait")
    parser.add_argument("--json", type=Path, default=Path("build/convergence-models.json"), help="where results go")
    parser.add_argument("--show", type=Path, help="train nothing, print the table of these results")
    options = parser.parse_args()
    if options.show:
        print(table(json.loads(options.show.read_text())))
        return
    until = float("-inf") if options.report else time.monotonic() + options.piece
    results: dict[str, Any] = {"machine": machine(), "tuning_seed": TUNING_SEED, "batch": BATCH}
    try:
        for name in options.problem or PROBLEMS:
            results[name] = compare(PROBLEMS[name], options.folder, until, options.report)
    except TimeoutError:
        sys.exit(3)
    write_json(options.json, results)
    print(table(results))


if __name__ == "__main__":
    main()
