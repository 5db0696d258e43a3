"""Compiles the CUDA kernels for the given architectures and fails on register spills and stack frames.

    python check_resources.py sm_80 sm_90        # or: all
    python check_resources.py --jobs 2 all

Prints registers and occupancy per kernel. Occupancy counts registers and threads only: dynamic shared memory depends on
the block sizes of a call.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
WARPS_PER_SM = {"sm_75": 32, "sm_80": 64, "sm_86": 48, "sm_89": 48, "sm_90": 64, "sm_100": 64, "sm_120": 48}
REGISTERS_PER_SM = 65536
# Dynamic shared memory that a block may have, in bytes (CUDA programming guide, technical specifications).
SHARED_BYTES = dict.fromkeys(ARCHITECTURES, 227 << 10)
SHARED_BYTES |= {"sm_75": 64 << 10, "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_120": 99 << 10}

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+?)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
LAUNCH_BOUNDS = re.compile(r"\.entry (?P<name>\w+)\(.*?\.maxntid (?P<threads>\d+)", re.DOTALL)


def readable_name(demangled: str) -> str:
    """Kernel name with its template arguments, without namespaces and parameters."""
    return (
        demangled.replace("(anonymous namespace)::", "")
        .replace("> >", ">>")
        .replace("kfac_fast::", "")
        .removeprefix("void ")
        .split("(")[0]
    )


def demangle(name: str) -> str:
    return readable_name(subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip())


def inspect(source: Path, arch: str) -> list[dict]:
    """What ptxas says about each kernel of a source."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", f"-arch={arch}", str(source), "-Xptxas", "-v"]
        command += ["-cubin", "-o", f"{folder}/out.cubin", "--keep", "--keep-dir", folder]
        ptxas = subprocess.run(command, capture_output=True, text=True)
        if ptxas.returncode != 0:
            raise SystemExit(f"{source.name} does not compile for {arch}:\n{ptxas.stderr}")
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    threads = {m["name"]: int(m["threads"]) for m in LAUNCH_BOUNDS.finditer(ptx)}
    kernels = []
    for match in KERNEL.finditer(ptxas.stderr):
        registers, block = int(match["registers"]), threads[match["name"]]
        # Registers are given out per warp in units of 256.
        per_block = block // 32 * (-(-registers * 32 // 256) * 256)
        blocks = min(REGISTERS_PER_SM // per_block, WARPS_PER_SM[arch] * 32 // block)
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        kernels.append(
            {
                "kernel": demangle(match["name"]),
                "arch": arch,
                "registers": registers,
                "threads": block,
                "shared": int(shared[1]) if shared else 0,
                "occupancy": blocks * block // 32 / WARPS_PER_SM[arch],
                "spilled": int(match["stack"]) + int(match["stores"]) + int(match["loads"]),
            }
        )
    return kernels


def main() -> int:
    """Prints the table; 1 if any kernel spills or has a stack frame."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("architectures", nargs="+", help="such as sm_90, or all")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    architectures = ARCHITECTURES if args.architectures == ["all"] else args.architectures
    if shutil.which("nvcc") is None:
        raise SystemExit("nvcc is not on the path")
    sources = sorted(CUDA.glob("*.cu"))
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(inspect, source, arch) for source in sources for arch in architectures]
        kernels = [kernel for job in jobs for kernel in job.result()]
    print(f"{'kernel':<52} {'arch':<7} {'threads':>7} {'regs':>5} {'smem':>6} {'occupancy':>9}")
    for k in sorted(kernels, key=lambda k: (k["kernel"], architectures.index(k["arch"]))):
        line = f"{k['kernel']:<52} {k['arch']:<7} {k['threads']:>7} {k['registers']:>5} {k['shared']:>6} {k['occupancy']:>9.0%}"
        print(line + (f"  SPILLS OR STACK: {k['spilled']} bytes" if k["spilled"] else ""))
    bad = [k for k in kernels if k["spilled"]]
    print(f"{len(kernels)} kernels, {len(bad)} with spills or a stack frame")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
