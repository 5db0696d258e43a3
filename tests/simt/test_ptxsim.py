"""The kernels' PTX, run on the CPU by a simulator that reports races, stray accesses and uninitialised reads.

The shim in this directory checks results; this checks how they come about, on what nvcc made of the sources. The
simulator lives beside the repository and these tests are skipped where it is not.
"""

import ctypes
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PTXSIM = ROOT.parent / "shared" / "tools" / "ptxsim"

if not (PTXSIM / "ptxsim.py").exists():
    pytest.skip("the PTX simulator is not beside the repository", allow_module_level=True)
if shutil.which("nvcc") is None:
    pytest.skip("nvcc is not on the path", allow_module_level=True)
sys.path.insert(0, str(PTXSIM))
ptxsim = pytest.importorskip("ptxsim")

# The simulator leaves files for the garbage collector to close.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

CUDA = ROOT / "csrc" / "cuda"
ARCH = "sm_80"
SEEDS = (1, 2)
POINTER, I64, I32 = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int32
F32, F64, F16, BF16 = range(4)
DTYPES = [pytest.param(np.float32, id="f32"), pytest.param(np.float64, id="f64")]


# Mirrors of the structures that the launchers build.
class BlockEntry(ctypes.Structure):
    _fields_ = [("offset", I64), ("size", I32), ("index", I32)]


class InverseArguments(ctypes.Structure):
    _fields_ = [("blocks", POINTER), ("damping", POINTER), ("inverse", POINTER), ("info", POINTER)]
    _fields_ += [("retry_failed", ctypes.c_bool), ("nan_on_failure", ctypes.c_bool)]


class GlobalEntry(ctypes.Structure):
    _fields_ = [("block", BlockEntry), ("scratch", I64), ("tiles", I32)]


class GlobalTables(ctypes.Structure):
    _fields_ = [("entries", POINTER), ("first_panel", POINTER), ("first_update", POINTER), ("first_triangle", POINTER)]
    _fields_ += [("found", POINTER), ("status", POINTER), ("scratch", POINTER), ("count", I32)]


class RowsEntry(ctypes.Structure):
    _fields_ = [("data", POINTER), ("weights", POINTER), ("m", I64), ("row_stride", I64), ("col_stride", I64)]
    _fields_ += [("factor", I64), ("partial", I64), ("chunk_rows", I64), ("d", I32), ("size", I32), ("side", I32)]
    _fields_ += [("tiles", I32), ("chunks", I32), ("conv", I32), ("index", I32), ("dtype", I32)]
    _fields_ += [("bias", ctypes.c_bool), ("along_k", ctypes.c_bool), ("vectors", ctypes.c_bool)]


class Conv(ctypes.Structure):
    _fields_ = [("batch", I64), ("channels", I64), ("size", I64 * 3), ("kernel", I64 * 3), ("stride", I64 * 3)]
    _fields_ += [("pad", I64 * 3), ("dilation", I64 * 3), ("out", I64 * 3), ("batch_stride", I64)]
    _fields_ += [("channel_stride", I64), ("spatial_stride", I64 * 3), ("mode", I32)]


class Matrix(ctypes.Structure):
    _fields_ = [("data", POINTER), ("dtype", I32), ("row_stride", I64), ("col_stride", I64), ("bias", POINTER)]
    _fields_ += [("bias_stride", I64)]


class LayerEntry(ctypes.Structure):
    _fields_ = [("v", Matrix), ("u", Matrix), ("g", I64), ("a", I64), ("intermediate", I64), ("dots", I64)]
    _fields_ += [("rows", I32), ("columns", I32), ("stride", I32), ("row_tiles", I32), ("column_tiles", I32)]
    _fields_ += [("index", I32)]


@pytest.fixture(scope="module")
def compiled():
    """Compiles a source once."""
    modules = {}

    def get(name):
        if name not in modules:
            modules[name] = ptxsim.compile(str(CUDA / name), arch=ARCH, include_dirs=[str(CUDA)])
        return modules[name]

    return get


def table(entries):
    """An array of structures as bytes in device memory."""
    return np.frombuffer(b"".join(bytes(entry) for entry in entries), dtype=np.uint8).copy()


