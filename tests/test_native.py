"""The native test programs, and what nvcc says about the kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import BUILD

TESTS = Path(__file__).resolve().parent
CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")


def run(*command: object) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=3000)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


def test_cpu_kernels(build: Callable[[str], Path]) -> None:
    assert " passed, 0 failed" in run(build("native/cpu_ops_test"))


def test_cuda_kernels_on_the_cpu_and_the_shim_itself(build: Callable[[str], Path]) -> None:
    assert " passed, 0 failed" in run(build("simt/simt_test"))


@pytest.mark.full
def test_cpu_kernels_at_every_size(build: Callable[[str], Path]) -> None:
    assert " passed, 0 failed" in run(build("native/cpu_ops_test"), "--exhaustive")


@pytest.mark.full
@pytest.mark.parametrize(
    ("folder", "program", "sanitize"),
    [
        ("native", "cpu_ops_test", "address,undefined"),
        ("native", "cpu_ops_test", "thread"),
        ("simt", "simt_test", "ON"),
    ],
)
def test_sanitizers(tmp_path: Path, folder: str, program: str, sanitize: str) -> None:
    output_of(tmp_path, folder, program, f"-DKFAC_FAST_SANITIZE={sanitize}")


@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_sanitizers_on_one_instruction_set(sanitize: str) -> None:
    folder = BUILD / f"sanitize-{sanitize.replace(',', '-')}"
    options = f"-DKFAC_FAST_SANITIZE={sanitize}", "-DKFAC_FAST_BASELINE_ONLY=ON"
    assert "baseline: ok" in output_of(folder, "native", "cpu_ops_test", *options)


@pytest.mark.full
@pytest.mark.skipif(CROSS is None or EMULATOR is None, reason="needs aarch64-linux-gnu-g++ and qemu-aarch64")
def test_cpu_kernels_of_neon_under_emulation(tmp_path: Path) -> None:
    cross = "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CROSS}"
    output = output_of(tmp_path, "native", "cpu_ops_test", *cross, runner=(EMULATOR, "-L", "/usr/aarch64-linux-gnu"))
    assert "neon: ok" in output


def output_of(build: Path, folder: str, program: str, *options: str, runner: tuple[object, ...] = ()) -> str:
    """What a test program built with these options of CMake prints."""
    cmake = [sys.executable, "-m", "cmake"]
    run(*cmake, "-S", TESTS / folder, "-B", build, "-G", "Ninja", *options)
    run(*cmake, "--build", build)
    output = run(*runner, build / program)
    assert " passed, 0 failed" in output
    return output


nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None or os.environ.get("KFAC_FAST_CUDA") == "OFF", reason="needs nvcc (KFAC_FAST_CUDA)"
)


@nvcc
def test_no_spills_and_no_stack_frames_on_two_architectures() -> None:
    run(sys.executable, TESTS / "simt" / "check_resources.py", "--jobs", "2", "sm_75", "sm_90")


@nvcc
@pytest.mark.full
def test_no_spills_and_no_stack_frames_on_any_architecture() -> None:
    run(sys.executable, TESTS / "simt" / "check_resources.py", "--jobs", "2", "all")
