"""Where training stays stable: ``python -m bench.stability``, about ten minutes; maps and JSON.

Over a grid of damping λ and learning rate: K-FAC fixed, with the KL clip, and adaptive (where λ is the first one and
there is no rate); SGD with Nesterov momentum over momentum and rate. It may be stopped at any time and goes on where it
was: what the JSON has of this machine and commit is not run again. A map is drawn when none of its points is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kfac_fast import KFAC, Adaptive
from kfac_fast.data import curves, curves_autoencoder, digits

from .convergence.training import write_json
from .harness import machine

DAMPINGS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
MOMENTA = (0.0, 0.5, 0.9, 0.99)
CLIP = 1e-2
STUCK = 0.9  # of the loss that needs no input: not below this is not trained


@dataclass(frozen=True)
class Task:
    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    likelihood: str
    batch: int
    steps: int
    trivial: float  # the loss of outputs that do not depend on the input


@dataclass
class Outcome:
    """What became of one run. ``damping`` is the momentum for SGD."""

    task: str
    method: str
    damping: float
    rate: float | None
    outcome: str  # diverged, stuck or trained
    loss: float | None
    failed_inverses: int
    condition: float | None  # the largest of a damped factor


def digits_task() -> Task:
    data = digits()

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 50), nn.Tanh(), nn.Linear(50, 10))

    return Task(
        "digits", model, functional.cross_entropy, data.train_images, data.train_labels, "categorical", 500, 60,
        trivial=math.log(10),
    )  # fmt: skip


def curves_task() -> Task:
    images = curves(2_000, 0).train
    mean = images.mean(0).expand_as(images)
    trivial = float(functional.binary_cross_entropy(mean, images, reduction="sum")) / len(images)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(targets)

    return Task(
        "curves", lambda: curves_autoencoder(generator=torch.Generator().manual_seed(0)), loss, images, images,
        "bernoulli", 500, 40, trivial,
    )  # fmt: skip


TASKS = {"digits": digits_task, "curves": curves_task}


def sgd(model: nn.Module, task: Task, momentum: float, rate: float | None) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate or 0.0, momentum=momentum, nesterov=momentum > 0)


def fixed(clip: float | None) -> Callable[..., torch.optim.Optimizer]:
    return lambda model, task, damping, rate: KFAC(
        model, lr=rate, damping=damping, kl_clip=clip, inverse_every=5, likelihood=task.likelihood
    )


def adaptive(model: nn.Module, task: Task, damping: float, rate: float | None) -> torch.optim.Optimizer:
    return KFAC(model, damping=damping, likelihood=task.likelihood, adaptive=Adaptive())


METHODS: dict[str, tuple[Callable[..., torch.optim.Optimizer], Sequence[float], Sequence[float | None]]] = {
    "K-FAC, fixed": (fixed(None), DAMPINGS, RATES),
    "K-FAC, KL clip": (fixed(CLIP), DAMPINGS, RATES),
    "K-FAC, adaptive": (adaptive, DAMPINGS, (None,)),
    "SGD-Nesterov": (sgd, MOMENTA, RATES),
}


def run(task: Task, method: str, damping: float, rate: float | None) -> Outcome:
    model = task.model()
    optimizer = METHODS[method][0](model, task, damping, rate)
    generator = torch.Generator().manual_seed(0)
    loss = math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # failed inverses are counted
        for _ in range(task.steps):
            chosen = torch.randperm(len(task.inputs), generator=generator)[: task.batch]
            x, y = task.inputs[chosen], task.targets[chosen]

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                value = task.loss(model(x), y)
                value.backward()
                return value

            loss = float(optimizer.step(closure).detach())
            if not loss < 100 * task.trivial:
                break
    with torch.no_grad():
        end = float(task.loss(model(task.inputs), task.targets))
    outcome = "trained" if end < STUCK * task.trivial else "stuck"
    if not loss < 100 * task.trivial or not end < 2 * task.trivial:
        outcome = "diverged"
    failed, condition = 0, None
    if isinstance(optimizer, KFAC):
        figures = optimizer.stats(conditions=True)
        failed = int(figures["failures"])
        condition = max(value for name, value in figures.items() if name.startswith("condition/"))
        condition = condition if math.isfinite(condition) else None
    return Outcome(task.name, method, damping, rate, outcome, end if math.isfinite(end) else None, failed, condition)


def draw(path: Path, tasks: Sequence[Task], outcomes: Sequence[Outcome]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    figure, panels = plt.subplots(
        len(tasks), len(METHODS), figsize=(15, 4.3 * len(tasks)), layout="constrained",
        width_ratios=[6, 6, 2, 6], squeeze=False,
    )  # fmt: skip
    for row, task in zip(panels, tasks, strict=True):
        mine = [o for o in outcomes if o.task == task.name]
        finals = [o.loss for o in mine if o.outcome == "trained" and o.loss]
        low, high = math.log10(min(finals)), math.log10(STUCK * task.trivial)
        for axes, (method, (_, rows, columns)) in zip(row, METHODS.items(), strict=True):
            axes.set_title(f"{task.name}: {method}", fontsize=11)
            grid = {(o.damping, o.rate): o for o in mine if o.method == method}
            if len(grid) < len(rows) * len(columns):
                axes.set_axis_off()
                axes.text(0.5, 0.5, "not run", ha="center", transform=axes.transAxes)
                continue
            colours = torch.ones(len(rows), len(columns), 3)
            for i, damping in enumerate(rows):
                for j, rate in enumerate(columns):
                    o = grid[damping, rate]
                    if o.outcome == "trained" and o.loss:
                        share = (math.log10(o.loss) - low) / max(high - low, 1e-9)
                        colours[i, j] = torch.tensor(plt.get_cmap("viridis")(0.95 - 0.75 * share)[:3])
                    else:
                        colours[i, j] = torch.tensor([0.1] * 3 if o.outcome == "diverged" else [0.75] * 3)
                    text = "×"
                    if o.loss is not None and o.outcome != "diverged":
                        text = f"{o.loss:.0f}" if o.loss > 10 else f"{o.loss:.2g}"
                    text += "!" if o.failed_inverses else ""
                    dark = float(colours[i, j].mean()) < 0.45
                    axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
            axes.imshow(colours, aspect="auto", origin="lower")
            axes.set_xticks(range(len(columns)), ["" if c is None else f"{c:g}" for c in columns])
            axes.set_yticks(range(len(rows)), [f"{r:g}" for r in rows])
            axes.set_xlabel("" if columns == (None,) else "learning rate")
            axes.set_ylabel("momentum" if method.startswith("SGD") else "λ" if rate is not None else "λ at the start")
    figure.legend(
        handles=[Patch(color=(0.1,) * 3, label="diverged (×)"), Patch(color=(0.75,) * 3, label="stuck"),
                 Patch(color=plt.get_cmap("viridis")(0.9), label="trained; brighter is lower; ! an inverse failed")],
        loc="outside lower center", ncols=3, frameon=False,
    )  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(outcomes: Sequence[Outcome]) -> str:
    """Counts, best loss and what was on the way to failure, per task and method."""
    lines = [
        "| task | method | runs | trained | stuck | diverged | best loss | failed inverses in | condition up to |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for o in outcomes:
        groups.setdefault((o.task, o.method), []).append(o)
    for (task, method), group in groups.items():
        count = [sum(o.outcome == kind for o in group) for kind in ("trained", "stuck", "diverged")]
        best = min((o.loss for o in group if o.loss is not None), default=math.nan)
        failed = sum(o.failed_inverses > 0 for o in group)
        condition = max((o.condition for o in group if o.condition is not None), default=None)
        cells: list[Any] = [task, method, len(group), *count, f"{best:.3g}", failed]
        cells.append("" if condition is None else f"{condition:.1e}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def kept(path: Path) -> dict[tuple[str, str, float, float | None], Outcome]:
    """The outcomes in a file by task, method, damping and rate, if they are of this machine and commit."""
    saved = json.loads(path.read_text()) if path.exists() else {}
    entries = saved["outcomes"] if saved.get("machine") == machine() else []
    return {(e["task"], e["method"], e["damping"], e["rate"]): Outcome(**e) for e in entries}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.stability", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("build/stability.json"), help="where the outcomes go")
    parser.add_argument("--picture", type=Path, default=Path("build/stability.png"), help="where the maps go")
    parser.add_argument("--task", choices=TASKS, action="append", help="default: both")
    parser.add_argument("--method", choices=METHODS, action="append", help="default: all")
    options = parser.parse_args()
    found = kept(options.json)
    everything = [
        (task, method, damping, rate)
        for task in TASKS
        for method, (_, dampings, rates) in METHODS.items()
        for damping in dampings
        for rate in rates
    ]
    for name in options.task or TASKS:
        task = TASKS[name]()
        for key in everything:
            _, method, damping, rate = key
            if key[0] != name or key in found or (options.method and method not in options.method):
                continue
            found[key] = run(task, method, damping, rate)
            outcomes = [found[key] for key in everything if key in found]
            write_json(options.json, {"machine": machine(), "clip": CLIP, "outcomes": [asdict(o) for o in outcomes]})
    outcomes = [found[key] for key in everything if key in found]
    print(table(outcomes))
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(options.picture, [make() for make in TASKS.values()], outcomes)


if __name__ == "__main__":
    main()
