"""Factor updates by the processor's matrix instructions (AMX), against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import cpu_table
from torch import Tensor

from kfac_fast import _C, BlockDiagonal, ConvRows, ops

AMX = next((table for table in _C.cpu_tables() if table.name == "amx"), None)
pytestmark = pytest.mark.skipif(AMX is None, reason="no bfloat16 matrix instructions: processor, kernel or compiler")


def update(x: Tensor, bias: bool, weights: Tensor | None = None) -> tuple[Tensor, ops.FactorStatistics]:
    assert AMX is not None
    factor = BlockDiagonal.zeros([x.shape[1] + bias])
    with cpu_table(AMX):
        found = ops.factor_update_(factor, [x], 0.0, 1.0, bias=bias, weights=None if weights is None else [weights])
    return factor[0], found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("m", "d"), [(0, 3), (1, 1), (31, 15), (32, 16), (33, 17), (513, 48), (700, 200), (5000, 100), (300, 530)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_as_exact_as_float32_allows(m: int, d: int, bias: bool, dtype: torch.dtype) -> None:
    x = torch.randn(m, d).to(dtype)
    full = torch.cat([x, x.new_ones(m, 1)], 1).double() if bias else x.double()
    factor, found = update(x, bias)
    assert ((factor - full.T @ full).abs() <= 1e-6 * (full.abs().T @ full.abs())).all()
    assert torch.equal(factor, factor.T)
    assert found.nonfinite.tolist() == [0]
    torch.testing.assert_close(found.trace, factor.trace()[None])


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize(("m", "d"), [(640, 130), (8192, 200), (4096, 600)])
def test_float32_is_as_exact_as_a_product_in_float32(m: int, d: int, offset: float) -> None:
    x = torch.randn(m, d) + offset
    x[:, ::3] *= 1e-9
    x[:, 1::3] *= 1e9
    exact = x.double().T @ x.double()
    size = x.double().abs().T @ x.double().abs()

    def error(sums: Tensor) -> Tensor:
        return ((sums - exact) / size).pow(2).mean().sqrt()

    assert error(update(x, False)[0]) <= 1.5 * error(x.T @ x)


def test_small_numbers_keep_what_float32_keeps() -> None:
    x = torch.randn(512, 128) * 1e-17
    exact = x.double().T @ x.double()
    assert ((update(x, False)[0] - exact).abs() <= 1e-6 * (x.double().abs().T @ x.double().abs())).all()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_patches_of_a_convolution(stride: int, dtype: torch.dtype) -> None:
    images = torch.randn(3, 14, 9, 11).to(dtype)
    patches = F.unfold(images.double(), 3, padding=1, stride=stride).transpose(1, 2).reshape(-1, 14 * 9)
    factor = BlockDiagonal.zeros([14 * 9])
    assert AMX is not None
    with cpu_table(AMX):
        ops.factor_update_(factor, [ConvRows(images, 3, padding=1, stride=stride)], 0.0, 1.0)
    assert ((factor[0] - patches.T @ patches).abs() <= 1e-6 * (patches.abs().T @ patches.abs())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    x = torch.randn(2100, 600).to(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(update(x, True)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_applied_without_rounding(dtype: torch.dtype) -> None:
    x, weights = torch.randn(400, 140).to(dtype), torch.rand(400)
    expected = x.double().T @ (weights.double()[:, None] * x.double())
    torch.testing.assert_close(update(x, False, weights)[0].double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_is_told(bad: float, dtype: torch.dtype) -> None:
    x = torch.randn(100, 133).to(dtype)
    x[70, 20] = bad
    factor, found = update(x, True)
    assert found.nonfinite.tolist() == [1]
    others = [i for i in range(134) if i != 20]
    assert factor[others][:, others].isfinite().all()


def test_every_nan_is_told() -> None:
    for bits in (0x7FFFFFFF, 0x7F800001, -1):
        x = torch.randn(100, 133)
        x.view(torch.int32)[70, 20] = bits
        assert update(x, True)[1].nonfinite.tolist() == [1]
