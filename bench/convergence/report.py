"""The results as JSON, as a Markdown table and as pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .training import Run

# Okabe and Ito's palette; K-FAC in warm colours with heavy lines.
COLOURS = {
    "K-FAC": "#D55E00",
    "K-FAC, γ = √(λ+η)": "#E69F00",
    "K-FAC, no momentum": "#999999",
    "K-FAC, block-tridiagonal": "#8B2500",
    "K-FAC, block-tridiagonal, no momentum": "#B07C6E",
    "SGD-Nesterov": "#0072B2",
    "AdaGrad": "#009E73",
    "Adam": "#CC79A7",
    "Muon": "#56B4E9",
}


def by_contender(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.contender, []).append(run)
    return found


def first_at(run: Run, loss: float) -> tuple[int, float] | None:
    """Updates and seconds after which the loss was first measured at or below this."""
    return next(((u, s) for u, s, value in zip(run.updates, run.seconds, run.loss, strict=True) if value <= loss), None)


def timed(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.timed]


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values and all(map(math.isfinite, values)) else math.inf


def table(runs: Sequence[Run], rival: str = "SGD-Nesterov") -> str:
    """Means over the seeds; how soon each contender is where the rival ends."""
    groups = by_contender(runs)
    if rival not in groups:
        return "(no runs of the rival yet)"
    goal = mean([run.final for run in groups[rival]])
    rival_updates = mean([run.finished for run in groups[rival]])
    rival_seconds = mean([run.spent for run in timed(groups[rival])])
    lines = [
        f"| contender | setting | seeds | updates | seconds | final loss | updates to {goal:.1f} | seconds to that |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, group in groups.items():
        reached = [first_at(run, goal) for run in group]
        to_goal = [f"not in {group[0].finished}", ""]
        if all(each is not None for each in reached):
            updates = mean([each[0] for each in reached if each])
            seconds = mean([each[1] for run, each in zip(group, reached, strict=True) if each and run.timed])
            to_goal = [
                f"{updates:.0f} (1/{rival_updates / updates:.1f})",
                "" if math.isinf(seconds + rival_seconds) else f"{seconds:.1f} (1/{rival_seconds / seconds:.1f})",
            ]
        if name == rival:
            to_goal = [f"{rival_updates:.0f}", "" if math.isinf(rival_seconds) else f"{rival_seconds:.1f}"]
        setting = ", ".join(f"{key} {value:g}" for key, value in group[0].setting.items()) or "sets itself"
        finals = [run.final for run in group]
        spread = f"{mean(finals):.2f} ({min(finals):.2f}–{max(finals):.2f})"
        cells = [
            name,
            setting,
            str(len(group)),
            str(group[0].finished),
            f"{mean([r.spent for r in timed(group)]):.1f}" if timed(group) else "",
            spread,
            *to_goal,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, title: str, runs: Sequence[Run]) -> None:
    """Training loss against updates, and against seconds where there are any: the mean over seeds, and their band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = by_contender(runs)
    style: dict[str, Any] = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "font.size": 11}
    with plt.rc_context({**style, "grid.color": "#E4E4E4"}):
        labels = ("updates", "seconds") if timed(runs) else ("updates",)
        figure, (panels,) = plt.subplots(
            1, len(labels), figsize=(5.5 * len(labels) + 2.5, 4.8), layout="constrained", sharey=True, squeeze=False
        )
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        for axes, label in zip(panels, labels, strict=True):
            for name, group in groups.items():
                clocks = group if label == "updates" else timed(group)
                if not clocks:
                    continue
                count = min(len(run.loss) for run in group)
                xs = [mean([getattr(run, label)[i] for run in clocks]) for i in range(1, count)]
                losses = [[run.loss[i] for run in group] for i in range(1, count)]
                colour, heavy = COLOURS.get(name, "#000000"), name.startswith("K-FAC")
                axes.plot(xs, [mean(y) for y in losses], color=colour, lw=2.2 if heavy else 1.4, label=name)
                axes.fill_between(xs, [min(y) for y in losses], [max(y) for y in losses], color=colour, alpha=0.2, lw=0)
            axes.set(xscale="log", yscale="log", xlabel=label)
        panels[0].set_ylabel("training loss")
        highest = max(max(run.loss[2:5], default=1.0) for run in runs)
        panels[0].set_ylim(top=highest * 1.3)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        plt.close(figure)
