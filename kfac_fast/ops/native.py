"""The bridge to the compiled kernels: which table runs, with what memory, on which stream.

The only file that reads addresses of tensors, and beside ``csrc/bindings.cpp`` the only one that knows devices.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import reference
from .blocks import BlockDiagonal
from .rows import PADDING_MODES, ConvRows

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # DType in csrc/ops.h
_TF32 = 4  # of factor updates: float32 whose products may be TF32
_DLPACK_DEVICES = {"cpu": 1, "cuda": 2}
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_ALIGNMENT = 256  # of a workspace, csrc/ops.h


# ---- tensors → views ------------------------------------------------------------------------------------------------


def _exchange_api() -> int:
    """Address of torch's DLPack exchange table, or 0 before torch had one."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return 0
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return get(capsule, b"dlpack_exchange_api")


_EXCHANGE_API = _exchange_api()


def device_code(device: torch.device) -> int:
    return _DLPACK_DEVICES.get(device.type, 0) << 32 | (device.index or 0)


def is_plain(tensor: Tensor) -> bool:
    """Whether the memory of this tensor is what it says: not a DTensor, fake or functorch-wrapped tensor."""
    return type(
        tensor
    ).__torch_dispatch__ is Tensor.__torch_dispatch__ and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a.numel() > 0 and a.data_ptr() == b.data_ptr()


def view_tensors(tensors: list[Any]) -> _C.TensorViews:
    """Addresses, shapes, strides and types of many tensors at once."""
    if _EXCHANGE_API:
        return _C.TensorViews(tensors, _EXCHANGE_API, _PLAIN_TYPES)
    return _C.TensorViews([_describe(tensor) for tensor in tensors])


def _describe(tensor: Any) -> tuple[int, int, int, tuple[int, ...], tuple[int, ...]]:
    if type(tensor) not in _PLAIN_TYPES or tensor.layout != torch.strided or not is_plain(tensor):
        return 0, -1, 0, (), ()
    code = DTYPE_CODES.get(tensor.dtype, -1)
    return tensor.data_ptr(), code, device_code(tensor.device), tuple(tensor.shape), tensor.stride()


# ---- tables and memory ----------------------------------------------------------------------------------------------

cpu_table: _C.OpTable = _C.cpu_tables()[0]
cuda_table: _C.OpTable | None = _C.cuda_table() if _C.cuda_architectures else None


def table_for(device: torch.device) -> _C.OpTable:
    """The kernels that run where the tensors are.

    Raises:
        ValueError: No kernels for this device in this build.
    """
    if device.type == "cpu":
        return cpu_table
    if device.type == "cuda" and cuda_table is not None:
        return cuda_table
    hint = "; reinstall with KFAC_FAST_CUDA=ON" if device.type == "cuda" else ""
    raise ValueError(f"this build of kfac_fast has no kernels for device {device}{hint}")


class _Scratch(threading.local):
    """Workspace that is kept between calls, one per thread: ops of two threads run at the same time."""

    def __init__(self) -> None:
        self.host = torch.empty(0, dtype=torch.uint8)
        # Page-locked staging and the event after which its content has been read; a ring, oldest first.
        self.staging: deque[tuple[torch.cuda.Event, Tensor]] = deque()


_scratch = _Scratch()


