"""The kernels' PTX in the simulator of ptx_device.py, launched by the library's own launchers.

The shim in this directory checks results; this checks how they come about, on what nvcc made of the sources. Skipped
where the simulator is not beside the repository.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from check_resources import ARCHITECTURES, SHARED_BYTES
from launches import BF16, F16, F32, F64, TF32
from ptx_device import PtxDevice, ptxsim

from kfac_fast import _C

if ptxsim is None:
    pytest.skip("the PTX simulator is not beside the repository", allow_module_level=True)
if shutil.which("nvcc") is None:
    pytest.skip("nvcc is not on the path", allow_module_level=True)

pytestmark = [
    # The simulator leaves files for the garbage collector to close.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
SEED = 1
DTYPES = [
    pytest.param(np.float32, id="f32"),
    pytest.param(np.float64, id="f64", marks=pytest.mark.full),
]


@pytest.fixture(
    scope="module",
    params=["sm_80", *(pytest.param(arch, marks=pytest.mark.full) for arch in ARCHITECTURES if arch != "sm_80")],
)
def ptx(request: pytest.FixtureRequest, build: Callable[[str], Path]) -> PtxDevice:
    return PtxDevice(build("simt/libkfac_fast_simt.so"), request.param)


@pytest.fixture
def device(ptx: PtxDevice) -> Iterator[PtxDevice]:
    yield ptx
    ptx.release()


def code_of(dtype: type) -> int:
    return F64 if dtype == np.float64 else F32


def close(got: np.ndarray, expected: np.ndarray, dtype: type, factor: float = 1.0) -> bool:
    tolerance = factor * (1e-12 if dtype == np.float64 else 3e-5)
    return bool(np.abs(got - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-3))


def blocks_of(flat: np.ndarray, plan: _C.Plan, sizes: list[int]) -> list[np.ndarray]:
    return [flat[at : at + n * n].reshape(n, n) for n, at in zip(sizes, plan.offsets, strict=True)]


# Sizes, and the shared memory that the device has for the larger classes to come early.
INVERSE_CASES = {
    "registers": ([8, 7, 3, 1, 5, 16, 9, 12, 32, 17, 25, 31, 20], None),
    "shared memory": ([33, 64, 49, 110, 130], None),
    "global memory": ([150, 140, 192], 48 << 10),
}


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size_class", INVERSE_CASES)
def test_damped_inverse(device: PtxDevice, size_class: str, dtype: type, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes, shared_bytes = INVERSE_CASES[size_class]
    if shared_bytes is not None:
        device.set_shared_memory(shared_bytes)
    plan = _C.Plan(sizes)
    blocks = np.full(plan.numel, np.nan, dtype)
    dense = []
    for n, block in zip(sizes, blocks_of(blocks, plan, sizes), strict=True):
        x = rng.standard_normal((n // 2 + 3, n))
        c = (x.T @ x / len(x)).astype(dtype)
        dense.append(c.astype(np.float64))
        block[:] = np.where(np.tri(n, dtype=bool), c, np.nan)  # only the lower triangle is read
    failing = 1
    blocks[plan.offsets[failing]] = -1
    inverse, info = np.zeros(plan.numel, dtype), np.full(len(sizes), -1, np.int32)
    damping = device.put(np.full(len(sizes), 0.5, dtype), "damping")
    pointers = device.put(blocks, "blocks"), damping, device.put(inverse, "inverse", True), device.put(info, "info")
    launches = device.run(
        "damped_inverse",
        lambda table, call: table.damped_inverse(call, plan, code_of(dtype), *pointers, False, True),
        seed,
    )
    device.set_shared_memory(SHARED_BYTES[device.arch])
    kind = {"registers": "warp", "shared memory": "block"}.get(size_class, "panel")
    assert any(kind in launch.kernel for launch in launches)
    assert info.tolist() == [int(i == failing) for i in range(len(sizes))]
    for i, got in enumerate(blocks_of(inverse, plan, sizes)):
        if i == failing:
            assert np.isnan(got).all()
            continue
        assert (got == got.T).all()
        assert close(got, np.linalg.inv(dense[i] + 0.5 * np.eye(sizes[i])), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_commit(device: PtxDevice, dtype: type) -> None:
    rng = np.random.default_rng(0)
    sizes = [3, 70, 1]
    plan = _C.Plan(sizes)
    factors, pending = rng.standard_normal((2, plan.numel)).astype(dtype)
    expected = [
        0.5 * c + 0.25 * s for c, s in zip(*(blocks_of(x, plan, sizes) for x in (factors, pending)), strict=True)
    ]
    traces = np.zeros(3, dtype)
    halves, quarters = (device.put(np.full(3, x, dtype), "coefficients") for x in (0.5, 0.25))
    gate = device.put(np.ones(1, np.int32), "gate")
    pointers = device.put(factors, "factors"), device.put(pending, "pending"), halves, quarters, gate
    out = device.put(traces, "trace", True)
    device.run("commit", lambda table, call: table.commit(call, plan, code_of(dtype), *pointers, out), SEED)
    for i, (got, rest) in enumerate(zip(*(blocks_of(x, plan, sizes) for x in (factors, pending)), strict=True)):
        assert close(got, expected[i], dtype)
        assert not rest.any()
        assert close(traces[i], np.trace(got), dtype)


def patches(image: np.ndarray, kernel: int) -> np.ndarray:
    """Patches of a [batch, channels, height, width] image with zero padding 1, as rows."""
    padded = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(2, 3))
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, image.shape[1] * kernel * kernel)


def flat(array: np.ndarray) -> np.ndarray:
    """Its memory as one dimension."""
    return array.ravel(order="K")


def lines(image: np.ndarray, kernel: int) -> np.ndarray:
    """Patches of a [batch, channels, width] image without padding, as rows."""
    windows = np.lib.stride_tricks.sliding_window_view(image, kernel, axis=2)
    return windows.transpose(0, 2, 1, 3).reshape(-1, image.shape[1] * kernel)


def as_kind(values: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Values in the type that a kind of rows has, and what they have become."""
    if kind == "bf16":
        bits = ptxsim.bf16(values.astype(np.float32))
        return bits, value_of(bits, kind)
    array = values.astype({"f64": np.float64, "f16": np.float16}.get(kind, np.float32))
    if kind == "tf32":  # numbers that TF32 holds
        array = (array.view(np.uint32) & 0xFFFFE000).view(np.float32)
    return array, array


