"""Pictures of the runs: loss against steps and against seconds, and reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from .training import Run, Task

# Okabe and Ito's palette, told apart with any colour vision. K-FAC has the warm colour and the heavy line.
COLOURS = {"K-FAC": "#D55E00", "SGD-Nesterov": "#0072B2", "AdaGrad": "#009E73", "Adam": "#CC79A7"}
INK, MUTED, GRID = "#222222", "#666666", "#E4E4E4"

STYLE = {
    "figure.dpi": 160,
    "figure.facecolor": "white",
    "font.size": 14,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def draw_losses(path: Path, task: Task, shown: list[Run]) -> None:
    """Loss against steps and against seconds; a third panel for the score where that is no loss."""
    has_score = "loss" not in task.score_name
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2 + has_score, figsize=(5 * (2 + has_score), 4.6), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06)
        figure.suptitle(task.title, x=0.01, ha="left", fontsize=17, fontweight="bold")
        for axes, label in zip(panels, ("steps", "seconds"), strict=False):
            _draw(axes, [(run, getattr(run, label), run.loss) for run in shown], label, "training loss")
            axes.set_yscale("log")
            _limit_losses(axes, task, shown)
        if has_score:
            _draw(panels[2], [(run, run.steps, run.score) for run in shown], "steps", task.score_name)
            panels[2].set_ylim(0.6, 1.0)
        figure.canvas.draw()  # settles the limits, which the labels are placed by
        for axes in panels:
            _label_lines(axes)
        figure.savefig(path)
        plt.close(figure)


def draw_reconstructions(path: Path, task: Task, shown: list[Run], columns: int = 10) -> None:
    """A row of test images, and below it what each contender's network makes of them."""
    images = task.test[0][:columns]
    rows = [("input", images)]
    for run in shown:
        with torch.no_grad():
            rows.append((run.contender, run.model(images).sigmoid()))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(rows), columns, figsize=(columns + 2.2, len(rows) + 0.9), layout="constrained", squeeze=False
        )
        figure.suptitle(f"{task.title}: after {task.steps} steps", x=0.01, ha="left", fontsize=17, fontweight="bold")
        for panels, (name, row) in zip(grid, rows, strict=True):
            for axes, image in zip(panels, row, strict=True):
                axes.imshow(image.view(28, 28).numpy(), cmap="gray_r", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
                axes.grid(False)
                axes.spines[:].set(visible=True, color=GRID)
            panels[0].set_ylabel(
                name, rotation=0, ha="right", va="center", labelpad=10, color=COLOURS.get(name, INK), fontweight="bold"
            )
        figure.savefig(path)
        plt.close(figure)


def _draw(axes: Axes, lines: list[tuple[Run, Sequence[float], Sequence[float]]], xlabel: str, ylabel: str) -> None:
    longest = lines[0][1][-1]  # the others may have had more steps
    for run, x, y in reversed(lines):  # the first contender is drawn last, on top
        shown = sum(value <= longest for value in x)
        x, y = x[:shown], y[:shown]
        heavy = run is lines[0][0]
        axes.plot(x, y, label=run.contender, color=COLOURS[run.contender], lw=3 if heavy else 1.8)
        if run.diverged_at is not None and shown == len(run.steps):
            axes.plot(x[-1], y[-1], "x", color=COLOURS[run.contender], ms=9, mew=2)
    axes.set_xlabel(xlabel)
    axes.set_title(ylabel, loc="left", fontsize=14, color=MUTED)
    axes.set_xlim(left=0)


def _limit_losses(axes: Axes, task: Task, shown: list[Run]) -> None:
    """Cuts off the first steps' peaks, which would press the rest into a corner, and draws the plateau."""
    lowest = min(min(run.loss) for run in shown)
    if task.plateau is None:
        axes.set_ylim(lowest / 1.3, 1.3 * max(run.loss[0] for run in shown))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(numticks=8))
        return
    name, plateau = task.plateau
    axes.set_yscale("linear")
    axes.set_ylim(lowest - 0.04 * plateau, 1.25 * plateau)
    axes.axhline(plateau, color=MUTED, lw=1.2, ls=(0, (4, 3)), zorder=0)
    axes.annotate(
        f"{name} {plateau:.0f}",
        (1, plateau),
        xycoords=axes.get_yaxis_transform(),
        xytext=(-4, 8),
        textcoords="offset points",
        ha="right",
        color=MUTED,
        fontsize=13,
    )


def _label_lines(axes: Axes, gap: float = 0.075) -> None:
    """Writes each line's name beside its end, moved apart (``gap`` is a share of the height) where ends are close."""
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    ends = [
        axes.transLimits.transform(axes.transScale.transform((line.get_xdata()[-1], line.get_ydata()[-1])))
        for line in lines
    ]
    order = sorted(range(len(lines)), key=lambda i: ends[i][1])
    heights = _apart([float(ends[i][1]) for i in order], gap)
    for i, height in zip(order, heights, strict=True):
        axes.annotate(
            lines[i].get_label(),
            (1, height),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=lines[i].get_color(),
            fontweight="bold" if lines[i].get_linewidth() > 2 else "normal",
            annotation_clip=False,
        )


def _apart(heights: list[float], gap: float) -> list[float]:
    """Moves ascending heights until neighbours are ``gap`` apart within 0…1, each as little as needed."""
    placed = list(heights)
    for _ in range(100):
        placed[0], placed[-1] = max(placed[0], 0.0), min(placed[-1], 1.0)
        for i in range(len(placed) - 1):
            lack = gap - (placed[i + 1] - placed[i])
            if lack > 0:
                placed[i] -= lack / 2
                placed[i + 1] += lack / 2
    return placed