def _aligned(buffer: Tensor) -> int:
    return (buffer.data_ptr() + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def _allocate_on_cpu(workspace_bytes: int, staging_bytes: int) -> tuple[int, int]:
    if _scratch.host.numel() < workspace_bytes + staging_bytes + 2 * _ALIGNMENT:
        _scratch.host = torch.empty(workspace_bytes + staging_bytes + 2 * _ALIGNMENT, dtype=torch.uint8)
    workspace = _aligned(_scratch.host)
    # Only the simulated CUDA backend of the tests has staging memory on the CPU.
    return workspace, workspace + (workspace_bytes + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def _run(device: torch.device, launch: Callable[[_C.OpTable, _C.Call], None]) -> None:
    table = table_for(device)
    if table is not cuda_table:
        launch(table, _C.Call(_allocate_on_cpu, torch.get_num_threads(), 0, 0))
    else:
        _run_on_cuda(table, device, launch)


def _run_on_cuda(table: _C.OpTable, device: torch.device, launch: Callable[[_C.OpTable, _C.Call], None]) -> None:
    stream = torch.cuda.current_stream(device)
    held: list[Tensor] = []

    def allocate(workspace_bytes: int, staging_bytes: int) -> tuple[int, int]:
        # Stream-ordered: the caching allocator gives this memory only to later work of the same stream.
        held.append(torch.empty(workspace_bytes + _ALIGNMENT, dtype=torch.uint8, device=device))
        held.append(_take_staging(staging_bytes))
        return _aligned(held[0]), held[1].data_ptr()

    launch(table, _C.Call(allocate, 1, stream.cuda_stream, stream.device_index))
    if len(held) == 2:
        if torch.cuda.is_current_stream_capturing():
            _kept_by_graphs.append(held[1])  # a replay reads the tables again
        else:
            event = torch.cuda.Event()
            event.record(stream)
            _scratch.staging.append((event, held[1]))


_kept_by_graphs: list[Tensor] = []


def _take_staging(size: int) -> Tensor:
    ring = _scratch.staging
    if ring and not torch.cuda.is_current_stream_capturing() and ring[0][0].query():
        buffer = ring.popleft()[1]
        if buffer.numel() >= size:
            return buffer
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def reading_is_free(device: torch.device) -> bool:
    """Whether the host can read a tensor there without waiting for work that is queued."""
    return device.type == "cpu"


def read_if_free(flag: Tensor) -> bool | None:
    """The value of a 0-d bool tensor where reading it does not make the host wait, else None."""
    return bool(flag) if reading_is_free(flag.device) else None


def _update_code(dtype: torch.dtype) -> int:
    """Of factors of this type, with torch's permission to multiply float32 numbers as TF32."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return _TF32 if allowed and dtype == torch.float32 else DTYPE_CODES[dtype]


# ---- ops ------------------------------------------------------------------------------------------------------------


def factor_update_(
    factors: BlockDiagonal,
    rows: Sequence[Tensor | ConvRows],
    views: _C.TensorViews,
    decay: Tensor,
    scale: Tensor,
    bias: list[bool],
    weights: list[Tensor | None],
) -> tuple[Tensor, Tensor]:
    convs = [_geometry(row) if isinstance(row, ConvRows) else None for row in rows]
    weight_pointers = (
        [] if not any(w is not None for w in weights) else [0 if w is None else w.data_ptr() for w in weights]
    )
    trace = factors.data.new_empty(len(factors))
    nonfinite = torch.empty(len(factors), dtype=torch.int32, device=factors.device)
    _run(
        factors.device,
        lambda table, call: table.factor_update(
            call, factors.plan, _update_code(factors.dtype), factors.data.data_ptr(), views, convs, bias,
            weight_pointers, decay.data_ptr(), scale.data_ptr(), trace.data_ptr(), nonfinite.data_ptr(),
        ),
    )  # fmt: skip
    return trace, nonfinite


def _geometry(row: ConvRows) -> tuple[Any, ...]:
    before = [pair[0] for pair in row.padding]
    mode = PADDING_MODES.index(row.padding_mode)
    return row.kernel, row.stride, before, row.dilation, row.out, row.groups, mode


def commit_(factors: BlockDiagonal, pending: BlockDiagonal, decay: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    trace = factors.data.new_empty(len(factors))
    _run(
        factors.device,
        lambda table, call: table.commit(
            call, factors.plan, DTYPE_CODES[factors.dtype], factors.data.data_ptr(), pending.data.data_ptr(),
            decay.data_ptr(), scale.data_ptr(), gate.data_ptr(), trace.data_ptr(),
        ),
    )  # fmt: skip
    return trace


def damped_inverse(
    blocks: BlockDiagonal,
    damping: Tensor,
    out: BlockDiagonal,
    info: Tensor,
    *,
    retry_failed: bool,
    nan_on_failure: bool,
) -> None:
    limit = table_for(blocks.device).max_inverse_size
    if blocks.plan.max_size > limit:
        # Past the crossover torch's library is faster, and above all there: see docs/performance.md.
        for i in (i for i, n in enumerate(blocks.sizes) if n > limit):
            before = info[i].clone()
            keep = out[i].clone() if retry_failed else None
            reference.inverse_with_library(blocks[i], damping[i], out[i], info[i], nan_on_failure=nan_on_failure)
            if keep is not None:  # masked rather than skipped: the host does not look at `info`
                out[i].copy_(torch.where(before != 0, out[i], keep))
                info[i].copy_(torch.where(before != 0, info[i], before))
    _run(
        blocks.device,
        lambda table, call: table.damped_inverse(
            call, blocks.plan, DTYPE_CODES[blocks.dtype], blocks.data.data_ptr(), damping.data_ptr(),
            out.data.data_ptr(), info.data_ptr(), retry_failed, nan_on_failure,
        ),
    )  # fmt: skip


class GradientViews:
    """A list of gradients taken apart: weights, biases, and views of both."""

    __slots__ = ("bias_of", "bias_views", "biases", "weight_views", "weights")

    def __init__(self, gradients: Sequence[reference.Gradient]) -> None:
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []
        self.bias_of: list[int] = []  # for every weight the position of its bias, or -1
        for gradient in gradients:
            weight, bias = gradient if isinstance(gradient, tuple) else (gradient, None)
            self.weights.append(weight)
            self.bias_of.append(-1 if bias is None else len(self.biases))
            if bias is not None:
                self.biases.append(bias)
        self.weight_views = view_tensors(self.weights)
        self.bias_views = view_tensors(self.biases)


def precondition(
    grads: GradientViews, g_inverse: BlockDiagonal, a_inverse: BlockDiagonal, out: GradientViews
) -> Tensor:
    views, out_views = grads.weight_views, out.weight_views
    copies = None
    # A channels-last convolution's columns are not in memory order.
    if not views.trailing_dimensions_collapse:
        flat = [w.reshape(w.shape[0], -1) for w in grads.weights]
        views = view_tensors(flat)
    if not out_views.trailing_dimensions_collapse:
        copies = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in out.weights]
        out_views = view_tensors(copies)
    dot = g_inverse.data.new_empty(len(g_inverse))
    _run(
        g_inverse.device,
        lambda table, call: table.precondition(
            call, g_inverse.plan, a_inverse.plan, DTYPE_CODES[g_inverse.dtype], g_inverse.data.data_ptr(),
            a_inverse.data.data_ptr(), views, grads.bias_views, out_views, out.bias_views, grads.bias_of,
            dot.data_ptr(),
        ),
    )  # fmt: skip
    if copies is not None:
        torch._foreach_copy_(out.weights, copies)
    return dot
