"""Everything that a GPU can say about kfac_fast, in one report: ``make gpu``.

    python tests/gpu/report.py build/gpu-report.md

Without a CUDA device it says so and claims nothing.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import kfac_fast
from kfac_fast import _C

ROOT = Path(__file__).resolve().parents[2]
DEVICE_TESTS = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "tests/gpu"]
# A tool of compute-sanitizer slows kernels down a hundredfold: the ops on their own, not whole trainings.
SANITIZED = [*DEVICE_TESTS, "-k", "inverses or bad_block or factor_updates or natural_gradients"]
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def missing() -> str:
    """What keeps this from running, or nothing."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not _C.cuda_architectures:
        return "kfac_fast was built without CUDA (KFAC_FAST_CUDA=ON builds it)"
    return ""


def machine() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    lines = [f"kfac_fast {kfac_fast.__version__} {commit.strip()}, for {_C.cuda_architectures}"]
    lines.append(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {platform.platform()}")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append(
            f"cuda:{i} {p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {p.total_memory >> 20} MiB"
        )
    return "\n".join(lines)


def section(title: str, command: list[str]) -> tuple[str, bool]:
    """A command's output as a part of the report, and whether it succeeded."""
    print(f"== {title}", flush=True)
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    outcome = "passed" if run.returncode == 0 else f"FAILED with status {run.returncode}"
    print(f"   {outcome}", flush=True)
    return f"## {title}\n\n`{' '.join(command)}`: {outcome}\n\n```\n{run.stdout.strip()}\n```\n", run.returncode == 0


def main() -> int:
    reason = missing()
    if reason:
        print(f"{reason}: nothing was run on a GPU, and nothing is claimed about one")
        return 0
    path = Path(sys.argv[1])
    parts, good = [f"# kfac_fast on a GPU\n\n```\n{machine()}\n```\n"], True
    commands = [("Tests on the device", DEVICE_TESTS)]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        parts.append("compute-sanitizer is not on the path: not run.\n")
    else:
        options = ["--error-exitcode", "1", "--target-processes", "all"]
        commands += [(f"compute-sanitizer {t}", [sanitizer, "--tool", t, *options, *SANITIZED]) for t in TOOLS]
    commands.append(("Benchmarks", [sys.executable, "-m", "bench.cuda"]))
    for title, command in commands:
        text, passed = section(title, command)
        parts.append(text)
        good = good and passed
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts))
    print(f"report: {path}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
