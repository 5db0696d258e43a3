"""Saved figures as a Markdown table: ``python -m bench.show bench/results/*.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .harness import readable
from .parts import PARTS


def table(path: Path) -> str:
    saved = json.loads(path.read_text())
    lines = [
        " · ".join(f"{key} {value}" for key, value in saved["machine"].items()),
        "",
        "| op | case | ours | rival | rival's time / ours | p10–p90 | at least |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in saved["rows"]:
        missed = row["bar"] is not None and row["ratio"] < row["bar"]
        bar = "" if row["bar"] is None else f"{row['bar']:.2f}" + (" (missed)" if missed else "")
        rival = f"{readable(row['rival_s'])} ({row['rival']})"
        spread = f"{row['ratio_p10']:.2f}–{row['ratio_p90']:.2f}"
        cells = (f"`{row['op']}`", row["case"], readable(row["ours_s"]), rival, f"**{row['ratio']:.2f}**", spread, bar)
        lines.append(f"| {' | '.join(cells)} |")
    steps = [row for row in saved["rows"] if "model_ms" in row["extra"]]
    return "\n".join([*lines, *([] if not steps else ["", *parts(steps)])])


def parts(rows: list[dict[str, Any]]) -> list[str]:
    """Where the time of whole K-FAC steps goes, in ms, and their peak memory."""
    columns = [*PARTS, "kernels", "python"]
    heads = ["step", "times SGD", "forward, backward", *columns[1:-1], "Python of step()", "peak, MiB", "SGD's"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        extra = row["extra"]
        times = [f"{extra[f'{part}_ms']:.2f}" for part in columns]
        memory = [f"{extra[key]:.0f}" if key in extra else "" for key in ("peak_mib", "sgd_peak_mib")]
        cost = f"**{extra['cost']:.2f}**"
        lines.append(f"| {' | '.join([row['case'], cost, *times, *memory])} |")
    return lines


if __name__ == "__main__":
    print("\n\n".join(table(Path(name)) for name in sys.argv[1:]))
