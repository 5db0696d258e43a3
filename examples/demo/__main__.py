"""K-FAC beside SGD, AdaGrad and Adam: ``python -m examples.demo [--part digits|curves] [--out DIR] [--quick]``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .pictures import draw_losses, draw_reconstructions
from .report import print_task, write_json
from .tasks import curves_task, digits_task
from .training import Run, Task, best, train, warm_up

PARTS: dict[str, Callable[[], Task]] = {"digits": digits_task, "curves": curves_task}
QUICK_STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--part", choices=PARTS, help="run this part alone")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder of the pictures and results.json")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps at one learning rate: does it run?")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    console = Console()
    results = []
    for name in [options.part] if options.part else PARTS:
        with console.status(f"{name}: data"):
            task = PARTS[name]()
        if options.quick:
            task = shortened(task)
        runs = compete(task, console)
        results.append((task, [run for of_contender in runs for run in of_contender]))
        shown = [best(of_contender) for of_contender in runs]
        print_task(console, task, shown)
        draw_losses(options.out / f"{name}.png", task, shown)
        if name == "curves":
            draw_reconstructions(options.out / "curves_reconstructions.png", task, shown)
    write_json(options.out / "results.json", results)
    console.print(f"\nPictures and results.json: {options.out}/")


def compete(task: Task, console: Console) -> list[list[Run]]:
    """The runs of each contender, one per learning rate."""
    columns = (TextColumn("{task.description:26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    threads = torch.get_num_threads()
    torch.set_num_threads(task.threads)
    try:
        warm_up(task)
        with Progress(*columns, console=console) as progress:
            bars = [
                progress.add_task(
                    f"{task.name}: {contender.name}",
                    total=task.steps * contender.longer * len(contender.rates),
                    start=False,
                )
                for contender in task.contenders
            ]
            runs = []
            for contender, bar in zip(task.contenders, bars, strict=True):
                progress.start_task(bar)
                runs.append([])
                for i, rate in enumerate(contender.rates, start=1):
                    runs[-1].append(train(task, contender, rate, on_step=lambda bar=bar: progress.advance(bar)))
                    progress.update(bar, completed=i * task.steps * contender.longer)  # a run that diverged ends early
                progress.stop_task(bar)
    finally:
        torch.set_num_threads(threads)
    return runs


def shortened(task: Task) -> Task:
    """The same task in a few steps at the middle learning rate, to see that everything works."""
    contenders = tuple(replace(each, rates=(each.rates[len(each.rates) // 2],)) for each in task.contenders)
    return replace(task, contenders=contenders, steps=QUICK_STEPS, marks=(QUICK_STEPS,))


if __name__ == "__main__":
    main()
