"""``python -m bench [names…] [--case TEXT] [--json PATH]``: run it alone on the machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import adaptive, damped_inverse, factor_update, models, precondition, step
from .harness import HEADER, Row, line, machine, run, save

SCRIPTS = {
    "damped_inverse": lambda case: run(damped_inverse.cases(), case),
    "factor_update": lambda case: run(factor_update.cases(), case),
    "precondition": lambda case: run(precondition.cases(), case),
    "step": lambda case: run(step.cases(), case),
    "models": models.run,
    "adaptive": lambda case: [] if case else adaptive.run(),  # its cases share their steps
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *SCRIPTS], help="which; default all")
    parser.add_argument("--case", default="", help="only rows whose name contains this; one takes a few seconds")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"), help="where the figures go")
    options = parser.parse_args()
    print(" · ".join(f"{key} {value}" for key, value in machine().items()))
    print(HEADER)
    rows: list[Row] = []
    for name in options.names or SCRIPTS:
        rows += SCRIPTS[name](options.case)
    save(rows, options.json)
    missed = [row for row in rows if not row.reached]
    print(f"\n{len(rows) - len(missed)} of {len(rows)} bars reached; figures in {options.json}")
    for row in missed:
        print(line(row))


if __name__ == "__main__":
    main()
