"""Trains each model with K-FAC and with AdamW, both at their defaults: ``python -m examples.models [name…]``."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

from kfac_fast import KFAC

from .tasks import TASKS, Task


def train(task: Task, kfac: bool, steps: int, batch: int, seed: int = 0) -> list[float]:
    """The loss before every step."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer = KFAC(model) if kfac else torch.optim.AdamW(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x, y = task.batch(batch, generator)
        optimizer.zero_grad()
        loss = task.loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.models", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *TASKS], help="which; default all")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--report", action="store_true", help="print the block of every parameter")
    options = parser.parse_args()
    table = Table("model", "parameters", "loss at the start", "K-FAC", "AdamW", title=f"after {options.steps} steps")
    for name in options.names or TASKS:
        task = TASKS[name]
        if options.report:
            print(f"{name}\n{KFAC(task.model()).report()}\n")
        ours, theirs = (train(task, kfac, options.steps, options.batch) for kfac in (True, False))
        size = sum(p.numel() for p in task.model().parameters())
        table.add_row(name, f"{size:,}", *(f"{x:.3f}" for x in (ours[0], ours[-1], theirs[-1])))
    Console().print(table)


if __name__ == "__main__":
    main()
