"""``python -m bench [names…] [--json PATH]``: run it alone on the machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import adaptive, damped_inverse, factor_update, precondition, step
from .harness import HEADER, Row, line, machine, save

SCRIPTS = {
    "damped_inverse": damped_inverse.run,
    "factor_update": factor_update.run,
    "precondition": precondition.run,
    "step": step.run,
    "adaptive": adaptive.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *SCRIPTS], help="which; default all")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"), help="where the figures go")
    options = parser.parse_args()
    print(" · ".join(f"{key} {value}" for key, value in machine().items()))
    print(HEADER)
    rows: list[Row] = []
    for name in options.names or SCRIPTS:
        rows += SCRIPTS[name]()
    save(rows, options.json)
    missed = [row for row in rows if not row.reached]
    print(f"\n{len(rows) - len(missed)} of {len(rows)} bars reached; figures in {options.json}")
    for row in missed:
        print(line(row))


if __name__ == "__main__":
    main()
