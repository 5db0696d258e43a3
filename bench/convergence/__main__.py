"""``python -m bench.convergence``: tunes the rivals, runs everybody with three seeds, writes figures and pictures.

MNIST takes part where KFAC_FAST_MNIST names the folder of its files.

It may be stopped at any time and goes on where it was; ``--piece`` stops it after some seconds (exit status 3: not done
yet). Run nothing else beside the final runs: their seconds are part of the result.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from ..harness import machine
from .contenders import CONTENDERS, Contender, Setting
from .problems import FULL_AT, PROBLEMS, Problem
from .report import draw, table
from .training import Run, Training, write_json

TUNING_SEED = 100
SEEDS = (0, 1, 2)


class Comparison:
    """The runs of one problem, scaled by ``budget``, until a deadline."""

    def __init__(self, problem: Problem, folder: Path, budget: float, deadline: float, *, timed: bool) -> None:
        self.problem, self.folder, self.deadline, self.timed = problem, folder, deadline, timed
        self.scale = lambda updates: max(2, round(updates * budget))

    def training(self, contender: Contender, setting: Setting, seed: int) -> Training:
        return Training(
            self.problem,
            contender,
            setting,
            seed,
            self.folder,
            self.scale(contender.updates),
            max(2, self.scale(FULL_AT)),
        )

    def finished(self, contender: Contender) -> tuple[list[Run], list[Run]]:
        """What there is already: final runs that came to their end, and tuning runs, each as far as it came."""
        tuned = [self.training(contender, setting, TUNING_SEED).run for setting in contender.grid]
        tuned = [run for run in tuned if run.finished] if contender.rounds else []
        trainings = [self.training(contender, setting, seed) for setting in contender.grid for seed in SEEDS]
        return [t.run for t in trainings if t.done(self.scale(contender.updates))], tuned

    def tune(self, contender: Contender) -> tuple[Setting | None, list[Run]]:
        """The best setting, or None if the deadline came first; and the runs it was chosen from."""
        alive = [self.training(contender, setting, TUNING_SEED) for setting in contender.grid]
        everything = alive
        if not contender.rounds:
            return contender.grid[0], []
        for updates, survivors in contender.rounds:
            reached = [each.advance(self.scale(updates), self.deadline) for each in alive]
            if not all(reached):
                return None, [each.run for each in everything]
            alive = sorted(alive, key=lambda each: each.run.final)[:survivors]
        return alive[0].run.setting, [each.run for each in everything]

    def final(self, contender: Contender, setting: Setting, seed: int) -> Run | None:
        training = self.training(contender, setting, seed)
        reached = training.advance(self.scale(contender.updates), self.deadline, timed=self.timed)
        return training.run if reached else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.convergence", description=__doc__.split("\n")[0])
    parser.add_argument("--problem", choices=PROBLEMS, action="append", help="default: all that there are")
    parser.add_argument("--contender", choices=CONTENDERS, action="append", help="default: all")
    parser.add_argument("--budget", type=float, default=1.0, help="fraction of all updates, for a short run")
    parser.add_argument("--piece", type=float, default=float("inf"), help="stop after about this many seconds")
    parser.add_argument("--tune-only", action="store_true", help="only choose settings; seconds do not matter there")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append", help="of the final runs; default: all")
    parser.add_argument("--untimed", action="store_true", help="other work runs beside: the seconds mean nothing")
    parser.add_argument("--report", action="store_true", help="train nothing, write what has been finished")
    parser.add_argument("--folder", type=Path, default=Path("build/convergence"), help="where runs wait")
    parser.add_argument("--json", type=Path, default=Path("build/convergence.json"), help="where the results go")
    parser.add_argument("--pictures", type=Path, default=Path("build"), help="folder of the pictures")
    parser.add_argument("--show", type=Path, help="train nothing, print the tables of a JSON file")
    options = parser.parse_args()
    if options.show:
        saved = json.loads(options.show.read_text())
        for problem in (name for name in PROBLEMS if name in saved):
            print(f"{PROBLEMS[problem].title}\n\n{table([Run(**run) for run in saved[problem]['runs']])}\n")
        return
    folder = options.folder / f"budget-{options.budget:g}"
    deadline = time.monotonic() + options.piece
    complete = True
    results: dict[str, object] = {
        "machine": machine(),
        "seeds": SEEDS,
        "tuning_seed": TUNING_SEED,
        "budget": options.budget,
    }
    on_disk = [name for name in PROBLEMS if name != "mnist" or "KFAC_FAST_MNIST" in os.environ]
    for problem in options.problem or on_disk:
        comparison = Comparison(PROBLEMS[problem], folder, options.budget, deadline, timed=not options.untimed)
        tuned: list[Run] = []
        runs: list[Run] = []
        for contender in (CONTENDERS[name] for name in options.contender or CONTENDERS):
            if options.report:
                finals, tried = comparison.finished(contender)
                runs, tuned = runs + finals, tuned + tried
                complete &= len(finals) == len(SEEDS)
                continue
            setting, tried = comparison.tune(contender)
            tuned += tried
            print(f"{problem}: {contender.name}: {setting}", flush=True)
            if setting is None:
                complete = False
            elif not options.tune_only:
                for seed in options.seed or SEEDS:
                    run = comparison.final(contender, setting, seed)
                    complete &= run is not None
                    if run is not None:
                        print(f"  seed {seed}: {run.final:.2f} after {run.finished} updates, {run.spent:.1f} s")
                        runs.append(run)
        results[problem] = {"runs": [asdict(run) for run in runs], "tuning": [asdict(run) for run in tuned]}
        if runs and (complete or options.report):
            print(table(runs))
            draw(options.pictures / f"convergence_{problem}.png", PROBLEMS[problem].title, runs)
    results["complete"] = complete
    if not complete and not options.report:
        sys.exit(3)
    if not options.tune_only:
        write_json(options.json, results)
        print(f"results in {options.json}, pictures in {options.pictures}/")


if __name__ == "__main__":
    main()
