"""The table at the end of the demo, the sentences under it, and the same figures as JSON."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import kfac_fast

from .training import Run, Task


def print_task(console: Console, task: Task, shown: list[Run]) -> None:
    """Prints the table of one part and what it shows; ``shown`` has one run per contender, K-FAC's first."""
    console.print(f"\n{task.title}, batch {task.batch}\n", style="bold", highlight=False)
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("optimizer")
    table.add_column("best\nrate", justify="right")
    for mark in task.marks:
        table.add_column(f"loss at\nstep {mark}", justify="right")
    table.add_column(f"loss after\n{shown[0].seconds[-1]:.1f} s", justify="right")
    table.add_column(task.score_name.replace(" ", "\n"), justify="right")
    for goal in task.goals:
        table.add_column(f"s to\n{goal:g}", justify="right")
    table.add_column("ms /\nstep", justify="right")
    for run in shown:
        table.add_row(*_row(task, run, shown[0].seconds[-1]), style="bold" if run is shown[0] else "")
    if task.plateau is not None:
        name, loss = task.plateau
        table.add_row(name, "", *[_number(loss)] * (len(task.marks) + 1), style="dim")
    console.print(table)
    console.print("", *notes(task, shown), sep="\n", style="dim", highlight=False)


def notes(task: Task, shown: list[Run]) -> list[str]:
    """How the figures were taken, then what they say."""
    lines = [
        f"loss: on {len(task.probe[0]):,} training examples; {task.score_name}: on {len(task.test[0]):,} examples; "
        f"s and ms: forward, backward and update, {task.threads} thread{'s' * (task.threads > 1)}"
    ]
    for contender in task.contenders:
        rates = ", ".join(_rate(rate) for rate in contender.rates)
        best_of = "best of learning rates" if len(contender.rates) > 1 else "learning rate"
        settings = [contender.settings, f"{best_of} {rates}"]
        if contender.longer > 1:
            settings.append(f"{contender.longer} times K-FAC's steps, for equal seconds")
        lines.append(f"{contender.name}: {', '.join(filter(None, settings))}")
    return [*lines, verdict(task, shown)]


def verdict(task: Task, shown: list[Run]) -> str:
    """Where K-FAC's loss stands against the best rival's, after equal numbers of steps and after equal seconds."""
    kfac, *rivals = shown
    steps = [
        all(loss < rival for run in rivals if (rival := run.at(run.loss, step)) is not None)
        for step, loss in zip(kfac.steps[1:], kfac.loss[1:], strict=True)
    ]
    seconds = [
        all(loss < run.after(spent) for run in rivals)
        for spent, loss in zip(kfac.seconds[1:], kfac.loss[1:], strict=True)
    ]
    text = (
        f"K-FAC has the lowest loss at {sum(steps)} of the {len(steps)} measured steps, and after equal seconds at "
        f"{sum(seconds)}"
    )
    if task.plateau is not None:
        name, plateau = task.plateau
        below = [run.contender for run in shown if run.after(kfac.seconds[-1]) < 0.98 * plateau]
        text += f"; more than 2 % below the {name}'s {plateau:.1f} by then: {', '.join(below) or 'nobody'}"
    return text + "."


def write_json(path: Path, results: list[tuple[Task, list[Run]]]) -> None:
    """Writes every run, those at other learning rates too."""
    content = {
        "versions": {
            "kfac_fast": kfac_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "parts": {task.name: _part(task, runs) for task, runs in results},
    }
    path.write_text(json.dumps(content) + "\n")


def _part(task: Task, runs: list[Run]) -> dict:
    return {
        "title": task.title,
        "batch": task.batch,
        "threads": task.threads,
        "score": task.score_name,
        "plateau": dict([task.plateau]) if task.plateau else None,
        "settings": {contender.name: contender.settings for contender in task.contenders},
        "runs": [
            {
                "optimizer": run.contender,
                "rate": None if math.isnan(run.rate) else run.rate,
                "diverged_at": run.diverged_at,
                "steps": run.steps,
                "seconds": [round(seconds, 5) for seconds in run.seconds],
                "loss": [round(loss, 6) for loss in run.loss],
                "score": [round(score, 6) for score in run.score],
            }
            for run in runs
        ],
    }


def _row(task: Task, run: Run, seconds: float) -> list[str]:
    score = _number(run.score[-1]) if run.diverged_at is None else "diverged"
    milliseconds = 1000 * run.seconds[-1] / run.steps[-1] if run.steps[-1] else None
    return [
        run.contender,
        _rate(run.rate),
        *(_number(run.at(run.loss, mark)) for mark in task.marks),
        _number(run.after(seconds)),
        score,
        *(_number(run.seconds_to(goal), 2) for goal in task.goals),
        _number(milliseconds, 1),
    ]


def _rate(rate: float) -> str:
    return "auto" if math.isnan(rate) else f"{rate:g}"


def _number(value: float | None, decimals: int | None = None) -> str:
    """At most six characters; a dash for what was not reached."""
    if value is None:
        return "–"
    return f"{value:.{(1 if value >= 10 else 4) if decimals is None else decimals}f}"
