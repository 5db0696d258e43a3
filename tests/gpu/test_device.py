"""The CUDA kernels on a real GPU: values, streams, devices, graphs, synchronisation. `make gpu` runs them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from kfac_fast import KFAC, BlockDiagonal, ConvRows, ops

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if ops.native.cuda_table is None:
    pytest.skip("kfac_fast was built without CUDA", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
# Every class of damped_inverse, its boundaries, and one block that is left to the library.
SIZES = [
    1,
    2,
    7,
    8,
    9,
    16,
    17,
    31,
    32,
    33,
    64,
    65,
    96,
    97,
    128,
    129,
    192,
    193,
    240,
    256,
    300,
    512,
    700,
    1025,
    2048,
    2049,
]


def spd(sizes: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rows = [torch.randn(n + 3, n, dtype=torch.float64) for n in sizes]
    return [(x.T @ x / len(x)).to(dtype) for x in rows]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverses_of_every_class(dtype: torch.dtype) -> None:
    dense = spd(SIZES, dtype)
    found = ops.damped_inverse(BlockDiagonal.pack([c.to(DEVICE) for c in dense]), 0.5)
    assert not found.info.any()
    for n, c, inverse in zip(SIZES, dense, found.inverse, strict=True):
        expected = torch.linalg.inv(c.double() + 0.5 * torch.eye(n, dtype=torch.float64))
        assert error(inverse, expected) < (1e-4 if dtype == torch.float32 else 1e-12), n
        assert torch.equal(inverse, inverse.T), n


def test_a_bad_block_is_named_and_leaves_the_others_right() -> None:
    sizes = [5, 20, 50, 150, 400]
    for bad in range(len(sizes)):
        dense = spd(sizes)
        dense[bad][sizes[bad] // 2, sizes[bad] // 2] = -1e3
        found = ops.damped_inverse(BlockDiagonal.pack([c.to(DEVICE) for c in dense]), 0.5)
        assert found.info.tolist() == [sizes[bad] // 2 + 1 if i == bad else 0 for i in range(len(sizes))]
        assert found.inverse[bad].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [0, 5, 700, 9000])
def test_factor_updates(dtype: torch.dtype, rows: int) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    widths = [3, 31, 32, 63, 64, 129, 200, 700]
    x = [torch.randn(rows, d).to(dtype) for d in widths]
    factors = BlockDiagonal.zeros([d + 1 for d in widths], wide, DEVICE)
    ops.factor_update_(factors, [part.to(DEVICE) for part in x], 0.0, 1.0, bias=True)
    for part, factor in zip(x, factors, strict=True):
        full = torch.cat([part.double(), torch.ones(rows, 1, dtype=torch.float64)], 1)
        assert error(factor, full.T @ full) < (1e-5 if wide == torch.float32 else 1e-13)
        assert torch.equal(factor, factor.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_factor_updates_of_convolutions(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    images = torch.randn(8, 24, 14, 14).to(dtype).contiguous(memory_format=memory_format)
    patches = F.unfold(images.double(), 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 24 * 9)
    factor = BlockDiagonal.zeros([24 * 9], device=DEVICE)
    ops.factor_update_(factor, [ConvRows(images.to(DEVICE), 3, stride=2, padding=1)], 0.0, 1.0)
    assert error(factor[0], patches.T @ patches) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [((32, 32, 32, 32), (3, 3)), ((64, 128, 28, 28), (1, 3)), ((8, 17, 49, 57), (3, 3))],
    ids=["one tile", "several tiles", "odd rows"],
)
def test_factor_updates_of_shifted_images(
    shape: tuple[int, ...], kernel: tuple[int, int], memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    images = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    n = shape[1] * kernel[0] * kernel[1] + 1
    padding = kernel[0] // 2, kernel[1] // 2
    expected = torch.zeros(n, n, dtype=torch.float64)
    for part in images.double().split(8):  # all patches at once take gigabytes
        patches = F.unfold(part, kernel, padding=padding).transpose(1, 2).reshape(-1, n - 1)
        full = torch.cat([patches, torch.ones(len(patches), 1, dtype=torch.float64)], 1)
        expected += full.T @ full
    factor = BlockDiagonal.zeros([n], wide, DEVICE)
    rows = [ConvRows(images.to(DEVICE), kernel, padding=padding)]
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        ops.factor_update_(factor, rows, 0.0, 1.0, bias=True)
        torch.cuda.synchronize()
    assert any("shifted" in event.name for event in recorded.events())
    assert error(factor[0], expected) < (1e-5 if wide == torch.float32 else 1e-13)
    assert torch.equal(factor[0], factor[0].T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_natural_gradients(dtype: torch.dtype) -> None:
    shapes = [(3, 5), (32, 33), (64, 65), (200, 100), (600, 700)]
    g, a = spd([r for r, _ in shapes], dtype), spd([c for _, c in shapes], dtype)
    weights = [torch.randn(r, c - 1, dtype=dtype) for r, c in shapes]
    biases = [torch.randn(r, dtype=dtype) for r, _ in shapes]
    pairs = [(w.to(DEVICE), b.to(DEVICE)) for w, b in zip(weights, biases, strict=True)]
    blocks = (BlockDiagonal.pack([m.to(DEVICE) for m in side]) for side in (g, a))
    found = ops.precondition(pairs, *blocks)
    for i, (u, bias) in enumerate(found.results):
        v = torch.cat([weights[i], biases[i][:, None]], 1).double()
        expected = g[i].double() @ v @ a[i].double()
        tolerance = 2e-5 if dtype == torch.float32 else 1e-13
        assert error(torch.cat([u, bias[:, None]], 1), expected) < tolerance
        assert abs(float(found.dot[i]) - float((v * expected).sum())) < tolerance * float(v.norm() * expected.norm())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 16, 40), nn.Tanh(),
        nn.Linear(40, 5),
    )  # fmt: skip


def train(device: torch.device, steps: int) -> list[Tensor]:
    model = network().to(device)
    optimizer = KFAC(model, lr=0.05, fisher="empirical", damping=0.1, inverse_every=2)
    x, y = torch.randn(32, 3, 8, 8).to(device), torch.randint(5, (32,)).to(device)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [p.detach().cpu() for p in model.parameters()]


def test_training_agrees_with_the_cpu_and_with_itself() -> None:
    first, second, cpu = (train(device, 5) for device in (DEVICE, DEVICE, torch.device("cpu")))
    for a, b, c in zip(first, second, cpu, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)  # torch's own backward kernels may use atomics
        assert torch.allclose(a, c, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("of", "into"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_checkpoint_goes_on_on_another_device(of: str, into: str) -> None:
    x, y = torch.randn(32, 3, 8, 8), torch.randint(5, (32,))

    def step(model: nn.Module, optimizer: KFAC, device: str) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(device)), y.to(device)).backward()
        optimizer.step()

    runs = []
    for device in (of, into):
        model = network().to(device)
        runs.append((model, KFAC(model, lr=0.05, fisher="exact", damping=0.1, inverse_every=2), device))
    for _ in range(3):
        step(*runs[0])
    for own, other in zip(runs[1][:2], runs[0][:2], strict=True):
        own.load_state_dict(other.state_dict())
    saved, loaded = (optimizer.state_dict()["state"] for _, optimizer, _ in runs)
    for key, entry in saved.items():
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(value).cpu(), torch.as_tensor(loaded[key][name]).cpu()), name
    for run in runs:
        step(*run)
    for p, q in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        assert q.device.type == into
        assert torch.allclose(p.cpu(), q.cpu(), rtol=1e-2, atol=1e-3)


def test_kernels_give_the_same_bits_every_time() -> None:
    blocks = BlockDiagonal.pack([c.to(DEVICE) for c in spd([20, 100, 300, 700])])
    runs = [ops.damped_inverse(blocks, 0.1).inverse.data.clone() for _ in range(5)]
    assert all(torch.equal(run, runs[0]) for run in runs)


def busy_calls() -> list[tuple[str, Callable[[BlockDiagonal, list[Tensor]], Tensor]]]:
    return [
        ("factor_update_", lambda b, x: ops.factor_update_(b, x, 0.5, 1.0).trace),
        ("damped_inverse", lambda b, x: ops.damped_inverse(b, 0.5).inverse.data),
        ("precondition", lambda b, x: ops.precondition([part.T @ part for part in x], b, b).dot),
        ("commit_", lambda b, x: ops.commit_(b, b.clone(), 0.5, 1.0)),
    ]


@pytest.mark.parametrize(("name", "call"), busy_calls(), ids=lambda value: value if isinstance(value, str) else "")
def test_work_is_queued_on_the_current_stream(name: str, call: Callable[..., Tensor]) -> None:
    dense, x = spd([20, 100, 300]), [torch.randn(50, n, device=DEVICE) for n in (20, 100, 300)]
    expected = call(BlockDiagonal.pack([c.to(DEVICE) for c in dense]), x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    source = BlockDiagonal.pack([c.to(DEVICE) for c in dense])
    blocks = source.empty_like()
    blocks.data.fill_(torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # work on another stream would overtake the copy
        blocks.data.copy_(source.data)
        found = call(blocks, x)
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_work_runs_on_the_tensors_device() -> None:
    other = torch.device("cuda", 1)
    dense = spd([20, 100, 300])
    results = [ops.damped_inverse(BlockDiagonal.pack([c.to(d) for c in dense]), 0.5) for d in (DEVICE, other)]
    assert results[1].inverse.data.device == other
    assert torch.equal(*(r.inverse.data.cpu() for r in results))
    assert torch.cuda.current_device() == 0


def test_a_step_is_captured_in_a_graph() -> None:
    sizes = [20, 100, 300]
    x = [torch.randn(50, n, device=DEVICE) for n in sizes]
    gradients = [torch.randn(n, n, device=DEVICE) for n in sizes]
    factors = BlockDiagonal.zeros(sizes, device=DEVICE)

    def step() -> tuple[Tensor, Tensor]:
        ops.factor_update_(factors, x, 0.0, 1.0 / 50)
        inverse = ops.damped_inverse(factors, 0.5).inverse
        return inverse.data, ops.precondition(gradients, inverse, inverse).dot

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for part in x:
        part.normal_()
    graph.replay()
    torch.cuda.synchronize()
    replayed = [part.clone() for part in captured]
    for got, expected in zip(replayed, step(), strict=True):
        assert torch.equal(got, expected)


def test_a_step_does_not_make_the_host_wait() -> None:
    model = network().to(DEVICE)
    optimizer = KFAC(model, inverse_every=1)
    x, y = torch.randn(16, 3, 8, 8, device=DEVICE), torch.randint(5, (16,), device=DEVICE)
    for warm_up in (True, True, False):
        torch.cuda.set_sync_debug_mode("default" if warm_up else "error")
        try:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
