"""Throughput of damped inverses by size, batch and type, beside everything installed that can invert a batch.

Not a table of bars but the picture: matrices and operations (n³ each) a second. Rivals: torch.linalg on the stacked
batch and block by block, scipy block by block, and CuPy on a GPU where it is installed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfac_fast import BlockDiagonal, ops

from .damped_inverse import DAMPING, MM, stacked_inverse, well_conditioned
from .harness import save

SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
BATCHES = (1, 16, 256, 4096)
MAX_OPERATIONS = 2.5e9  # n³ · batch; above, a call takes too long for a table
MIN_SECONDS, REPEATS = 0.02, 5
PAUSE = 0.1  # scipy has threads of its own, which wait actively for a while after each call


def contestants(blocks: BlockDiagonal) -> dict[str, Callable[[], Any]]:
    """Name → a call that inverts every block."""
    out = blocks.empty_like()
    singles = [b.clone() for b in blocks]
    stack = torch.stack(singles)
    calls: dict[str, Callable[[], Any]] = {
        "kfac_fast": lambda: ops.damped_inverse(blocks, DAMPING, out),
        "torch stacked": lambda: stacked_inverse(stack),
        "torch looped": lambda: [stacked_inverse(b) for b in singles],
    }
    if blocks.data.is_cuda:
        calls |= _cupy(stack)
    else:
        calls |= _scipy(singles)
    return calls


def _scipy(singles: list[Tensor]) -> dict[str, Callable[[], Any]]:
    try:
        import numpy as np
        from scipy.linalg import lapack
    except ImportError:
        return {}
    arrays = [b.numpy() for b in singles]
    double = singles[0].dtype == torch.float64
    potrf, potri = (lapack.dpotrf, lapack.dpotri) if double else (lapack.spotrf, lapack.spotri)
    damping = DAMPING * np.eye(len(singles[0]), dtype=arrays[0].dtype)
    return {"scipy looped": lambda: [potri(potrf(a + damping, lower=1)[0], lower=1) for a in arrays]}


def _cupy(stack: Tensor) -> dict[str, Callable[[], Any]]:
    try:
        import cupy
    except ImportError:
        return {}
    array = cupy.asarray(stack) + DAMPING * cupy.eye(stack.shape[-1], dtype=cupy.float32)
    return {"cupy stacked": lambda: cupy.linalg.inv(array)}


def seconds_per_call(call: Callable[[], Any], device: torch.device) -> float:
    """Median of repeats that last long enough for the clock; a GPU is waited for."""

    def stretch(count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / count

    time.sleep(PAUSE)
    stretch(1)
    count = max(1, round(MIN_SECONDS / max(stretch(1), 1e-7)))
    return statistics.median(stretch(count) for _ in range(REPEATS))


def mm_gflops() -> float:
    """What torch.mm reaches in float32: the machine's limit, as far as torch knows it."""
    a = torch.randn(MM, MM)
    return 1e-9 * 2 * MM**3 / seconds_per_call(lambda: torch.mm(a, a), a.device)


def measure(
    device: torch.device, dtype: torch.dtype, sizes: Sequence[int] = SIZES, batches: Sequence[int] = BATCHES
) -> list[dict[str, Any]]:
    """A row for every size, batch and contestant, printed as it comes."""
    rows: list[dict[str, Any]] = []
    for n in sizes:
        matrix = well_conditioned(n).to(device, dtype)
        for batch in batches:
            if batch * n**3 > MAX_OPERATIONS:
                continue
            blocks = BlockDiagonal.pack([matrix] * batch)
            times = {name: seconds_per_call(call, device) for name, call in contestants(blocks).items()}
            for name, seconds in times.items():
                rows.append(
                    {
                        "n": n,
                        "batch": batch,
                        "dtype": str(dtype).removeprefix("torch."),
                        "name": name,
                        "matrices_per_s": batch / seconds,
                        "gflops": 1e-9 * batch * n**3 / seconds,
                        "ours_is_faster_by": seconds / times["kfac_fast"],
                    }
                )
            cells = "  ".join(f"{name} {1e-9 * batch * n**3 / s:8.2f}" for name, s in times.items())
            print(f"{rows[-1]['dtype']}  {batch:5} × {n:4}²  GFLOP/s: {cells}", flush=True)
    return rows


def run(*, short: bool = False) -> dict[str, Any]:
    """Both types on the CPU, or on the GPU if there is one; short: float32, every second size and batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if short:
        rows = measure(device, torch.float32, SIZES[1::2], BATCHES[::2])
    else:
        rows = measure(device, torch.float32) + measure(device, torch.float64)
    return {"device": str(device), "sgemm_gflops": mm_gflops() if device.type == "cpu" else None, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("build/throughput.json"), help="where the figures go")
    path = parser.parse_args().json
    save([], path, throughput=run())
    print(f"figures in {path}; python -m bench.plots {path} draws them")


if __name__ == "__main__":
    main()
