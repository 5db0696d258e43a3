"""Every op on every backend against float64, and the errors of the public interface."""

from __future__ import annotations

import pytest
import torch
from conftest import Simulator
from torch import Tensor

from kfac_fast import BlockDiagonal, ConvRows, ops

EPS = 2.0**-24
# |X̂ − X| ≤ ACCURACY · κ · 2⁻²⁴ · |X| in the Frobenius norm. LAPACK's float32 inverses stay below 2 on these matrices,
# the blocked sweep below 4; the bound leaves a factor of two.
ACCURACY = 8.0


def spd(n: int, condition: float, generator: torch.Generator) -> Tensor:
    """A symmetric positive definite float64 matrix with geometrically spaced eigenvalues from 1 down to 1/condition."""
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    values = torch.logspace(0, -1, n, base=condition, dtype=torch.float64)
    return (q * values) @ q.T


def relative_error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


# ---- damped_inverse -------------------------------------------------------------------------------------------------


def check_inverses(sizes: list[int], condition: float, dtype: torch.dtype) -> BlockDiagonal:
    generator = torch.Generator().manual_seed(len(sizes))
    exact = [spd(n, condition, generator) for n in sizes]
    blocks = BlockDiagonal.pack([m.to(dtype) for m in exact])
    damping = 0.5 / condition
    inverse, info = ops.damped_inverse(blocks, damping)
    assert info.tolist() == [0] * len(sizes)
    unit = EPS if dtype == torch.float32 else 2.0**-53
    for n, block, x in zip(sizes, blocks, inverse, strict=True):
        assert torch.equal(x, x.T), n
        damped = block.double() + damping * torch.eye(n, dtype=torch.float64)
        error = relative_error(x, torch.cholesky_inverse(torch.linalg.cholesky(damped)))
        assert error <= ACCURACY * condition * unit + 2 * unit, (n, error / (condition * unit))
    return inverse


SAMPLED = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    24,
    31,
    32,
    33,
    47,
    48,
    49,
    63,
    64,
    65,
    96,
    97,
    100,
    128,
    129,
    160,
    193,
    255,
    300,
]


@pytest.mark.parametrize("condition", [1e1, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_sampled_sizes(backend: str, condition: float, dtype: torch.dtype) -> None:
    check_inverses(SAMPLED, condition, dtype)


@pytest.mark.parametrize("n", [512, 1000])
def test_inverse_large(backend: str, n: int) -> None:
    check_inverses([n], 1e4, torch.float32)


@pytest.mark.full
@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4])
def test_inverse_every_size(backend: str, condition: float) -> None:
    check_inverses(list(range(1, 301)), condition, torch.float32)


def schedules(simulator: Simulator):
    yield simulator.schedule(Simulator.IN_ORDER)
    yield simulator.schedule(Simulator.REVERSE)
    for seed in range(4):
        yield simulator.schedule(Simulator.RANDOM, seed)


