"""What each CUDA kernel does, counted in nvcc's PTX by the simulator of ptx_device.py.

    python tests/simt/profile_kernels.py                   # all cases
    python tests/simt/profile_kernels.py factor            # those whose name contains this
    python tests/simt/profile_kernels.py --write           # all, into docs/cuda.md

Needs nvcc and the simulator. Counts, not times: caches, latencies and occupancy are not modelled.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import generated
import numpy as np
from ptx_device import BF16, F32, ROOT, Launch, PtxDevice, ptxsim

from kfac_fast import _C

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
class Case:
    """A call to measure, and the bytes that it cannot do without: inputs read once, outputs written once."""

    op: str
    name: str
    run: Callable[[PtxDevice], list[Launch]]
    minimum: int


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
            math = sum(block.get(k, 0) for k in _FMA) + sum(block.get(k, 0) * cycles for k, cycles in _CYCLES.items())
            if math < _INNER:
                continue
            other = sum(
                n for k, n in block.items() if k not in (*_FMA, *_CYCLES, "mov") and not k.startswith("mmaflop")
            )
            c.issue[0] += math * executed
            c.issue[1] += (math + other) * executed
    return kernels


def factor_update(m: int, n: int, dtype: int, bias: bool = True) -> Case:
    d = n - bias
    width = 2 if dtype == BF16 else 4

    def run(device: PtxDevice) -> list[Launch]:
        x = np.random.default_rng(0).standard_normal((m, d)).astype(np.float32)
        array = ptxsim.bf16(x) if dtype == BF16 else x
        return _factor_update(device, array, dtype, (m, d), (d, 1), [], n, bias)

    kind = "bf16" if dtype == BF16 else "f32"
    return Case("factor_update", f"{m} rows, {n}², {kind}", run, m * d * width + 4 * (n * (n + 1) // 2 + n * n))


def convolution(batch: int, channels: int, side: int, kernel: int, dtype: int) -> Case:
    n = channels * kernel * kernel
    width = 2 if dtype == BF16 else 4

    def run(device: PtxDevice) -> list[Launch]:
        x = np.random.default_rng(0).standard_normal((batch, channels, side, side)).astype(np.float32)
        array = ptxsim.bf16(x) if dtype == BF16 else x
        pad = kernel // 2
        geometry = [((kernel, kernel), (1, 1), (pad, pad), (1, 1), (side, side), 1, 0)]
        strides = (channels * side * side, side * side, side, 1)
        return _factor_update(device, array, dtype, x.shape, strides, geometry, n, False)

    name = f"conv {kernel}×{kernel}, {batch}×{channels}×{side}×{side}, {'bf16' if dtype == BF16 else 'f32'}"
    minimum = batch * channels * side * side * width + 4 * (n * (n + 1) // 2 + n * n)
    return Case("factor_update", name, run, minimum)


def _factor_update(
    device: PtxDevice, x: np.ndarray, dtype: int, shape: tuple, strides: tuple, convs: list, n: int, bias: bool
) -> list[Launch]:
    plan = _C.Plan([n])
    views = _C.TensorViews([(device.put(x, "X"), dtype, 1 << 32, shape, strides)])
    half, one = (device.put(np.full(1, value, np.float32), "coefficient") for value in (0.5, 1.0))
    out = device.put(np.zeros(1, np.float32), "trace"), device.put(np.zeros(1, np.int32), "nonfinite")
    factors = device.put(np.zeros(plan.numel, np.float32), "C")
    return device.run(
        "factor_update",
        lambda table, call: table.factor_update(call, plan, F32, factors, views, convs, [bias], [], half, one, *out),
    )


def damped_inverse(sizes: list[int], name: str) -> Case:
    def run(device: PtxDevice) -> list[Launch]:
        plan = _C.Plan(sizes)
        blocks = np.zeros(plan.numel, np.float32)
        for n, at in zip(sizes, plan.offsets, strict=True):
            blocks[at : at + n * n] = np.eye(n, dtype=np.float32).ravel()
        damping = device.put(np.full(len(sizes), 0.5, np.float32), "damping")
        pointers = device.put(blocks, "C"), damping, device.put(np.zeros_like(blocks), "inverse")
        info = device.put(np.zeros(len(sizes), np.int32), "info")
        return device.run(
            "damped_inverse",
            lambda table, call: table.damped_inverse(call, plan, F32, *pointers, info, False, True),
        )

    return Case("damped_inverse", name, run, sum(4 * (n * (n + 1) // 2 + n * n) for n in sizes))


def precondition(shapes: list[tuple[int, int]], name: str) -> Case:
    def run(device: PtxDevice) -> list[Launch]:
        rows, columns = [r for r, _ in shapes], [c for _, c in shapes]
        g_plan, a_plan = _C.Plan(rows), _C.Plan(columns)
        inverses = [device.put(np.ones(p.numel, np.float32), key) for p, key in ((g_plan, "G"), (a_plan, "A"))]
        views = [
            _C.TensorViews(
                [
                    (device.put(np.ones((r, c - 1), np.float32), key), F32, 1 << 32, (r, c - 1), (c - 1, 1))
                    for r, c in shapes
                ]
            )
            for key in ("V", "U")
        ]
        biases = [
            _C.TensorViews([(device.put(np.ones(r, np.float32), key), F32, 1 << 32, (r,), (1,)) for r in rows])
            for key in ("bias of V", "bias of U")
        ]
        dot = device.put(np.zeros(len(shapes), np.float32), "dot")
        index = list(range(len(shapes)))
        return device.run(
            "precondition",
            lambda table, call: table.precondition(
                call, g_plan, a_plan, F32, *inverses, views[0], biases[0], views[1], biases[1], index, dot
            ),
        )

    return Case("precondition", name, run, sum(4 * (2 * r * c + r * r + c * c) for r, c in shapes))


def commit(sizes: list[int], name: str) -> Case:
    def run(device: PtxDevice) -> list[Launch]:
        plan = _C.Plan(sizes)
        buffers = [device.put(np.ones(plan.numel, np.float32), key) for key in ("C", "S")]
        numbers = [device.put(np.ones(len(sizes), np.float32), "coefficient") for _ in range(2)]
        gate = device.put(np.ones(1, np.int32), "gate")
        trace = device.put(np.zeros(len(sizes), np.float32), "trace")
        return device.run("commit", lambda table, call: table.commit(call, plan, F32, *buffers, *numbers, gate, trace))

    return Case("commit", name, run, sum(16 * n * n for n in sizes))


CASES = [
    factor_update(256, 257, F32),
    factor_update(8192, 65, F32),
    factor_update(8192, 257, F32),
    factor_update(8192, 513, F32),
    factor_update(8192, 65, BF16),
    factor_update(8192, 257, BF16),
    factor_update(8192, 513, BF16),
    factor_update(1024, 255, F32),  # rows that are not whole vectors
    convolution(8, 16, 16, 3, F32),
    convolution(8, 16, 16, 3, BF16),
    damped_inverse([8] * 256, "256 × 8²"),
    damped_inverse([16] * 128, "128 × 16²"),
    damped_inverse([32] * 64, "64 × 32²"),
    damped_inverse([64] * 16, "16 × 64²"),
    damped_inverse([128] * 8, "8 × 128²"),
    damped_inverse([240] * 2, "2 × 240²"),
    damped_inverse([512], "1 × 512²"),
    precondition([(32, 33)] * 16, "16 × (32 × 33)"),
    precondition([(256, 257)], "256 × 257"),
    precondition([(512, 513)], "512 × 513"),
    commit([64] * 8 + [300], "8 × 64², 300²"),
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
    cmake = [sys.executable, "-m", "cmake"]
    for step in (
        ["-S", ROOT / "tests" / "simt", "-B", args.build, "-G", "Ninja"],
        ["--build", args.build, "--target", "kfac_fast_simt"],
    ):
        subprocess.run([*cmake, *map(str, step)], check=True, stdout=subprocess.DEVNULL)
    device = PtxDevice(args.build / "libkfac_fast_simt.so", args.arch)
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
