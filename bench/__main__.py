"""``python -m bench [names…] [--case TEXT] [--json PATH]``: run it alone on the machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import adaptive, damped_inverse, factor_update, models, precondition, show, step, throughput
from .harness import HEADER, Row, line, machine, machine_name, run, save

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
    parser.add_argument("names", nargs="*", choices=[[], *SCRIPTS, "throughput"], help="which; default all")
    parser.add_argument("--case", default="", help="only rows whose name contains this; one takes a few seconds")
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("build/bench.json"),
        help="where the figures go, with a table (.md) and a picture (.png) beside them; in a folder the file has the "
        "machine's name",
    )
    options = parser.parse_args()
    path = options.json / f"{machine_name()}.json" if options.json.is_dir() else options.json
    print(" · ".join(f"{key} {value}" for key, value in machine().items()))
    print(HEADER)
    rows: list[Row] = []
    others = {}
    for name in options.names or (*SCRIPTS, "throughput"):
        if name == "throughput":
            others[name] = throughput.run(short=True)
        else:
            rows += SCRIPTS[name](options.case)
        save(rows, path, **others)  # after each: a run that is stopped loses only what it was at
    path.with_suffix(".md").write_text(show.table(path) + "\n")
    try:
        from . import plots
    except ImportError as error:
        print(f"no picture: {error}")
    else:
        plots.write(path)
    missed = [row for row in rows if not row.reached]
    print(f"\n{sum(row.bar is not None for row in rows) - len(missed)} bars reached, {len(missed)} not")
    for row in missed:
        print(line(row))
    print(f"figures in {path}, a table and where it says something a picture beside them")


if __name__ == "__main__":
    main()
