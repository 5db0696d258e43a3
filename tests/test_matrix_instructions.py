"""Factor updates of bfloat16 rows by the processor's matrix instructions (AMX), against float64."""

from __future__ import annotations

import pytest
import torch
from conftest import cpu_table
from torch import Tensor

from kfac_fast import _C, BlockDiagonal, ops

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
def test_sums_are_as_exact_as_float32_allows(m: int, d: int, bias: bool) -> None:
    x = torch.randn(m, d).bfloat16()
    full = torch.cat([x, x.new_ones(m, 1)], 1).double() if bias else x.double()
    factor, found = update(x, bias)
    assert ((factor - full.T @ full).abs() <= 3e-6 * (full.abs().T @ full.abs())).all()
    assert torch.equal(factor, factor.T)
    assert found.nonfinite.tolist() == [0]
    torch.testing.assert_close(found.trace, factor.trace()[None])


def test_threads_do_not_change_a_bit() -> None:
    x = torch.randn(4500, 300).bfloat16()
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


def test_weights_are_applied_without_rounding() -> None:
    x, weights = torch.randn(400, 40).bfloat16(), torch.rand(400)
    expected = x.double().T @ (weights.double()[:, None] * x.double())
    torch.testing.assert_close(update(x, False, weights)[0].double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])
def test_what_is_not_finite_is_told(bad: float) -> None:
    x = torch.randn(100, 33).bfloat16()
    x[70, 20] = bad
    assert update(x, True)[1].nonfinite.tolist() == [1]
