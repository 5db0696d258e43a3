"""Pictures of `bench.throughput`: ``python -m bench.plots FILE.json …`` writes a PNG beside each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

matplotlib.use("Agg")
COLOURS = {"kfac_fast": "#d1495b", "torch stacked": "#30638e", "torch looped": "#7fa7c9", "scipy looped": "#8d99ae"}


def throughput(saved: dict[str, Any]) -> plt.Figure:
    """GFLOP/s against n, both axes logarithmic, one panel a batch size, with the rate of torch.mm as the limit."""
    rows = [r for r in saved["rows"] if r["dtype"] == "float32"]
    batches = sorted({r["batch"] for r in rows})
    figure, axes = plt.subplots(1, len(batches), figsize=(3.3 * len(batches), 3.4), sharey=True, layout="constrained")
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
    figure.suptitle(f"Damped inverse, float32, {saved['machine']['cpu']}, {saved['machine']['threads']} threads")
    return figure


def main() -> None:
    for name in sys.argv[1:]:
        path = Path(name)
        saved = json.loads(path.read_text())
        throughput(saved).savefig(path.with_suffix(".png"), dpi=150)
        print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
