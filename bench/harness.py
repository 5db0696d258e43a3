"""Ours beside a rival in the same run: alternating repeats, medians of ratios, one row per case."""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kfac_fast import __version__
from kfac_fast.ops.native import cpu_table

REPEATS = 11
TARGET_SECONDS = 0.06  # of one timed stretch; long enough for the clock, short enough for a full table

Call = Callable[[], object]


@dataclass
class Case:
    """One comparison to make. `make` does the set-up and returns our call and the rival's.

    `scale` multiplies the rival's time where its call does another amount of work. `extra` is called once the times are
    there, for figures beside them.
    """

    op: str
    name: str
    rival: str
    make: Callable[[], tuple[Call, Call]]
    bar: float | None = None
    scale: float = 1.0
    extra: Callable[[Call], dict[str, float]] | None = None


@dataclass
class Row:
    """One comparison made. Times are seconds per call; ratio = rival / ours, so that larger is better."""

    op: str
    case: str
    rival: str
    ours_s: float
    rival_s: float
    ratio: float
    ratio_p10: float
    ratio_p90: float
    bar: float | None
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def reached(self) -> bool:
        return self.bar is None or self.ratio >= self.bar


def stretch(run: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


def count_for(run: Call) -> int:
    run()  # warm-up: first-touch memory, plans, thread pools
    once = stretch(run, 1)
    return max(1, round(TARGET_SECONDS / max(once, 1e-7)))


def measure(case: Case) -> Row:
    """Times both in turn."""
    ours, rival = case.make()
    counts = count_for(ours), count_for(rival)
    times = [(stretch(ours, counts[0]), stretch(rival, counts[1]) * case.scale) for _ in range(REPEATS)]
    ratios = sorted(r / o for o, r in times)
    return Row(
        case.op,
        case.name,
        case.rival,
        statistics.median(o for o, _ in times),
        statistics.median(r for _, r in times),
        statistics.median(ratios),
        ratios[len(ratios) // 10],
        ratios[-1 - len(ratios) // 10],
        case.bar,
        case.extra(ours) if case.extra is not None else {},
    )


def run(cases: Iterable[Case], containing: str = "") -> list[Row]:
    """Measures and prints the cases whose name contains this."""
    rows = []
    for case in cases:
        if containing in case.name:
            rows.append(measure(case))
            print(line(rows[-1]), flush=True)
    return rows


HEADER = f"{'op':<16}{'case':<38}{'ours':>10}{'rival':>10}{'ratio':>7}{'p10–p90':>13}{'bar':>8}"


def line(row: Row) -> str:
    """A row of the table."""
    bar = "" if row.bar is None else f"{row.bar:.2f}" + ("" if row.reached else " ✗")
    spread = f"{row.ratio_p10:.2f}–{row.ratio_p90:.2f}"
    extra = "".join(f"  {key} {value:.2f}" for key, value in row.extra.items())
    return (
        f"{row.op:<16}{row.case:<38}{readable(row.ours_s):>10}{readable(row.rival_s):>10}{row.ratio:>7.2f}"
        f"{spread:>13}{bar:>8}{extra}"
    )


def readable(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def machine() -> dict[str, object]:
    """What the figures belong to."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [entry.split(":")[1].strip() for entry in cpuinfo.read_text().splitlines() if "model name" in entry]
        model = names[0] if names else model
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "kernels": cpu_table.name,
        "torch": torch.__version__,
        "kfac_fast": __version__,
        "commit": commit.stdout.strip(),
    }


def machine_name() -> str:
    """Of the machine, short enough for a file: the maker and kind of its processor, and the threads."""
    words = re.sub(r"\(.*?\)|@.*|\b(cpu|processor)\b", " ", str(machine()["cpu"]).lower()).split()
    threads = torch.get_num_threads()
    return "-".join([*words, str(threads), "thread" if threads == 1 else "threads"])


def save(rows: list[Row], path: Path, **others: object) -> None:
    """Writes rows, machine and other figures as JSON; those of an earlier run are kept where none is newer.

    Only of a run on the same machine with the same versions; figures of another are replaced as a whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh: dict[str, Any] = {"machine": machine(), "rows": [asdict(row) for row in rows], **others}
    if path.exists():
        saved = json.loads(path.read_text())
        if saved["machine"] == fresh["machine"]:
            made = {(row.op, row.case) for row in rows}
            kept = [row for row in saved["rows"] if (row["op"], row["case"]) not in made]
            fresh = {**saved, **fresh, "rows": kept + fresh["rows"]}
    path.write_text(json.dumps(fresh, indent=1) + "\n")
