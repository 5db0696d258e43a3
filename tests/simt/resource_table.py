"""Registers, shared memory and resident blocks of every CUDA kernel on every architecture.

    python tests/simt/resource_table.py            # all architectures
    python tests/simt/resource_table.py sm_90      # these
    python tests/simt/resource_table.py --write    # all, into docs/cuda.md

Registers are ptxas's; threads and shared memory are what the library's launchers ask for in the calls below.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import generated
from cases import Case, commit, convolution, damped_inverse, factor_update, precondition
from check_resources import ARCHITECTURES, CUDA, WARPS_PER_SM, inspect
from launches import BF16, F16, F32, F64, ROOT, TF32, Recorder, library

# Of a multiprocessor (CUDA programming guide, technical specifications per compute capability).
SHARED_PER_SM = dict.fromkeys(ARCHITECTURES, 228 << 10)
SHARED_PER_SM |= {"sm_75": 64 << 10, "sm_80": 164 << 10, "sm_86": 100 << 10, "sm_89": 100 << 10, "sm_120": 100 << 10}
BLOCKS_PER_SM = dict.fromkeys(ARCHITECTURES, 32) | {"sm_75": 16, "sm_86": 16, "sm_89": 24, "sm_120": 24}
RESERVED = 1 << 10  # shared memory that the system takes of every block, from sm_80 on


def calls() -> list[Case]:
    """Every kernel at least once."""
    cases = [damped_inverse([n] * 4, dtype) for dtype in (F32, F64) for n in (8, 16, 512, *range(32, 305, 16))]
    cases += [
        factor_update(m, n, kind) for kind in (F32, F64, F16, BF16, TF32) for n in (32, 64, 800) for m in (64, 9000)
    ]
    cases += [convolution(8, 16, 16, 3, F32), commit([64]), commit([64], F64)]
    cases += [convolution(64, channels, 32, 3, kind) for kind in (F32, F64, F16, BF16, TF32) for channels in (16, 64)]
    cases += [precondition([(n, n)], dtype) for dtype in (F32, F64) for n in (32, 128, 600)]
    return cases


def launched(device: Recorder) -> dict[str, tuple[int, int, int]]:
    """Per kernel: threads, least and most shared memory."""
    kernels: dict[str, tuple[int, int, int]] = {}
    for case in calls():
        for launch in case.run(device):
            threads, low, high = kernels.get(launch.kernel, (0, launch.shared_bytes, 0))
            most = max(threads, launch.threads), min(low, launch.shared_bytes), max(high, launch.shared_bytes)
            kernels[launch.kernel] = most
    return kernels


def resident(arch: str, registers: int, threads: int, shared: int) -> int:
    """Blocks on a multiprocessor; registers are given out per warp in units of 256."""
    warps = threads // 32
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = SHARED_PER_SM[arch] // (shared + (0 if arch == "sm_75" else RESERVED) or 1)
    return min(by_registers, by_shared, WARPS_PER_SM[arch] // warps, BLOCKS_PER_SM[arch])


def inspected(source: Path, arch: str, folder: Path) -> list[dict]:
    """`inspect`, kept in a folder until a source changes: seven architectures take minutes."""
    sources = sorted([*CUDA.glob("*"), *CUDA.parent.glob("*.h")])
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    kept = folder / f"ptxas-{source.stem}-{arch}-{key}.json"
    if not kept.exists():
        kept.write_text(json.dumps(inspect(source, arch)))
    return json.loads(kept.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="into docs/cuda.md")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "profile")
    args = parser.parse_args()
    path = library(args.build)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(inspected, source, arch, args.build)
            for arch in args.architectures
            for source in sorted(CUDA.glob("*.cu"))
        ]
        found = {(k["kernel"], k["arch"]): k for job in jobs for k in job.result()}
    asked = {arch: launched(Recorder(path, arch)) for arch in args.architectures}
    for k in found.values():
        if k["spilled"]:
            raise SystemExit(f"{k['kernel']} has spills or a stack frame on {k['arch']}")
    rows = []
    for kernel in sorted({kernel for kernel, _ in found}):
        uses = [asked[arch][kernel] for arch in args.architectures if kernel in asked[arch]]
        if not uses:
            continue  # none of these architectures is given it
        low, high = min(use[1] for use in uses), max(use[2] for use in uses)
        kib = " – ".join(f"{bytes_ / 1024:.1f}" for bytes_ in dict.fromkeys((low, high)))
        row = [f"`{kernel}`", str(max(use[0] for use in uses)), kib]
        for arch in args.architectures:
            k = found[kernel, arch]
            if kernel not in asked[arch]:
                row.append("–")  # the launchers never choose it there
                continue
            threads, _, shared = asked[arch][kernel]
            row.append(f"{k['registers']} · {resident(arch, k['registers'], threads, shared)}")
        rows.append(row)
    text = generated.markdown(["kernel", "threads", "shared, KiB", *args.architectures], rows)
    text += f"\n\n{len(rows)} kernels; no spills and no stack frames on {', '.join(args.architectures)}."
    print(text)
    if args.write:
        generated.write("python tests/simt/resource_table.py --write", text)


if __name__ == "__main__":
    main()