def value_of(stored: np.ndarray, kind: str) -> np.ndarray:
    return ptxsim.from_bf16(stored).reshape(stored.shape) if kind == "bf16" else stored


ROW_KINDS = {"f32": F32, "f64": F64, "f16": F16, "bf16": BF16, "tf32": F32}


SAMPLED = ("f32", 32), ("f32", 128), ("bf16", 64), ("tf32", 64)


@pytest.mark.parametrize(
    ("kind", "side"),
    [
        pytest.param(kind, side, marks=[] if (kind, side) in SAMPLED else pytest.mark.full)
        for kind in ROW_KINDS
        for side in (32, 64, 128)
    ],
)
def test_factor_update(device: PtxDevice, side: int, kind: str) -> None:
    rng = np.random.default_rng(0)
    dtype = np.float64 if kind == "f64" else np.float32
    d = {32: 30, 64: 72, 128: 648}[side]
    m = 40 if side == 128 else 530  # more than one chunk
    plain, x_plain = as_kind(rng.standard_normal((m, d - 1)), kind)  # no vectors: read one by one
    whole, x_whole = as_kind(rng.standard_normal((m, d // 8 * 8)), kind)
    turned, x_turned = as_kind(rng.standard_normal((d, 20)), kind)
    image, x_image = as_kind(rng.standard_normal((2, d // 9, 4, 5)), kind)
    # Wide enough to go by shifted images; the second one channels-last.
    if side == 32:
        wide, x_wide = as_kind(rng.standard_normal((6 if kind in ("f16", "bf16") else 3, 15, 29, 32)), kind)
        patterns, geometry = patches(x_wide, 3), ((3, 3), (1, 1), (1, 1), (1, 1), (29, 32), 1, 0)
    else:
        wide, x_wide = as_kind(rng.standard_normal((2, 64, 1700)), kind)
        wide = np.ascontiguousarray(wide.transpose(0, 2, 1)).transpose(0, 2, 1)
        patterns, geometry = lines(x_wide, 2), ((2,), (1,), (0,), (1,), (1699,), 1, 0)
    weights = rng.choice([0, 0.25, 1, 4], m) if kind == "tf32" else rng.uniform(0, 1, m)
    weights = weights.astype(dtype)
    one = np.ones((m, 1))
    root = np.sqrt(weights)[:, None]
    expected_rows = [
        np.hstack([x_plain, one]) * root,
        np.hstack([x_whole, one]),
        np.hstack([x_whole, one]) * root,
        x_turned.T,
        np.hstack([patches(x_image, 3), np.ones((40, 1))]),
    ]
    biases = [True, True, True, False, True]
    convs = [None] * 4 + [((3, 3), (1, 1), (1, 1), (1, 1), (4, 5), 1, 0)]
    width = plain.itemsize
    sources = [
        (plain, (m, d - 1), (d - 1, 1)),
        (whole, whole.shape, (whole.shape[1], 1)),
        (whole, whole.shape, (whole.shape[1], 1)),
        (turned, (20, d), (1, 20)),
        (image, image.shape, tuple(s // width for s in image.strides)),
    ]
    if side < 128:
        expected_rows.append(np.hstack([patterns, np.ones((len(patterns), 1))]))
        biases.append(True)
        convs.append(geometry)
        sources.append((wide, wide.shape, tuple(s // width for s in wide.strides)))
    arrays = {id(array): array for array, _, _ in sources}
    address = {key: device.put(flat(array), "rows") for key, array in arrays.items()}
    views = _C.TensorViews(
        [(address[id(array)], ROW_KINDS[kind], 1 << 32, shape, strides) for array, shape, strides in sources]
    )
    weight = device.put(weights, "weights")
    sizes = [x.shape[1] for x in expected_rows]
    plan = _C.Plan(sizes)
    factors = np.full(plan.numel, 0.5, dtype)
    traces, nonfinite = np.zeros(len(sizes), dtype), np.zeros(len(sizes), np.int32)
    halves, twos = (device.put(np.full(len(sizes), x, dtype), "coefficients") for x in (0.5, 2.0))
    outputs = device.put(traces, "trace", True), device.put(nonfinite, "nonfinite", True)
    c = device.put(factors, "factors")
    launches = device.run(
        "factor_update",
        lambda table, call: table.factor_update(
            call,
            plan,
            TF32 if kind == "tf32" else code_of(dtype),
            c,
            views,
            convs,
            biases,
            [weight, 0, weight, 0, 0, 0][: len(sizes)],
            halves,
            twos,
            *outputs,
        ),
        SEED,
    )
    assert any("shifted" in launch.kernel for launch in launches) == (side < 128)
    assert not nonfinite.any()
    for i, (x, got) in enumerate(zip(expected_rows, blocks_of(factors, plan, sizes), strict=True)):
        assert (got == got.T).all()
        assert close(got, 0.25 + 2.0 * (x.T.astype(np.float64) @ x.astype(np.float64)), dtype)
        assert close(traces[i], np.trace(got), dtype)


@pytest.mark.parametrize(
    "kind", ["f32", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("f64", "f16", "bf16"))]
)
@pytest.mark.parametrize(
    "shapes", [[(17, 32), (3, 5)], [(65, 70), (68, 65), (3, 45)], [(513, 515)]], ids=["32", "64", "128"]
)
def test_precondition(device: PtxDevice, shapes: list[tuple[int, int]], kind: str) -> None:
    if shapes[0][0] > 512 and kind == "f64":
        pytest.skip("double precision uses tiles of 64")
    rng = np.random.default_rng(0)
    dtype = np.float64 if kind == "f64" else np.float32
    rows, columns = [r for r, _ in shapes], [c for _, c in shapes]
    g_plan, a_plan = _C.Plan(rows), _C.Plan(columns)
    g, a = np.full(g_plan.numel, np.nan, dtype), np.full(a_plan.numel, np.nan, dtype)
    for block in (*blocks_of(g, g_plan, rows), *blocks_of(a, a_plan, columns)):
        values = rng.standard_normal(block.shape).astype(dtype)
        block[:] = values + values.T
    weights, v_weights = zip(*(as_kind(rng.standard_normal((r, c - 1)), kind) for r, c in shapes), strict=True)
    biases, v_biases = zip(*(as_kind(rng.standard_normal(r), kind) for r in rows), strict=True)
    whole = [np.hstack([v, b[:, None]]).astype(np.float64) for v, b in zip(v_weights, v_biases, strict=True)]
    expected = [
        gi.astype(np.float64) @ v @ ai
        for gi, v, ai in zip(blocks_of(g, g_plan, rows), whole, blocks_of(a, a_plan, columns), strict=True)
    ]
    code = ROW_KINDS[kind]
    dot = np.zeros(len(shapes), dtype)
    matrices = _C.TensorViews([(device.put(v, "V"), code, 1 << 32, v.shape, (v.shape[1], 1)) for v in weights])
    vectors = _C.TensorViews([(device.put(b, "bias"), code, 1 << 32, b.shape, (1,)) for b in biases])
    inverses = device.put(g, "G"), device.put(a, "A")
    out = device.put(dot, "dot", True)
    index = list(range(len(shapes)))
    device.run(
        "precondition",
        lambda table, call: table.precondition(
            call, g_plan, a_plan, code_of(dtype), *inverses, matrices, vectors, matrices, vectors, index, out
        ),
        SEED,
    )
    rounding = {"f16": 20, "bf16": 150}.get(kind, 1)  # half of a last place of 11 or 8 bits
    for i, u in enumerate(expected):
        got = np.hstack([value_of(weights[i], kind), value_of(biases[i], kind)[:, None]])
        assert close(got, u, dtype, rounding)
        assert close(dot[i], (whole[i] * u).sum(), dtype, factor=50)
