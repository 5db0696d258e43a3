"""What the kernels should take on an H100, from what they do: counted by the simulator, not measured.

    python tests/simt/estimate.py            # prints the table
    python tests/simt/estimate.py --write    # into docs/cuda.md

A launch takes LAUNCH plus the longest of: its bytes at the memory's bandwidth; its instructions at one per scheduler and
cycle; its shared-memory wavefronts at one per multiprocessor and cycle; its mma operations; its chain of pivots, for as
many waves of blocks as there are. Instructions and wavefronts of a block are those of the same kernel in a small run;
how many blocks there are is what the launchers say for the large one. Caches, stalls and the overlap of launches are
not modelled, so times are more likely to be longer than shorter.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import generated
from cases import Case, damped_inverse, factor_update, precondition
from check_resources import CUDA, inspect
from launches import BF16, F32, ROOT, TF32, Recorder, contracted, library
from ptx_device import PtxDevice, ptxsim
from resource_table import resident

ARCH = "sm_90"
# H100 SXM, from its data sheet; the clock is the one under load that 66.9 TFLOP/s is not reached at.
SMS, CLOCK, BANDWIDTH = 132, 1.755e9, 3.35e12
# mma instructions reach about this part of the dense rates, which need wgmma (an assumption).
TENSOR = {"mma_tf32": 0.6 * 494.7e12, "mma_bf16": 0.6 * 989e12, "mma_f16": 0.6 * 989e12}
LAUNCH = 3e-6  # one launch after another in a stream (an assumption)
PIVOT_CYCLES = 150  # a shuffle, a reciprocal root and two dependent multiply-adds (an assumption)


@dataclass
class Block:
    """What one block of threads of a kernel does, on average."""

    instructions: float = 0.0  # of warps, register moves apart, a product and its sum as one
    wavefronts: float = 0.0
    tensor: float = 0.0  # seconds of the whole device's tensor cores


@dataclass
class Work:
    """A call to estimate: the large one, a small one of the same kernels, pivots per launch, and what others take."""

    large: Case
    small: Case
    pivots: dict[str, int]
    chains: int = 1  # blocks of threads that have pivots to do, in one launch
    published: str = ""


def blocks_of(case: Case, device: PtxDevice) -> dict[str, Block]:
    totals: dict[str, Block] = defaultdict(Block)
    grids: dict[str, int] = defaultdict(int)
    for launch in case.run(device):
        profile, block = launch.result.profile, totals[launch.kernel]
        grids[launch.kernel] += launch.grid
        executed = (n for key, n in profile.classes.items() if key != "mov" and not key.startswith("mmaflop"))
        pairs = sum(contracted(classes) * n for classes, n in launch.blocks)
        block.instructions += (sum(executed) - pairs) / 32
        block.wavefronts += profile.shared_load["wavefronts"] + profile.shared_store["wavefronts"]
        block.tensor += sum(profile.flops.get(key, 0) / rate for key, rate in TENSOR.items())
    device.release()
    for kernel, block in totals.items():
        grid = grids[kernel]
        totals[kernel] = Block(block.instructions / grid, block.wavefronts / grid, block.tensor / grid)
    return totals


def estimate(work: Work, path: Path, device: PtxDevice, registers: dict[str, int]) -> list[str]:
    blocks = blocks_of(work.small, device)
    launches = work.large.run(Recorder(path, ARCH))
    parts = dict.fromkeys(("issue", "shared", "tensor", "chain"), 0.0)
    total = 0.0
    for launch in launches:
        block = blocks.get(launch.kernel, Block())
        spread = min(launch.grid, SMS)
        at_once = SMS * resident(ARCH, registers[launch.kernel], launch.threads, launch.shared_bytes)
        waves = -(-work.chains // at_once)
        times = {
            "issue": block.instructions * launch.grid / (4 * spread * CLOCK),
            "shared": block.wavefronts * launch.grid / (spread * CLOCK),
            "tensor": block.tensor * launch.grid * SMS / spread,
            "chain": work.pivots.get(launch.kernel, 0) * PIVOT_CYCLES * waves / CLOCK,
        }
        for key, value in times.items():
            parts[key] += value
        total += LAUNCH + max(times.values())
    memory = work.large.minimum / BANDWIDTH
    total = max(total, LAUNCH * len(launches) + memory)
    cells = [f"{seconds * 1e6:.1f}" for seconds in (LAUNCH * len(launches), memory, *parts.values())]
    return [f"{work.large.op} {work.large.name}", str(len(launches)), *cells, f"**{total * 1e6:.0f}**", work.published]


def works() -> list[Work]:
    block, panel = "damped_inverse_block_kernel<MmaTiles>", "damped_inverse_update_kernel<float, true>"
    cholesky = "{} (cuSOLVER potrfBatched, the factorisation alone)"
    return [
        Work(damped_inverse([32] * 1024), damped_inverse([32] * 4), {"damped_inverse_warp_kernel<float, 32>": 32}, 256),
        Work(damped_inverse([64] * 256), damped_inverse([64]), {block: 64}, 256),
        Work(damped_inverse([128] * 64), damped_inverse([128]), {block: 128}, 64, cholesky.format(174.5)),
        Work(damped_inverse([512] * 64), damped_inverse([512]), {panel: 64}, 64, cholesky.format(1261)),
        Work(damped_inverse([2048] * 64), damped_inverse([512]), {panel: 64}, 64, cholesky.format(22181)),
        *(Work(case, case, {}) for dtype in (F32, TF32, BF16) for case in (factor_update(8192, 513, dtype),)),
        Work(precondition([(512, 513)] * 50), precondition([(512, 513)]), {}),
        Work(precondition([(64, 65)] * 200), precondition([(64, 65)]), {}),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="into docs/cuda.md")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "profile")
    args = parser.parse_args()
    if ptxsim is None:
        raise SystemExit("the PTX simulator is not beside the repository")
    path = library(args.build)
    device = PtxDevice(path, ARCH)
    registers = {k["kernel"]: k["registers"] for source in CUDA.glob("*.cu") for k in inspect(source, ARCH)}
    header = ["µs", "launches", "launching", "memory", "issue", "shared", "tensor", "chain", "estimate", "published"]
    text = generated.markdown(header, [estimate(work, path, device, registers) for work in works()])
    print(text)
    if args.write:
        generated.write("python tests/simt/estimate.py --write", text)


if __name__ == "__main__":
    main()
