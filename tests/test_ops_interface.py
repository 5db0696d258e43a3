"""The public face of the ops: `BlockDiagonal`, errors that name the argument, ways of reading tensors."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS, Simulator, cpu_table
from torch import Tensor

from kfac_fast import BlockDiagonal, ConvRows, ops
from kfac_fast.ops import native


def test_block_diagonal() -> None:
    blocks = BlockDiagonal.pack([torch.full((n, n), float(n)) for n in (3, 1, 5)])
    assert len(blocks) == 3
    assert blocks.sizes == (3, 1, 5)
    assert [float(b[0, 0]) for b in blocks] == [3.0, 1.0, 5.0]
    blocks[1].fill_(9.0)  # a view
    assert 9.0 in blocks.data.tolist()
    tail = blocks[1:]
    assert tail.sizes == (1, 5)
    tail[1].fill_(4.0)
    assert (blocks[2] == 4.0).all()
    assert all(b.data_ptr() % 64 == 0 for b in blocks)
    assert blocks.plan is BlockDiagonal.zeros([3, 1, 5]).plan


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BlockDiagonal.zeros([3, 0]), ValueError, r"sizes\[1\] must be an integer >= 1, got 0"),
        (lambda: BlockDiagonal.pack([torch.ones(2, 3)]), ValueError, r"blocks\[0\] must be a square matrix, got shape \(2, 3\)"),
        (lambda: BlockDiagonal([2], torch.ones(3)), ValueError, r"data must be contiguous with shape \(16,\)"),
        (lambda: ops.damped_inverse(torch.eye(3), 1.0), TypeError, "blocks must be a BlockDiagonal, got Tensor"),
        (lambda: ops.damped_inverse(BlockDiagonal.zeros([3]), -1.0), ValueError, r"damping must be finite and >= 0, got damping=-1.0"),
        (lambda: ops.damped_inverse(BlockDiagonal.zeros([3]), torch.ones(2)), ValueError, r"damping must be contiguous with shape \(1,\), got \(2,\)"),
        (lambda: ops.damped_inverse(BlockDiagonal.zeros([3]), "x"), TypeError, "damping must be a number or a tensor"),
        (lambda: ops.damped_inverse(BlockDiagonal.zeros([3]), 1.0, BlockDiagonal.zeros([4])), ValueError, r"out must have the sizes \(3,\), got \(4,\)"),
        (lambda: ops.damped_inverse(BlockDiagonal.zeros([3]), 1.0, retry=torch.ones(1, dtype=torch.int32)), ValueError, "retry needs out"),
        (lambda: ops.factor_update_(BlockDiagonal.zeros([3]), [torch.ones(2, 4)], 1.0, 1.0), ValueError, r"rows\[0\] must have 3 columns to fit factors\[0\] of size 3, got 4"),
        (lambda: ops.factor_update_(BlockDiagonal.zeros([3]), [torch.ones(2, 3)], 1.0, 1.0, bias=True), ValueError, r"rows\[0\] must have 2 columns to fit factors\[0\] of size 3 with the bias column, got 3"),
        (lambda: ops.factor_update_(BlockDiagonal.zeros([3]), [torch.ones(2, 3).double()], 1.0, 1.0), TypeError, r"rows\[0\] must be torch.float32 or torch.bfloat16 or torch.float16, got torch.float64"),
        (lambda: ops.factor_update_(BlockDiagonal.zeros([3]), [torch.ones(2, 3).int()], 1.0, 1.0), TypeError, r"rows\[0\] must be .* got torch.int32"),
        (lambda: ops.factor_update_(BlockDiagonal.zeros([3]), [3.0], 1.0, 1.0), TypeError, r"rows\[0\] must be a tensor, got float"),
        (lambda: ops.factor_update_(BlockDiagonal.zeros([3]), [torch.ones(3)], 1.0, 1.0), ValueError, r"rows\[0\] must be a matrix \[m, d\] or a ConvRows, got shape \(3,\)"),
        (lambda: ops.factor_update_(BlockDiagonal.zeros([3]), [], 1.0, 1.0), ValueError, "rows must cover the 1 blocks of factors, got rows for 0"),
        (lambda: ops.factor_update_(BlockDiagonal.zeros([3]), [torch.ones(2, 3)] * 2, 1.0, 1.0), ValueError, r"rows must cover the 1 blocks of factors, got more \(at rows\[1\]\)"),
        (lambda: ops.factor_update_(BlockDiagonal.zeros([3]), [torch.ones(2, 3).to_sparse()], 1.0, 1.0), TypeError, r"rows\[0\] must be a dense tensor"),
        (lambda: ops.factor_update_(BlockDiagonal.zeros([3]), [torch.ones(2, 3)], 1.0, 1.0, weights=[torch.ones(3)]), ValueError, r"weights\[0\] must be contiguous with shape \(2,\)"),
        (lambda: ops.factor_update_(BlockDiagonal.zeros([3]), [torch.ones(2, 3, device="meta")], 1.0, 1.0), ValueError, r"rows\[0\] must be on cpu, got meta"),
        (lambda: ops.precondition([torch.ones(2, 2)], BlockDiagonal.zeros([3]), BlockDiagonal.zeros([2])), ValueError, r"grads\[0\] must be \[3, 2\] to fit g_inverse\[0\] and a_inverse\[0\], got \(2, 2\)"),
        (lambda: ops.precondition([(torch.ones(3, 2), torch.ones(3))], BlockDiagonal.zeros([3]), BlockDiagonal.zeros([2])), ValueError, r"grads\[0\] must be \[3, 1\] beside its bias"),
        (lambda: ops.precondition([(torch.ones(3, 1), torch.ones(4))], BlockDiagonal.zeros([3]), BlockDiagonal.zeros([2])), ValueError, r"the bias of grads\[0\] must be \[3\], got \(4,\)"),
        (lambda: ops.precondition([torch.ones(3, 2)], BlockDiagonal.zeros([3]), BlockDiagonal.zeros([2]), out=[torch.ones(3, 2, requires_grad=True)]), TypeError, r"out\[0\] must not require grad"),
        (lambda: ops.commit_(BlockDiagonal.zeros([3]), BlockDiagonal.zeros([4]), 1.0, 1.0), ValueError, r"pending must have the sizes \(3,\), got \(4,\)"),
        (lambda: ConvRows(torch.ones(2, 3, 8, 8), 3, groups=2), ValueError, "groups must divide the 3 channels of x, got groups=2"),
        (lambda: ConvRows(torch.ones(2, 3, 2, 2), 3), ValueError, r"kernel \(3, 3\) does not fit x"),
        (lambda: ConvRows(torch.ones(2, 3, 8, 8), 3, padding=(1, 1, 1)), ValueError, "padding must be >= 0: a number, 2 numbers or 2 pairs"),
        (lambda: ConvRows(torch.ones(2, 3), 3), ValueError, r"x must be \[N, C, \*spatial\]"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_functorch_wrapped_rows_are_refused() -> None:
    factors = BlockDiagonal.zeros([3])

    def update(x: Tensor) -> Tensor:
        ops.factor_update_(factors, [x], 1.0, 1.0)
        return x

    with pytest.raises(TypeError, match=r"rows\[0\] must be a plain torch.Tensor"):
        torch.func.vmap(update)(torch.ones(2, 4, 3))


def test_views_without_an_exchange_api_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch before 2.10 has no exchange table; there Python reads the tensors."""
    rows = [torch.randn(4, 6)[:, ::2], torch.randn(5, 2).T]
    fast = BlockDiagonal.zeros([3, 5])
    slow = BlockDiagonal.zeros([3, 5])
    ops.factor_update_(fast, rows, 0.0, 1.0)
    monkeypatch.setattr(native, "_EXCHANGE_API", 0)
    ops.factor_update_(slow, rows, 0.0, 1.0)
    assert torch.equal(fast.data, slow.data)
    with pytest.raises(TypeError, match=r"rows\[1\] must be a tensor, got int"):
        ops.factor_update_(slow, [rows[0], 3], 0.0, 1.0)


