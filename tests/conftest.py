"""Shared fixtures. The native test programs and the simulated CUDA module are built on first use, by CMake."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kfac_fast import _C, ops
from kfac_fast.ops import native

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("KFAC_FAST_TEST_BUILD", ROOT / "build" / "tests"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also the exhaustive sweeps (make test-full)")


# Modules whose tests run a second time with the CUDA kernels, simulated, in place of the CPU's; `make test` takes one
# test in so many of them.
ON_SIMULATED_CUDA = re.compile(
    "test_(adaptive|approximations|batches|capture|checkpoint|copies|ekfac|failures|fisher|fraction|invariance|layers|"
    "optimizer|statistics|tridiagonal)(_[a-z_]+)?"
)
SAMPLE = 4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if ON_SIMULATED_CUDA.fullmatch(metafunc.module.__name__):
        metafunc.parametrize("kernels", ["own", "simulated-cuda"], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    simulated = [item for item in items if on_simulated_cuda(item)]
    sampled = simulated[::SAMPLE]
    for item in items:
        if "full" in item.keywords or (on_simulated_cuda(item) and item not in sampled):
            item.add_marker(pytest.mark.skip(reason="exhaustive: make test-full"))


def on_simulated_cuda(item: pytest.Item) -> bool:
    return (
        isinstance(item, pytest.Function)
        and getattr(item, "callspec", None) is not None
        and (item.callspec.params.get("kernels") == "simulated-cuda")
    )


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernels that a test's CPU tensors get; only ON_SIMULATED_CUDA has a choice."""
    if getattr(request, "param", "own") == "own":
        yield
        return
    with cpu_table(request.getfixturevalue("simulator").table):
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def build() -> Callable[[str], Path]:
    """Brings a CMake target of tests/ up to date and says where it is."""
    cmake = [sys.executable, "-m", "cmake"] if importlib.util.find_spec("cmake") else ["cmake"]

    def make(target: str) -> Path:
        if not (BUILD / "build.ninja").exists():
            subprocess.run([*cmake, "-S", ROOT / "tests", "-B", BUILD, "-G", "Ninja"], check=True)
        name = Path(target).name
        subprocess.run([*cmake, "--build", BUILD, "--target", name.removeprefix("lib").removesuffix(".so")], check=True)
        return BUILD / target

    return make


class Simulator:
    """The CUDA sources on the CPU: their op table, and the order in which threads run."""

    IN_ORDER, REVERSE, RANDOM = 0, 1, 2

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.simt_table.restype = ctypes.c_void_p
        self._library.simt_launches.restype = ctypes.c_uint64
        self.table = _C.table_at(self._library.simt_table())

    def schedule(self, kind: int, seed: int = 0) -> None:
        self._library.simt_schedule(kind, ctypes.c_uint64(seed))

    def device(self, shared_bytes: int = 232448, multiprocessors: int = 132, capability: int = 90) -> None:
        self._library.simt_device(shared_bytes, multiprocessors, capability)

    def launches(self) -> int:
        return self._library.simt_launches()


@pytest.fixture(scope="session")
def _simulator(build: Callable[[str], Path]) -> Simulator:
    return Simulator(build("simt/libkfac_fast_simt.so"))


@pytest.fixture
def simulator(_simulator: Simulator) -> Simulator:
    """With its default device and random order."""
    _simulator.device()
    _simulator.schedule(Simulator.RANDOM, 1)
    return _simulator


@contextlib.contextmanager
def cpu_table(table: _C.OpTable) -> Iterator[None]:
    """Runs the ops on CPU tensors with another table."""
    previous, native.cpu_table = native.cpu_table, table
    try:
        yield
    finally:
        native.cpu_table = previous


BACKENDS = ["reference", *(table.name for table in _C.cpu_tables()), "simulated-cuda"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every implementation of the ops, one after the other: the same test body runs on all."""
    if request.param == "reference":
        with ops.use_reference():
            yield request.param
        return
    if request.param == "simulated-cuda":
        table = request.getfixturevalue("simulator").table
    else:
        table = next(table for table in _C.cpu_tables() if table.name == request.param)
    with cpu_table(table):
        yield request.param