def launch(module, kernel, grid, block, args, shared_bytes, seed):
    """Runs the kernel whose readable name contains `kernel` and fails on anything the simulator has to report."""
    (mangled,) = [mangled for readable, mangled in module.kernels if kernel in readable]
    result = module.launch(mangled, grid=grid, block=block, args=args, shared_bytes=shared_bytes, seed=seed)
    assert result.ok, result.report()
    assert not result.warnings, result.report()


def close(got, expected, dtype, factor=1.0):
    tolerance = factor * (1e-12 if dtype == np.float64 else 3e-5)
    return np.abs(got - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-3)


def plan(sizes):
    """Offsets of the blocks and the length of their buffer, as csrc/plan.cpp lays them out."""
    offsets, numel = [], 0
    for n in sizes:
        offsets.append(numel)
        numel += -(-n * n // 16) * 16
    return offsets, numel


def ceil_div(a, b):
    return -(-a // b)


def lower_pairs(n):
    return n * (n + 1) // 2


def trace(module, name, entries, factors, seed):
    out = ptxsim.Buf(np.zeros(len(entries), factors.dtype), uninit=True)
    launch(
        module, f"trace_kernel<{name}>", len(entries), 128, [table(entries), factors, out], 4 * factors.itemsize, seed
    )
    return out.arr


INVERSE_CASES = {
    "8": [8, 7, 3, 1, 5],
    "16": [16, 9, 12],
    "32": [32, 17, 25, 31, 20],
    "block": [33, 64, 49],
    "block, large": [33, 110],
    "global": [150, 70, 128],
}


def launch_global_class(module, name, arguments, entries, dtype, seed):
    """The launches of damped_inverse's global-memory class."""
    tiles = [ceil_div(entry.size, 64) for entry in entries]
    numel, matrices = 0, []
    for entry, t in zip(entries, tiles, strict=True):
        matrices.append(GlobalEntry(entry, numel, t))
        numel += (lower_pairs(t) + 1 + t) * 64 * 64
    first = [
        np.cumsum([0, *x]).astype(np.int32)
        for x in (tiles, map(lower_pairs, np.array(tiles) - 1), map(lower_pairs, tiles))
    ]
    scratch = ptxsim.Buf(np.zeros(numel, dtype), uninit=True)
    found, status = (ptxsim.Buf(np.zeros(len(entries), np.int32), uninit=True) for _ in range(2))
    pointers = [module.ptr(x) for x in (table(matrices), *first, found, status, scratch)]
    tables = GlobalTables(*pointers, len(entries))
    width = np.dtype(dtype).itemsize
    shared_bytes = width * max(4 * 16 * 68, 64 * 65 + 16 * 16 + 16 * 64) + 16
    launch(
        module, f"damped_inverse_load_kernel<{name}>", int(first[2][-1]), 256, [arguments, tables], shared_bytes, seed
    )
    for step in range(max(tiles)):
        active = sum(t > step for t in tiles)
        for kernel, grid in (("panel", first[0][active]), ("update", active + first[1][active])):
            args = [tables, active, step]
            launch(module, f"damped_inverse_{kernel}_kernel<{name}>", int(grid), 256, args, shared_bytes, seed)
    launch(
        module, f"damped_inverse_store_kernel<{name}>", int(first[2][-1]), 256, [arguments, tables], shared_bytes, seed
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size_class", INVERSE_CASES)
def test_damped_inverse(compiled, size_class, dtype, seed):
    module = compiled("damped_inverse.cu")
    rng = np.random.default_rng(seed)
    sizes = sorted(INVERSE_CASES[size_class], reverse=True)
    offsets, numel = plan(sizes)
    blocks = np.full(numel, np.nan, dtype)
    dense = []
    for n, at in zip(sizes, offsets, strict=True):
        x = rng.standard_normal((n // 2 + 3, n))
        c = (x.T @ x / len(x)).astype(dtype)
        dense.append(c.astype(np.float64))
        blocks[at : at + n * n] = np.where(np.tri(n, dtype=bool), c, np.nan).ravel()  # only the lower triangle is read
    failing = 1
    blocks[offsets[failing]] = -1
    damping = np.full(len(sizes), 0.5, dtype)
    inverse = ptxsim.Buf(np.zeros(numel, dtype), uninit=True)
    info = np.full(len(sizes), -1, np.int32)
    entries = [BlockEntry(at, n, i) for i, (n, at) in enumerate(zip(sizes, offsets, strict=True))]
    arguments = InverseArguments(*(module.ptr(x) for x in (blocks, damping, inverse, info)), False, True)
    name = "double" if dtype == np.float64 else "float"
    width = np.dtype(dtype).itemsize
    if size_class == "global":
        launch_global_class(module, name, arguments, entries, dtype, seed)
    elif size_class.startswith("block"):
        tiles = ceil_div(max(sizes), 16)
        shared_bytes = width * (264 * lower_pairs(tiles) + 256 * (tiles + 1)) + 16
        groups = 1 if max(sizes) <= 96 or dtype == np.float64 else 2
        args = [arguments, table(entries)]
        launch(module, f"damped_inverse_block_kernel<{name}, {groups}>", len(sizes), 128, args, shared_bytes, seed)
    else:
        lanes = int(size_class)
        per_block = 128 // lanes
        shared_bytes = width * per_block * (2 * lanes + lanes * (lanes + 1))
        grid = ceil_div(len(sizes), per_block)
        args = [arguments, table(entries), len(sizes)]
        launch(module, f"damped_inverse_warp_kernel<{name}, {lanes}>", grid, 128, args, shared_bytes, seed)
    module.release()
    assert info.tolist() == [int(i == failing) for i in range(len(sizes))]
    for i, (n, at) in enumerate(zip(sizes, offsets, strict=True)):
        got = inverse.arr[at : at + n * n].reshape(n, n)
        if i == failing:
            assert np.isnan(got).all()
            continue
        assert (got == got.T).all()
        assert close(got, np.linalg.inv(dense[i] + 0.5 * np.eye(n)), dtype)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_commit(compiled, dtype, seed):
    module = compiled("commit.cu")
    rng = np.random.default_rng(seed)
    sizes = [3, 70, 1]
    offsets, numel = plan(sizes)
    factors, pending = rng.standard_normal((2, numel)).astype(dtype)
    expected = [
        (0.5 * factors[a : a + n * n] + 0.25 * pending[a : a + n * n]) for n, a in zip(sizes, offsets, strict=True)
    ]
    decay, scale = np.full(3, 0.5, dtype), np.full(3, 0.25, dtype)
    items = np.cumsum([0] + [ceil_div(n * n, 4096) for n in sizes]).astype(np.int32)
    entries = [BlockEntry(at, n, i) for i, (n, at) in enumerate(zip(sizes, offsets, strict=True))]
    tables = np.array([module.ptr(table(entries)), module.ptr(items)], np.uint64).tobytes()
    name = "double" if dtype == np.float64 else "float"
    args = [tables, 3, factors, pending, decay, scale, np.ones(1, np.int32)]
    launch(module, f"commit_kernel<{name}>", int(items[-1]), 256, args, 0, seed)
    traces = trace(module, name, entries, factors, seed)
    module.release()
    for i, (n, at) in enumerate(zip(sizes, offsets, strict=True)):
        assert close(factors[at : at + n * n], expected[i], dtype)
        assert not pending[at : at + n * n].any()
        assert close(traces[i], np.trace(factors[at : at + n * n].reshape(n, n)), dtype)


def conv_rows(image, kernel):
    """Patches of a [batch, channels, height, width] image with zero padding 1, as rows."""
    padded = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(2, 3))
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, image.shape[1] * kernel * kernel)


def rows_array(values, kind):
    """Values in the type that a kind of kernel reads, and what they have become."""
    if kind == "bf16":
        bits = ptxsim.bf16(values.astype(np.float32))
        return bits, ptxsim.from_bf16(bits).reshape(values.shape)
    array = values.astype({"f64": np.float64, "f16": np.float16}.get(kind, np.float32))
    return array, array


# Operands of the products: the kernel's name, the rows' type code.
FACTOR_KERNELS = {
    "fma": ("factor_update_fma_kernel<float, {}>", F32),
    "f64": ("factor_update_fma_kernel<double, {}>", F64),
    "tf32": ("factor_update_mma_kernel<kfac_fast::Tf32, {}>", F32),
    "f16": ("factor_update_mma_kernel<kfac_fast::Packed<__half>, {}>", F16),
    "bf16": ("factor_update_mma_kernel<kfac_fast::Packed<__nv_bfloat16>, {}>", BF16),
}


@pytest.mark.parametrize("kind", FACTOR_KERNELS)
@pytest.mark.parametrize("side", [32, 64, 128])
@pytest.mark.parametrize("seed", SEEDS[:1])
def test_factor_update(compiled, side, kind, seed):
    if side == 128 and "fma" in FACTOR_KERNELS[kind][0]:
        pytest.skip("this kind uses tiles of 64")
    module = compiled("factor_update.cu")
    rng = np.random.default_rng(seed)
    kernel, code = FACTOR_KERNELS[kind]
    dtype = np.float64 if kind == "f64" else np.float32
    name = "double" if kind == "f64" else "float"
    d = {32: 30, 64: 70, 128: 140}[side]
    plain, x_plain = rows_array(rng.standard_normal((40, d)), kind)
    turned, x_turned = rows_array(rng.standard_normal((d, 20)), kind)
    image, x_image = rows_array(rng.standard_normal((2, d // 9, 4, 5)), kind)
    weights = None if kind in ("f16", "bf16") else rng.uniform(0, 1, 40).astype(dtype)
    conv = Conv(batch=2, channels=d // 9, size=(1, 4, 5), kernel=(1, 3, 3), stride=(1, 1, 1), pad=(0, 1, 1))
    conv.dilation, conv.out, conv.spatial_stride = (1, 1, 1), (1, 4, 5), (20, 5, 1)
    conv.channel_stride, conv.batch_stride = 20, 20 * (d // 9)
    one = np.ones((40, 1))
    root = 1 if weights is None else np.sqrt(weights)[:, None]
    rows = [np.hstack([x_plain, one]) * root, x_turned.T, np.hstack([conv_rows(x_image, 3), one])]
    sources = [(plain, weights, d, 1, -1), (turned, None, 1, 20, -1), (image, None, 0, 0, 0)]
    if "mma" in kernel:  # rows that are read as vectors
        whole, x_whole = rows_array(rng.standard_normal((40, side + 8)), kind)
        rows.append(np.hstack([x_whole, one]) * root)
        sources.append((whole, weights, side + 8, 1, -1))
    sizes = [x.shape[1] for x in rows]
    offsets, numel = plan(sizes)
    chunk = 32
    entries, first, finish, partial = [], [0], [0], 0
    for i, (x, (data, w, row_stride, col_stride, conv_index)) in enumerate(zip(rows, sources, strict=True)):
        tiles, chunks = ceil_div(sizes[i], side), ceil_div(len(x), chunk)
        bias = i != 1
        entries.append(
            RowsEntry(module.ptr(data), 0 if w is None else module.ptr(w), len(x), row_stride, col_stride, offsets[i],
                      partial, chunk, sizes[i] - bias, sizes[i], side, tiles, chunks, conv_index, i, code, bias, i in (1, 2), i == 3)
        )  # fmt: skip
        partial += chunks * lower_pairs(tiles) * side * side
        first.append(first[-1] + chunks * lower_pairs(tiles))
        finish.append(finish[-1] + lower_pairs(ceil_div(sizes[i], 32)))
    partials = ptxsim.Buf(np.zeros(partial, dtype), uninit=True)
    factors = np.full(numel, 0.5, dtype)
    nonfinite = np.zeros(len(rows), np.int32)
    decay, scale = np.full(len(rows), 0.5, dtype), np.full(len(rows), 2.0, dtype)
    entry_table, first, finish = table(entries), np.array(first, np.int32), np.array(finish, np.int32)
    tables = np.array([module.ptr(x) for x in (entry_table, first, table([conv]))], np.uint64).tobytes()
    width = np.dtype(dtype).itemsize
    stages = 4 * (side + 8) if "mma" in kernel else width * (side + 4)
    threads = 64 if side == 32 else 256
    args = [tables, len(rows), partials]
    shared_bytes = stages * 4 * 16 + 2 * side * 24
    launch(module, kernel.format(side), int(first[-1]), threads, args, shared_bytes, seed)
    args = [entry_table, finish, len(rows), partials, factors, decay, scale, nonfinite]
    launch(module, f"finish_kernel<{name}>", int(finish[-1]), 256, args, width * 32 * 33, seed)
    module.release()
    assert not nonfinite.any()
    for x, n, at in zip(rows, sizes, offsets, strict=True):
        got = factors[at : at + n * n].reshape(n, n)
        assert (got == got.T).all()
        assert close(got, 0.25 + 2.0 * (x.T.astype(np.float64) @ x.astype(np.float64)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [32, 64, 128])
@pytest.mark.parametrize("seed", SEEDS[:1])
def test_precondition(compiled, side, dtype, seed):
    if side == 128 and dtype == np.float64:
        pytest.skip("double precision uses tiles of 64")
    module = compiled("precondition.cu")
    rng = np.random.default_rng(seed)
    name = "double" if dtype == np.float64 else "float"
    code = F64 if dtype == np.float64 else F32
    shapes = [(side // 2 + 1, side + 3), (3, 5)]
    g_offsets, g_numel = plan([rows for rows, _ in shapes])
    a_offsets, a_numel = plan([columns for _, columns in shapes])
    g, a = np.full(g_numel, np.nan, dtype), np.full(a_numel, np.nan, dtype)
    entries, first, dots, numel, cases = [], [0], 0, 0, []
    for i, (rows, columns) in enumerate(shapes):
        gi, ai = rng.standard_normal((rows, rows)).astype(dtype), rng.standard_normal((columns, columns)).astype(dtype)
        gi, ai = gi + gi.T, ai + ai.T
        g[g_offsets[i] :][: rows * rows], a[a_offsets[i] :][: columns * columns] = gi.ravel(), ai.ravel()
        v, bias = rng.standard_normal((rows, columns - 1)).astype(dtype), rng.standard_normal(rows).astype(dtype)
        whole = np.hstack([v, bias[:, None]]).astype(np.float64)
        cases.append((whole, gi.astype(np.float64) @ whole @ ai, v, bias))
        matrix = Matrix(module.ptr(v), code, columns - 1, 1, module.ptr(bias), 1)
        stride = ceil_div(rows, 4) * 4
        tiles = ceil_div(rows, side), ceil_div(columns, side)
        entries.append(
            LayerEntry(matrix, matrix, g_offsets[i], a_offsets[i], numel, dots, rows, columns, stride, *tiles, i)
        )
        numel += columns * stride
        dots += tiles[0] * tiles[1]
        first.append(dots)
    layer_table, first = table(entries), np.array(first, np.int32)
    tables = np.array([module.ptr(layer_table), module.ptr(first)], np.uint64).tobytes()
    intermediate = ptxsim.Buf(np.zeros(numel, dtype), uninit=True)
    partial_dots = ptxsim.Buf(np.zeros(dots, dtype), uninit=True)
    dot = ptxsim.Buf(np.zeros(2, dtype), uninit=True)
    shared_bytes = np.dtype(dtype).itemsize * 4 * 16 * (side + 4)
    threads = 64 if side == 32 else 256
    launch(module, f"left_kernel<{name}, {side}>", dots, threads, [tables, 2, g, intermediate], shared_bytes, seed)
    args = [tables, 2, a, intermediate, partial_dots]
    launch(module, f"right_kernel<{name}, {side}>", dots, threads, args, shared_bytes, seed)
    launch(module, f"dot_kernel<{name}>", 2, 32, [layer_table, partial_dots, dot], 0, seed)
    module.release()
    for i, (whole, expected, v, bias) in enumerate(cases):
        assert close(np.hstack([v, bias[:, None]]), expected, dtype)
        assert close(dot.arr[i], (whole * expected).sum(), dtype, factor=50)