def test_backends_are_all_there() -> None:
    assert {"reference", "baseline", "simulated-cuda"} <= set(BACKENDS) or {
        "reference",
        "neon",
        "simulated-cuda",
    } <= set(BACKENDS)


def test_float32_rows_are_multiplied_as_tf32_only_where_torch_allows_it(simulator: Simulator) -> None:
    """By the CUDA kernels; a processor has no TF32."""
    x = torch.randn(300, 70)

    def update() -> Tensor:
        factors = BlockDiagonal.zeros([70])
        ops.factor_update_(factors, [x], 0.0, 1.0)
        return factors[0].double()

    def on_cuda() -> Tensor:
        with cpu_table(simulator.table):
            return update()

    before, exact = (update(), on_cuda()), x.double().T @ x.double()
    cut = (x.view(torch.int32) & ~0x1FFF).view(torch.float32).double()  # the bits that TF32 keeps
    tolerance = 2e-6 * (x.double().abs().T @ x.double().abs())
    torch.set_float32_matmul_precision("high")
    try:
        after = update(), on_cuda()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(((found - exact).abs() <= tolerance).all() for found in before)
    assert torch.equal(before[0], after[0])
    assert ((after[1] - cut.T @ cut).abs() <= tolerance).all()
    assert ((after[1] - exact).abs() > 10 * tolerance).any()
