"""Peak memory of a few steps, each in a process of its own: an allocator gives little back."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path

import torch

STEPS = 2


def peak_mebibytes(workload: str, contender: str, threads: int) -> float:
    """What steps add, at most, to what a process has that has imported everything and holds the batch.

    Args:
        workload: A short name in `bench.workloads`.
        contender: A key of `bench.models.PEAKS`.
        threads: Of torch.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (workload, contender, threads))


def _peak(workload: str, contender: str, threads: int) -> float:
    from . import models, workloads

    torch.set_num_threads(threads)
    chosen = workloads.workloads()[workload]
    before = _kibibytes("VmRSS")
    model = chosen.model()
    step = chosen.stepper(model, models.PEAKS[contender](model))
    for _ in range(STEPS):
        step()
    return (_kibibytes("VmHWM") - before) / 1024


def _kibibytes(entry: str) -> int:
    """A figure of this process's memory. Not of `resource`: there a child begins with its parent's peak."""
    return int(re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
