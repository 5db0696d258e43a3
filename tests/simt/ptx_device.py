"""A device whose kernels are nvcc's PTX, run on the CPU by a simulator that reports races, stray accesses and
uninitialised reads, and counts what kernels do. It lives beside the repository; `ptxsim` is None where it is not.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from check_resources import readable_name
from launches import ROOT, Launch, Operation, Recorder

_CUDA = ROOT / "csrc" / "cuda"
_PTXSIM = ROOT.parent / "shared" / "tools" / "ptxsim"

ptxsim: Any = None
if (_PTXSIM / "ptxsim.py").exists():
    sys.path.insert(0, str(_PTXSIM))
    import ptxsim  # type: ignore[no-redef]


class PtxDevice(Recorder):
    """Runs operations of the CUDA op table in the simulator. Fails on everything that it reports."""

    def __init__(self, path: Path, arch: str = "sm_80") -> None:
        super().__init__(path, arch)
        self._modules: dict[str, tuple[Any, dict[str, str]]] = {}
        self._buffers: dict[int, Any] = {}

    def put(self, array: np.ndarray, name: str, uninitialised: bool = False) -> int:
        """Device address of an array; kernels work on it in place."""
        buffer = ptxsim.Buf(array, name=name, uninit=uninitialised)
        address = ptxsim.REG.add(buffer).addr()
        self._buffers[address >> ptxsim.ABITS] = buffer
        return address

    def array(self, count: int, dtype: Any, name: str, values: Callable[[], np.ndarray] | None = None) -> int:
        return self.put(np.zeros(count, dtype) if values is None else values(), name)

    def run(self, op: str, operation: Operation, seed: int = 0) -> list[Launch]:
        if op not in self._modules:
            module = ptxsim.compile(str(_CUDA / f"{op}.cu"), arch=self.arch, include_dirs=[str(_CUDA)])
            self._modules[op] = module, {readable_name(name): mangled for name, mangled in module.kernels}
        self._module, self._mangled = self._modules[op]
        self._seed = seed
        return super().run(op, operation)

    def release(self) -> None:
        for buffer in self._buffers.values():
            ptxsim.REG.remove(buffer)
        self._buffers.clear()

    def _workspace(self, size: int) -> int:
        return self.put(np.zeros(size, np.uint8), "workspace", uninitialised=True)

    def _execute(self, launch: Launch, arguments: list[bytes]) -> None:
        mangled = self._mangled[launch.kernel]
        shape = {"grid": launch.grid, "block": launch.threads, "shared_bytes": launch.shared_bytes}
        launch.result = self._module.launch(mangled, args=arguments, seed=self._seed, **shape)
        traced = self._module.kernel(mangled)
        executed = traced.load(True)[1]
        launch.blocks = [(block, executed[i]) for i, block in enumerate(traced.g.bbs) if executed[i]]
        if launch.result.errors or launch.result.warnings:
            raise AssertionError(f"{launch.kernel}: {launch.result.report()}")

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
