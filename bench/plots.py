"""Pictures of saved figures: ``python -m bench.plots bench/results/MACHINE.json …`` writes a PNG beside each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.figure import SubFigure

from .parts import PARTS

matplotlib.use("Agg")
COLOURS = {"kfac_fast": "#d1495b", "torch stacked": "#30638e", "torch looped": "#7fa7c9", "scipy looped": "#8d99ae"}
PART_COLOURS = dict(zip(PARTS, ("#8d99ae", "#30638e", "#7fa7c9", "#edae49", "#d1495b", "#66a182"), strict=True))


def picture(saved: dict[str, Any]) -> plt.Figure | None:
    """What there is of a throughput of inverses and of steps by part, one above the other; None without either."""
    draw = []
    if "throughput" in saved:
        draw.append(lambda place: throughput(place, saved["throughput"]))
    steps = [row for row in saved["rows"] if row["op"] == "model"]
    if steps:
        draw.append(lambda place: parts(place, steps))
    if not draw:
        return None
    figure = plt.figure(figsize=(12, 3.9 * len(draw)), layout="constrained")
    for place, one in zip(figure.subfigures(len(draw), 1, squeeze=False)[:, 0], draw, strict=True):
        one(place)
    machine = saved["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}", fontsize=10)
    return figure


def throughput(place: SubFigure, saved: dict[str, Any]) -> None:
    """GFLOP/s against n, both axes logarithmic, one panel a batch size, with the rate of torch.mm as the limit."""
    rows = [r for r in saved["rows"] if r["dtype"] == "float32"]
    batches = sorted({r["batch"] for r in rows})
    axes = place.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for axis, batch in zip(axes, batches, strict=True):
        for name in dict.fromkeys(r["name"] for r in rows):
            points = [(r["n"], r["gflops"]) for r in rows if r["name"] == name and r["batch"] == batch]
            axis.loglog(*zip(*points, strict=True), marker="o", ms=4, label=name, color=COLOURS.get(name))
        if saved["sgemm_gflops"]:
            axis.axhline(saved["sgemm_gflops"], color="0.4", ls="--", lw=1)
            axis.annotate("torch.mm", (1, saved["sgemm_gflops"]), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                          textcoords="offset points", ha="right", fontsize=8, color="0.4")  # fmt: skip
        axis.set(title="one matrix" if batch == 1 else f"{batch} matrices", xlabel="n")
        axis.grid(alpha=0.25, which="both", lw=0.4)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("GFLOP/s (n³ operations each)")
    axes[0].legend(frameon=False, fontsize=8)
    place.suptitle("Damped inverse, float32")


def parts(place: SubFigure, rows: list[dict[str, Any]]) -> None:
    """Bars of whole steps in units of SGD's, one panel a network; K-FAC's are stacked by part."""
    networks: dict[str, list[tuple[str, dict[str, float]]]] = {}
    for row in rows:
        network, contender = row["case"].split(": ")
        networks.setdefault(network, []).append((contender, row["extra"]))
    axes = place.subplots(1, len(networks), squeeze=False)[0]
    for axis, (network, bars) in zip(axes, networks.items(), strict=True):
        for contender, extra in bars:
            milliseconds = {part: max(extra.get(f"{part}_ms", float(part == "model")), 0.0) for part in PARTS}
            scale = extra["cost"] / sum(milliseconds.values())
            left = 0.0
            for part in PARTS:
                width = scale * milliseconds[part]
                colour = PART_COLOURS[part] if "model_ms" in extra else "0.8"
                axis.barh(contender, width, left=left, color=colour)
                left += width
        axis.axvline(1, color="0.2", ls="--", lw=1)
        axis.invert_yaxis()
        axis.set_title(network, fontsize=9)
        axis.set_xlabel("times SGD's step", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=PART_COLOURS[part]) for part in PARTS]
    labels = ["forward, backward" if part == "model" else part for part in PARTS]
    place.legend(handles, labels, loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=8)
    place.suptitle("Whole step by part")


def write(path: Path) -> Path | None:
    """Draws a file of figures beside it; the path of the picture, or None if there is nothing to draw."""
    figure = picture(json.loads(path.read_text()))
    if figure is None:
        return None
    figure.savefig(path.with_suffix(".png"), dpi=150)
    return path.with_suffix(".png")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(write(Path(name)) or f"{name}: nothing to draw")
