"""Saved figures as a Markdown table: ``python -m bench.show bench/results/*.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .harness import readable


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
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(table(Path(name)) for name in sys.argv[1:]))
