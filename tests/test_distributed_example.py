"""examples/ddp, started as its first lines say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "examples/ddp/train.py"


def scores(command: list[str], checkpoint: Path, epochs: int) -> list[float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    options = ["--checkpoint", str(checkpoint), "--epochs", str(epochs)]
    ran = subprocess.run(
        [sys.executable, *command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return [float(score) for score in re.findall(r"([\d.]+) % of test digits", ran.stdout)]


def test_two_ranks_save_what_one_process_resumes(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    first = scores([*torchrun, SCRIPT], tmp_path / "run.pt", epochs=2)
    assert len(first) == 2
    assert first[-1] > 94
    (resumed,) = scores([SCRIPT], tmp_path / "run.pt", epochs=1)
    assert resumed > 94
