"""What each CUDA kernel does, counted in nvcc's PTX by the simulator of ptx_device.py.

    python tests/simt/profile_kernels.py                   # all cases
    python tests/simt/profile_kernels.py factor            # those whose name contains this
    python tests/simt/profile_kernels.py --write           # all, into docs/cuda.md

Needs nvcc and the simulator. Counts, not times: caches, latencies and occupancy are not modelled.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import generated
from cases import Case, commit, convolution, damped_inverse, factor_update, precondition
from launches import BF16, F32, ROOT, TF32, Launch, contracted, library
from ptx_device import PtxDevice, ptxsim

# Cycles that a tensor core is busy with one mma instruction of a warp, from the dense rates of an A100's data sheet:
# 312 TFLOP/s for 16-bit numbers, 156 TFLOP/s for TF32, 108 multiprocessors of 4 tensor cores, 1.41 GHz.
_CYCLES = {
    "mma.tf32": 2 * 16 * 8 * 8 / (156e12 / (108 * 4 * 1.41e9)),
    "mma.f16": 2 * 16 * 8 * 16 / (312e12 / (108 * 4 * 1.41e9)),
}
_CYCLES["mma.bf16"] = _CYCLES["mma.f16"]
_FMA = ("ffma32", "ffma64")
_INNER = 16  # a basic block with this many multiply-adds is the body of an inner loop


@dataclass
class Counts:
    """Sums over the launches of one kernel in one case."""

    launches: int = 0
    footprint: int = 0  # distinct bytes of each launch
    beyond_l1: int = 0  # distinct sectors of each block
    global_sectors: list[int] = field(default_factory=lambda: [0, 0, 0])  # requests, moved, needed
    wavefronts: list[int] = field(default_factory=lambda: [0, 0])  # of shared memory: taken, needed
    issue: list[float] = field(default_factory=lambda: [0.0, 0.0])  # cycles in inner loops: multiply-adds, all


def count(launches: list[Launch]) -> dict[str, Counts]:
    kernels: dict[str, Counts] = defaultdict(Counts)
    for launch in launches:
        profile, c = launch.result.profile, kernels[launch.kernel]
        c.launches += 1
        c.footprint += profile.min_bytes
        c.beyond_l1 += profile.block_sector_bytes
        for access in (profile.global_load, profile.global_store):
            for i, key in enumerate(("requests", "sectors", "ideal_sectors")):
                c.global_sectors[i] += access[key]
        for access in (profile.shared_load, profile.shared_store):
            c.wavefronts[0] += access["wavefronts"]
            c.wavefronts[1] += access["ideal_wavefronts"]
        for block, executed in launch.blocks:
            pairs = contracted(block)
            math = pairs + sum(block.get(k, 0) for k in _FMA)
            math += sum(block.get(k, 0) * cycles for k, cycles in _CYCLES.items())
            if math < _INNER:
                continue
            other = sum(
                n for k, n in block.items() if k not in (*_FMA, *_CYCLES, "mov") and not k.startswith("mmaflop")
            )
            c.issue[0] += math * executed
            c.issue[1] += (math + other - 2 * pairs) * executed
    return kernels


CASES = [
    factor_update(256, 257, F32),
    factor_update(8192, 65, F32),
    factor_update(8192, 257, F32),
    factor_update(8192, 513, F32),
    factor_update(8192, 257, TF32),
    factor_update(8192, 65, BF16),
    factor_update(8192, 257, BF16),
    factor_update(8192, 513, BF16),
    factor_update(1024, 255, F32),  # rows that are not whole vectors
    convolution(8, 16, 16, 3, F32),
    convolution(8, 16, 16, 3, BF16),
    convolution(8, 32, 32, 3, F32),  # by shifted images
    convolution(16, 32, 32, 3, BF16),
    damped_inverse([8] * 256),
    damped_inverse([16] * 128),
    damped_inverse([32] * 64),
    damped_inverse([64] * 16),
    damped_inverse([128] * 8),
    damped_inverse([240] * 2),
    damped_inverse([512]),
    precondition([(32, 33)] * 16),
    precondition([(256, 257)]),
    precondition([(512, 513)]),
    commit([300] * 2),
]
HEADER = ["kernel", "case", "bytes", "beyond L1", "coalescing", "sectors / request", "conflicts", "math"]


def ratio(a: float, b: float, form: str = ".2f") -> str:
    return format(a / b, form) if b else ""


def rows_of(case: Case, device: PtxDevice) -> list[list[str]]:
    launches = case.run(device)
    device.release()
    kernels = count(launches)
    moved, l1 = sum(k.footprint for k in kernels.values()), sum(k.beyond_l1 for k in kernels.values())
    rows = [[f"**{case.op}**", case.name, ratio(moved, case.minimum), ratio(l1, case.minimum), "", "", "", ""]]
    for kernel, c in kernels.items():
        rows.append([
            f"`{kernel}`" + (f" × {c.launches}" if c.launches > 1 else ""), "",
            ratio(c.footprint, case.minimum), ratio(c.beyond_l1, case.minimum),
            ratio(c.global_sectors[2], c.global_sectors[1], ".0%"), ratio(c.global_sectors[1], c.global_sectors[0], ".1f"),
            ratio(*c.wavefronts), ratio(c.issue[0], c.issue[1], ".0%"),
        ])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("filter", nargs="?", default="")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--write", action="store_true", help="into docs/cuda.md")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "profile")
    args = parser.parse_args()
    if ptxsim is None:
        raise SystemExit("the PTX simulator is not beside the repository")
    device = PtxDevice(library(args.build), args.arch)
    rows: list[list[str]] = []
    for case in CASES:
        if args.filter in f"{case.op} {case.name}":
            rows += rows_of(case, device)
            print(case.op, case.name, file=sys.stderr)
    text = generated.markdown(HEADER, rows)
    print(text)
    if args.write:
        generated.write("python tests/simt/profile_kernels.py --write", text)


if __name__ == "__main__":
    main()
