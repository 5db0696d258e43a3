"""What the library's own launchers launch: built as C++ (exports.cpp) they hand over every launch, copy and fill."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from check_resources import SHARED_BYTES, readable_name

from kfac_fast import _C

ROOT = Path(__file__).resolve().parents[2]
F32, F64, F16, BF16, TF32 = range(5)  # DType in csrc/ops.h
LAUNCH_FAILURE = 719
Operation = Callable[[_C.OpTable, _C.Call], None]


@dataclass
class Launch:
    """One launch: what the launcher asked for, and, where it was run, what came of it."""

    kernel: str
    grid: int
    threads: int
    shared_bytes: int
    result: Any = None  # ptxsim.Result
    blocks: list[tuple[dict[str, int], int]] = field(default_factory=list)  # instructions by class, times executed


def library(build: Path) -> Path:
    """Builds the launchers."""
    for step in (
        ["-S", ROOT / "tests" / "simt", "-B", build, "-G", "Ninja"],
        ["--build", build, "-t", "kfac_fast_simt"],
    ):
        subprocess.run([sys.executable, "-m", "cmake", *map(str, step)], check=True, stdout=subprocess.DEVNULL)
    return build / "libkfac_fast_simt.so"


def contracted(block: dict[str, int]) -> int:
    """Pairs of a product and a sum in a basic block that ptxas makes one multiply-add of: PTX that subtracts a product
    comes as two instructions."""
    return sum(min(block.get(f"fmul{bits}", 0), block.get(f"fadd{bits}", 0)) for bits in (32, 64))


class Recorder:
    """A device that notes launches and runs nothing; its addresses have no memory behind them."""

    def __init__(self, path: Path, arch: str) -> None:
        self.arch = arch
        self.launches: list[Launch] = []
        self._library = ctypes.CDLL(str(path))
        self._library.simt_table.restype = ctypes.c_void_p
        self._kernels = _symbols(path, ctypes.cast(self._library.simt_table, ctypes.c_void_p).value or 0)
        self.table = _C.table_at(self._library.simt_table())
        self._error: Exception | None = None
        self._next = 1
        void, u32, u64 = ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint64
        arrays = ctypes.POINTER(void), ctypes.POINTER(u64)
        self._callbacks = (  # kept: the library calls them
            ctypes.CFUNCTYPE(ctypes.c_int, void, u32, u32, u64, *arrays, ctypes.c_int)(self._launch),
            ctypes.CFUNCTYPE(ctypes.c_int, void, void, u64)(self._copy),
            ctypes.CFUNCTYPE(ctypes.c_int, void, ctypes.c_int, u64)(self._fill),
        )
        self.set_shared_memory(SHARED_BYTES[arch])

    def set_shared_memory(self, limit: int) -> None:
        """What a block may have at most; decides between the classes of damped_inverse."""
        self._library.simt_device(limit, 132, int(self.arch.removeprefix("sm_")))

    def array(self, count: int, dtype: Any, name: str, values: Callable[[], np.ndarray] | None = None) -> int:
        """Device address of an array with these values, or zeros."""
        self._next += 1
        return self._next << 36

    def run(self, op: str, operation: Operation) -> list[Launch]:
        """Calls `operation` with the op table; `op` names the source of its kernels."""
        self.launches, self._error = [], None
        kept = []

        def allocate(workspace_bytes: int, staging_bytes: int) -> tuple[int, int]:
            kept.append(np.zeros(staging_bytes + 256, np.uint8))
            return self._workspace(workspace_bytes), (kept[0].ctypes.data + 255) // 256 * 256

        self._library.simt_use_device(*self._callbacks)
        try:
            operation(self.table, _C.Call(allocate, 1, 0, 0))
        except RuntimeError as error:
            raise self._error or error from None
        finally:
            self._library.simt_use_device(None, None, None)
        return self.launches

    def release(self) -> None:
        """Forgets all arrays."""

    def _workspace(self, size: int) -> int:
        return self.array(size, np.uint8, "workspace")

    def _execute(self, launch: Launch, arguments: list[bytes]) -> None:
        pass

    def _launch(self, function, grid, threads, shared_bytes, parameters, sizes, count) -> int:  # type: ignore[no-untyped-def]
        try:
            launch = Launch(self._kernels[function], grid, threads, shared_bytes)
            self.launches.append(launch)
            self._execute(launch, [ctypes.string_at(parameters[i], sizes[i]) for i in range(count)])
        except Exception as error:  # a callback must not raise
            self._error = self._error or error
            return LAUNCH_FAILURE
        return 0

    def _copy(self, to: int, source: int, size: int) -> int:
        return 0

    def _fill(self, to: int, value: int, size: int) -> int:
        return 0


def _symbols(path: Path, address_of_simt_table: int) -> dict[int, str]:
    """Names of the library's functions by address, in the form of `readable_name`. Kernels are not exported."""
    listing = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    entries = [line.split(" ", 2) for line in listing.splitlines()]
    base = address_of_simt_table - next(int(value, 16) for value, _, name in entries if name == "simt_table")
    return {base + int(value, 16): readable_name(name) for value, kind, name in entries if kind in "tTwW"}
