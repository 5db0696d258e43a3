"""Peak memory of a few steps, each in a process of its own: an allocator gives little back."""

from __future__ import annotations

import multiprocessing
import resource
from pathlib import Path

import torch

STEPS = 3


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
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize()
    model = chosen.model()
    step = chosen.stepper(model, models.PEAKS[contender](model))
    for _ in range(STEPS):
        step()
    return (1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
