"""A device whose kernels are nvcc's PTX, run on the CPU by a simulator that reports races, stray accesses and
uninitialised reads, and counts what kernels do.

The library's own launchers run: built as C++ (exports.cpp) they hand every launch, copy and fill to `PtxDevice`. The
simulator lives beside the repository; `ptxsim` is None where it is not.
"""

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
CUDA = ROOT / "csrc" / "cuda"
_PTXSIM = ROOT.parent / "shared" / "tools" / "ptxsim"

ptxsim: Any = None
if (_PTXSIM / "ptxsim.py").exists():
    sys.path.insert(0, str(_PTXSIM))
    import ptxsim  # type: ignore[no-redef]

F32, F64, F16, BF16 = range(4)  # DType in csrc/ops.h
LAUNCH_FAILURE = 719
Operation = Callable[[_C.OpTable, _C.Call], None]


@dataclass
class Launch:
    """One launch that has run."""

    kernel: str
    grid: int
    threads: int
    shared_bytes: int
    result: Any = None  # ptxsim.Result; None where launches are only recorded
    blocks: list[tuple[dict[str, int], int]] = field(default_factory=list)  # instructions by class, times executed


class PtxDevice:
    """Runs operations of the CUDA op table in the simulator."""

    def __init__(self, library: Path, arch: str = "sm_80") -> None:
        self.arch = arch
        self.launches: list[Launch] = []
        self.options: dict[str, Any] = {}  # of ptxsim's launch()
        self.dry = False  # record launches without running them
        self._library = ctypes.CDLL(str(library))
        self._library.simt_table.restype = ctypes.c_void_p
        self._kernels = _symbols(library, ctypes.cast(self._library.simt_table, ctypes.c_void_p).value)
        self.table = _C.table_at(self._library.simt_table())
        self._modules: dict[str, Any] = {}
        self._buffers: dict[int, Any] = {}
        self._module: Any = None
        self._error: Exception | None = None
        void, u64 = ctypes.c_void_p, ctypes.c_uint64
        self._callbacks = (  # kept: the library calls them
            ctypes.CFUNCTYPE(
                ctypes.c_int,
                void,
                ctypes.c_uint,
                ctypes.c_uint,
                u64,
                ctypes.POINTER(void),
                ctypes.POINTER(u64),
                ctypes.c_int,
            )(self._launch),
            ctypes.CFUNCTYPE(ctypes.c_int, void, void, u64)(self._copy),
            ctypes.CFUNCTYPE(ctypes.c_int, void, ctypes.c_int, u64)(self._fill),
        )
        self.set_shared_memory(SHARED_BYTES[arch])

    def set_shared_memory(self, limit: int) -> None:
        """What a block may have at most; decides between the classes of damped_inverse."""
        self._library.simt_device(limit, 132, int(self.arch.removeprefix("sm_")))

    def put(self, array: np.ndarray, name: str, uninitialised: bool = False) -> int:
        """Device address of an array; kernels work on it in place."""
        buffer = ptxsim.Buf(array, name=name, uninit=uninitialised)
        address = self._module_of("commit").ptr(buffer)
        self._buffers[address >> ptxsim.ABITS] = buffer
        buffer.keep = True
        return address

    def run(self, op: str, operation: Operation, seed: int = 0) -> list[Launch]:
        """Runs `operation` on the op table; `op` names the source of its kernels. Fails on all that is reported."""
        self.launches, self._error = [], None
        self._module = self._module_of(op)
        self._seed = seed
        workspaces = []

        def allocate(workspace_bytes: int, staging_bytes: int) -> tuple[int, int]:
            staging = np.zeros(staging_bytes + 256, np.uint8)
            workspaces.append(staging)
            at = (staging.ctypes.data + 255) // 256 * 256
            return self.put(np.zeros(workspace_bytes, np.uint8), "workspace", uninitialised=True), at

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
        for buffer in self._buffers.values():
            ptxsim.REG.remove(buffer)
        self._buffers.clear()

    def _module_of(self, op: str) -> Any:
        if op not in self._modules:
            module = ptxsim.compile(str(CUDA / f"{op}.cu"), arch=self.arch, include_dirs=[str(CUDA)])
            self._modules[op] = module, {readable_name(name): mangled for name, mangled in module.kernels}
        return self._modules[op][0]

    def _launch(self, function, grid, threads, shared_bytes, parameters, sizes, count) -> int:  # type: ignore[no-untyped-def]
        try:
            kernel = self._kernels[function]
            arguments = [ctypes.string_at(parameters[i], sizes[i]) for i in range(count)]
            launch = Launch(kernel, grid, threads, shared_bytes)
            self.launches.append(launch)
            if self.dry:
                return 0
            mangled = next(names for module, names in self._modules.values() if module is self._module)[kernel]
            launch.result = self._module.launch(
                mangled,
                grid=grid,
                block=threads,
                args=arguments,
                shared_bytes=shared_bytes,
                seed=self._seed,
                **self.options,
            )
            traced = self._module.kernel(mangled)
            executed = traced.load(True)[1]
            launch.blocks = [(block, executed[i]) for i, block in enumerate(traced.g.bbs) if executed[i]]
            assert launch.result.ok, f"{kernel}: {launch.result.report()}"
            assert not launch.result.warnings, f"{kernel}: {launch.result.report()}"
        except Exception as error:  # a callback must not raise
            self._error = self._error or error
            return LAUNCH_FAILURE
        return 0

    def _copy(self, to: int, source: int, size: int) -> int:
        buffer, at = self._find(to, size)
        ctypes.memmove(buffer.host + at, source, size)
        return 0

    def _fill(self, to: int, value: int, size: int) -> int:
        buffer, at = self._find(to, size)
        ctypes.memset(buffer.host + at, value, size)
        return 0

    def _find(self, address: int, size: int) -> tuple[Any, int]:
        buffer, at = self._buffers[address >> ptxsim.ABITS], address & ((1 << ptxsim.ABITS) - 1)
        assert at + size <= buffer.size
        if buffer.init is not None:
            buffer.init[at : at + size] = 1
        return buffer, at


def _symbols(library: Path, address_of_simt_table: int | None) -> dict[int, str]:
    """Names of the library's functions by address, in the form of `readable_name`. Kernels are not exported."""
    listing = subprocess.run(["nm", "-C", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    entries = [line.split(" ", 2) for line in listing.splitlines()]
    base = (address_of_simt_table or 0) - next(int(value, 16) for value, _, name in entries if name == "simt_table")
    return {base + int(value, 16): readable_name(name) for value, kind, name in entries if kind in "tTwW"}