@pytest.mark.parametrize("backend", ["simulated-cuda"], indirect=True)
@pytest.mark.parametrize("shared_bytes", [64 << 10, 227 << 10])
def test_cuda_kernels_give_the_same_bits_in_any_order(backend: str, simulator: Simulator, shared_bytes: int) -> None:
    simulator.device(shared_bytes=shared_bytes)
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 5, 8, 11, 16, 20, 32, 40, 64, 100, 120, 130]
    blocks = BlockDiagonal.pack([spd(n, 1e3, generator).float() for n in sizes])
    a_sizes = sizes[::-1]
    grads = [torch.randn(n, m) for n, m in zip(sizes, a_sizes, strict=True)]
    rows = [torch.randn(37, n) for n in sizes]
    results = []
    for _ in schedules(simulator):
        inverse, info = ops.damped_inverse(blocks, 1e-3)
        a_inverse, _ = ops.damped_inverse(BlockDiagonal.pack(list(blocks)[::-1]), 1e-3)
        natural = ops.precondition(grads, inverse, a_inverse)
        factors = blocks.clone()
        statistics = ops.factor_update_(factors, rows, 0.9, 0.1)
        results.append([*inverse, info, *natural.results, natural.dot, factors.data, *statistics])
    assert len(results) >= 5
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_one_bad_block_leaves_the_others_right(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (1, 6, 16, 29, 70, 150):
        good = spd(n, 10.0, generator).float()
        indefinite = good.clone()
        k = n // 2
        indefinite[k, k] = -5.0
        with_nan = good.clone()
        with_nan[-1, -1] = torch.nan
        infinite = good.clone()
        infinite[0, 0] = torch.inf
        inverse, info = ops.damped_inverse(BlockDiagonal.pack([good, indefinite, with_nan, infinite, good]), 0.1)
        assert info.tolist() == [0, k + 1, n, 1, 0]
        expected = torch.linalg.inv(good.double() + 0.1 * torch.eye(n))
        assert relative_error(inverse[0], expected) < 1e-5
        assert relative_error(inverse[4], expected) < 1e-5
        assert all(inverse[i].isnan().all() for i in (1, 2, 3))


def test_failure_keeps_out_and_retry_touches_only_failures(backend: str) -> None:
    good = torch.eye(5) * 3
    bad = torch.eye(40)
    bad[20, 20] = -1.0
    blocks = BlockDiagonal.pack([good, bad])
    out = BlockDiagonal.pack([torch.full((5, 5), 7.0), torch.full((40, 40), 9.0)])
    _, info = ops.damped_inverse(blocks, 0.0, out)
    assert info.tolist() == [0, 21]
    assert (out[1] == 9.0).all()
    out[0].fill_(-2.0)  # retry must not come near a block that was right
    same, again = ops.damped_inverse(blocks, 2.0, out, retry=info)
    assert same is out
    assert again is info
    assert info.tolist() == [0, 0]
    assert (out[0] == -2.0).all()
    assert torch.allclose(out[1].diagonal(), 1 / (bad.diagonal() + 2.0))


def test_inverse_in_place_and_only_the_lower_triangle_is_read(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = BlockDiagonal.pack([spd(n, 100.0, generator).float() for n in (3, 30, 90)])
    expected, _ = ops.damped_inverse(blocks, 0.01)
    for block in blocks:
        block.masked_fill_(torch.ones_like(block).triu(1).bool(), 1e30)
    ops.damped_inverse(blocks, 0.01, blocks)
    assert all(torch.equal(x, y) for x, y in zip(blocks, expected, strict=True))


# ---- factor_update_ -------------------------------------------------------------------------------------------------


def exact_update(c: Tensor, x: Tensor, decay: float, scale: float, bias: bool, w: Tensor | None) -> Tensor:
    x = x.double()
    if bias:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    weighted = x if w is None else x * w.double()[:, None]
    return decay * c.double() + scale * x.T @ weighted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_factor_update(backend: str, dtype: torch.dtype) -> None:
    columns = [1, 2, 7, 8, 15, 16, 17, 31, 33, 48, 64, 65, 100, 130, 200]
    counts = [0, 1, 5, 33, 64, 3, 100, 129, 2, 7, 257, 31, 50, 40, 70]
    bias = [i % 2 == 0 for i in range(len(columns))]
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    rows = [torch.randn(m, d).to(dtype) for m, d in zip(counts, columns, strict=True)]
    weights = [torch.rand(m).to(accumulate) if i % 3 == 0 else None for i, m in enumerate(counts)]
    factors = BlockDiagonal.zeros([d + b for d, b in zip(columns, bias, strict=True)], accumulate)
    for block in factors:
        block.copy_(torch.eye(len(block)))
    expected = [exact_update(c, x, 0.75, 0.5, b, w) for c, x, b, w in zip(factors, rows, bias, weights, strict=True)]
    trace, nonfinite = ops.factor_update_(factors, rows, 0.75, 0.5, bias=bias, weights=weights)
    assert nonfinite.tolist() == [0] * len(columns)
    tolerance = 1e-14 if dtype == torch.float64 else 2e-6
    for block, exact, t in zip(factors, expected, trace, strict=True):
        assert torch.equal(block, block.T)
        assert (block.double() - exact).norm() <= tolerance * exact.norm()
        assert abs(float(t - block.trace())) <= 1e-5 * abs(float(t))


def test_factor_update_takes_any_strides(backend: str) -> None:
    base = torch.randn(40, 60)
    rows = [
        base.T[3:50:2, 1:30:3],
        base[:, 5:6].expand(40, 7),
        base[1:2].expand(9, 60),
        base.flatten()[1:36].view(5, 7),
    ]
    factors = BlockDiagonal.zeros([r.shape[1] for r in rows])
    ops.factor_update_(factors, rows, 0.0, 1.0)
    for block, x in zip(factors, rows, strict=True):
        assert relative_error(block, x.double().T @ x.double()) < 1e-6


def test_zero_decay_overwrites_what_was_there(backend: str) -> None:
    factors = BlockDiagonal.pack([torch.full((20, 20), torch.nan), torch.full((3, 3), torch.inf)])
    ops.factor_update_(factors, [torch.ones(2, 20), torch.ones(2, 3)], 0.0, 1.0)
    assert (factors[0] == 2).all()
    assert (factors[1] == 2).all()


def test_nonfinite_rows_are_flagged_per_block(backend: str) -> None:
    rows = [torch.randn(50, 12) for _ in range(4)]
    rows[1][49, 11] = torch.nan
    rows[2][0, 0] = torch.inf
    rows[3][7, 3] = 1e30  # its square overflows
    factors = BlockDiagonal.zeros([12] * 4)
    assert ops.factor_update_(factors, rows, 1.0, 1.0).nonfinite.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding", "dilation", "groups"),
    [
        ((3, 4, 17), 3, 1, 1, 1, 1),
        ((2, 6, 9, 8), (3, 2), (1, 2), ((1, 2), (0, 1)), (1, 2), 2),
        ((2, 3, 12, 11), 3, 1, 1, 1, 1),
        ((2, 2, 13, 13), 5, 1, 2, 1, 1),
        ((1, 4, 6, 7), 1, 1, 0, 1, 1),
        ((2, 4, 7, 6), 3, 1, 1, 1, 4),
        ((2, 2, 5, 6, 4), (2, 3, 1), (1, 2, 1), (1, 1, 0), 1, 1),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution_rows_equal_patches(
    backend: str, mode: str, shape, kernel, stride, padding, dilation, groups, channels_last: bool
) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    exact = ConvRows(x, kernel, stride, padding, dilation, groups, mode)
    rows = ConvRows(x.float(), kernel, stride, padding, dilation, groups, mode)
    m, d = rows.shape
    factors = BlockDiagonal.zeros([d + 1] * groups)
    ops.factor_update_(factors, [rows], 0.0, 1 / m, bias=True)
    for group, block in enumerate(factors):
        patches = exact.patches(group)
        patches = torch.cat([patches, torch.ones(m, 1, dtype=torch.float64)], 1)
        assert relative_error(block, patches.T @ patches / m) < 1e-6
        assert torch.equal(block, block.T)


def test_images_without_channels_leave_the_bias(backend: str) -> None:
    factors = BlockDiagonal.zeros([1])
    ops.factor_update_(factors, [ConvRows(torch.ones(8, 0, 32, 32), 3, 1, 1)], 0.0, 1.0, bias=True)
    assert factors[0].item() == 8 * 32 * 32


def test_convolution_rows_are_what_the_convolution_sees() -> None:
    conv = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect").double()
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
    rows = ConvRows(x, 3, 2, 1, 2, 2, "reflect")
    weights = conv.weight.chunk(2)
    y = torch.cat([rows.patches(g) @ weights[g].flatten(1).T for g in range(2)], 1) + conv.bias
    assert torch.allclose(y.view(2, *rows.out, 6).movedim(-1, 1), conv(x))


# ---- commit_ --------------------------------------------------------------------------------------------------------


def test_commit_blends_and_clears(backend: str) -> None:
    sizes = [1, 4, 17, 40]
    factors = BlockDiagonal.pack([torch.randn(n, n) for n in sizes])
    pending = BlockDiagonal.pack([torch.randn(n, n) for n in sizes])
    decay = torch.tensor([0.0, 0.5, 1.0, 0.25])
    scale = torch.tensor([1.0, 0.5, 0.0, 2.0])
    factors[0].fill_(torch.nan)  # decay 0 overwrites
    expected = [
        (s * p if d == 0 else d * c + s * p)
        for c, p, d, s in zip(factors.clone(), pending.clone(), decay, scale, strict=True)
    ]
    trace = ops.commit_(factors, pending, decay, scale)
    for block, exact, t in zip(factors, expected, trace, strict=True):
        assert torch.allclose(block, exact)
        assert torch.allclose(t, exact.trace(), atol=1e-5)
    assert not pending.data.any()


def test_closed_gate_commits_nothing(backend: str) -> None:
    factors = BlockDiagonal.pack([torch.randn(n, n) for n in (2, 30)])
    before = factors.clone()
    pending = BlockDiagonal.pack([torch.full((n, n), torch.nan) for n in (2, 30)])
    trace = ops.commit_(factors, pending, 0.5, 0.5, torch.zeros(1, dtype=torch.int32))
    assert torch.equal(factors.data, before.data)
    assert torch.allclose(trace, torch.stack([b.trace() for b in before]))
    assert not pending.data.any()


# ---- precondition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
def test_precondition(backend: str, dtype: torch.dtype, in_place: bool) -> None:
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [(1, 1), (2, 9), (16, 8), (33, 70), (64, 65), (130, 31), (5, 200)]
    g = BlockDiagonal.pack([spd(r, 10.0, torch.Generator().manual_seed(r)).to(accumulate) for r, _ in shapes])
    a = BlockDiagonal.pack([spd(c, 10.0, torch.Generator().manual_seed(c)).to(accumulate) for _, c in shapes])
    full = [torch.randn(r, c).to(dtype) for r, c in shapes]
    grads: list[ops.Gradient] = [v.clone() for v in full]
    for i in (1, 3, 6):
        grads[i] = (full[i][:, :-1].clone(), full[i][:, -1].clone())
    grads[4] = full[4].T.contiguous().T  # column-major
    results, dot = ops.precondition(grads, g, a, out=grads if in_place else None)
    tolerance = {torch.float32: 3e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3}[dtype]
    for i, v in enumerate(full):
        exact = g[i].double() @ v.double() @ a[i].double()
        u = results[i]
        if isinstance(u, tuple):
            u = torch.cat([u[0], u[1][:, None]], 1)
        assert relative_error(u, exact) < tolerance
        scale = float(v.double().norm() * exact.norm())
        assert (
            abs(float(dot[i]) - float((v.double() * exact).sum()))
            <= max(tolerance, 1e-6) * scale * (dtype != torch.float64) + 1e-12 * scale
        )


def test_precondition_flattens_convolution_weights(backend: str) -> None:
    weight = torch.randn(6, 4, 3, 2)
    bias = torch.randn(6)
    g = BlockDiagonal.pack([spd(6, 10.0, torch.Generator().manual_seed(1)).float()])
    a = BlockDiagonal.pack([spd(25, 10.0, torch.Generator().manual_seed(2)).float()])
    v = torch.cat([weight.flatten(1), bias[:, None]], 1)
    expected = g[0] @ v @ a[0]
    for w in (weight, weight.to(memory_format=torch.channels_last)):
        ((u, u_bias),) = ops.precondition([(w, bias)], g, a).results
        assert torch.allclose(u.flatten(1), expected[:, :-1], atol=1e-5)
        assert torch.allclose(u_bias, expected[:, -1], atol=1e-5)


def test_empty_lists(backend: str) -> None:
    none = BlockDiagonal.zeros([])
    assert len(ops.damped_inverse(none, 1.0).info) == 0
    assert len(ops.factor_update_(none, [], 1.0, 1.0).trace) == 0
    assert len(ops.precondition([], none, none).dot) == 0
    assert len(ops.commit_(none, BlockDiagonal.zeros([]), 1.0, 1.0)) == 0


def test_launches_do_not_grow_with_the_number_of_blocks(simulator: Simulator) -> None:
    from conftest import cpu_table

    def launches(count: int) -> int:
        sizes = [3, 12, 20, 50] * count
        blocks = BlockDiagonal.pack([torch.eye(n) for n in sizes])
        before = simulator.launches()
        ops.factor_update_(blocks, [torch.randn(9, n) for n in sizes], 1.0, 1.0)
        ops.damped_inverse(blocks, 1.0)
        ops.precondition([torch.randn(n, n) for n in sizes], blocks, blocks)
        ops.commit_(blocks, blocks.clone(), 1.0, 1.0)
        return simulator.launches() - before

    with cpu_table(simulator.table):
        assert launches(1) == launches(10)
