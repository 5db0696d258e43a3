"""The block-tridiagonal inverse: against dense matrices, against the exact Fisher, and on what is no chain."""

from __future__ import annotations

import copy
import math
import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from fisher import full_fisher, root_gaussian
from recompute import assert_unnoticed
from torch import Tensor, nn

from kfac_fast import KFAC, Gaussian, KFACWarning, Preconditioner
from kfac_fast.approximations import BlockTridiagonalFisher

DOUBLE = torch.float64


def half_square(y: Tensor) -> Tensor:
    return Gaussian().loss(y, torch.zeros_like(y))


def chain(*widths: int, activation: type[nn.Module] = nn.Tanh, biases: bool = False) -> nn.Sequential:
    """The second layer has no bias, or all have one."""
    modules: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        modules += [nn.Linear(inputs, outputs, bias=biases or i != 1), activation()]
    return nn.Sequential(*modules[:-1]).double()


def tridiagonal(model: nn.Module, x: Tensor, **options) -> tuple[Preconditioner, BlockTridiagonalFisher]:
    """With statistics of one batch and inverses."""
    options = {"fisher": "exact", "likelihood": "gaussian", "damping": 0.05, **options}
    pre = Preconditioner(model, approximation="block_tridiagonal", **options)
    model.zero_grad()
    half_square(model(x)).backward()
    pre.natural_gradients(pre.damping)
    assert isinstance(pre.approximation, BlockTridiagonalFisher)
    return pre, pre.approximation


def blocks(fisher: BlockTridiagonalFisher, gamma: float) -> tuple[list[Tensor], list[Tensor]]:
    """Damped diagonal blocks and undamped cross blocks in the order of the chain, as dense matrices."""
    factors, diagonal = fisher.factors, []
    for i in fisher.order.values():
        a, g = factors.running[i], factors.running[factors.count + i]
        pi = math.sqrt(float(a.trace() / len(a)) / float(g.trace() / len(g)))
        damped = [c + d * torch.eye(len(c), dtype=DOUBLE) for c, d in ((g, gamma / pi), (a, pi * gamma))]
        diagonal.append(torch.kron(*damped))
    return diagonal, [torch.kron(g, a) for g, a in zip(fisher.cross.g, fisher.cross.a, strict=True)]


def dense_inverse(diagonal: list[Tensor], cross: list[Tensor]) -> Tensor:
    """Ξᵀ Λ Ξ from its definition (sec. 4.3)."""
    psi = [c @ torch.linalg.inv(d) for c, d in zip(cross, diagonal[1:], strict=True)]
    sigma = [d - p @ e @ p.T for d, p, e in zip(diagonal, psi, diagonal[1:], strict=False)] + [diagonal[-1]]
    lam = torch.block_diag(*[torch.linalg.inv(s) for s in sigma])
    xi = torch.eye(len(lam), dtype=DOUBLE)
    row = 0
    for p in psi:
        xi[row : row + p.shape[0], row + p.shape[0] : row + sum(p.shape)] = -p
        row += p.shape[0]
    return xi.T @ lam @ xi


def flat(tensors: list[Tensor]) -> Tensor:
    """All matrices with the bias as last column, in the order of a chain that registers its layers in order."""
    parts = []
    for t in tensors:
        if t.ndim == 2:
            parts.append(t)
        else:
            parts[-1] = torch.cat([parts[-1], t[:, None]], 1)
    return torch.cat([p.flatten() for p in parts])


@pytest.mark.parametrize("widths", [(4, 5, 3), (6, 3, 4)])
def test_two_layers_are_the_explicit_matrix(widths: tuple[int, ...]) -> None:
    model = chain(*widths)
    pre, fisher = tridiagonal(model, torch.randn(40, widths[0], dtype=DOUBLE))
    (first, last), (cross,) = blocks(fisher, math.sqrt(pre.damping))
    explicit = torch.cat([torch.cat([first, cross], 1), torch.cat([cross.T, last], 1)])
    gradient = flat([p.grad for p in pre.covered])
    expected = torch.linalg.solve(explicit, gradient)
    assert torch.allclose(flat(pre.results), expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))
    assert cross.norm() > 0.05 * last.norm()  # so that the test sees them


@pytest.mark.parametrize("widths", [(4, 6, 3, 2), (3, 4, 5, 4, 3)])
def test_longer_chains_are_the_dense_product(widths: tuple[int, ...]) -> None:
    model = chain(*widths)
    pre, fisher = tridiagonal(model, torch.randn(40, widths[0], dtype=DOUBLE))
    diagonal, cross = blocks(fisher, math.sqrt(pre.damping))
    inverse = dense_inverse(diagonal, cross)
    gradient = flat([p.grad for p in pre.covered])
    expected = inverse @ gradient
    assert torch.allclose(flat(pre.results), expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))
    # Its inverse agrees with the Fisher matrix on the diagonal and beside it (sec. 4.3).
    fitted = torch.linalg.inv(inverse)
    ends = torch.tensor([0, *[len(d) for d in diagonal]]).cumsum(0).tolist()
    for i, d in enumerate(diagonal):
        here = slice(ends[i], ends[i + 1])
        assert torch.allclose(fitted[here, here], d, atol=1e-8)
        if i < len(cross):
            assert torch.allclose(fitted[here, ends[i + 1] : ends[i + 2]], cross[i], atol=1e-8)
    # ⟨V, U⟩ adds up to the quadratic form.
    dot = fisher.apply(*(2 * [_matrices(pre)]))
    assert float(dot.sum()) == pytest.approx(float(gradient @ expected), rel=1e-8)


def _matrices(pre: Preconditioner) -> list:
    return pre.sharing.matrices([p.grad.clone() for p in pre.covered])[0]


def test_in_a_deep_linear_net_it_is_the_whole_exact_fisher() -> None:
    """There g does not depend on the data, and a layer tells all about its neighbours: undamped, F̂ = F."""
    model = chain(4, 4, 3, 3, activation=nn.Identity, biases=True)
    x = torch.randn(20, 4, dtype=DOUBLE)
    _, fisher = tridiagonal(model, x)
    exact = full_fisher(model, x, root_gaussian)
    diagonal, cross = blocks(fisher, 0.0)
    ends = torch.tensor([0, *[len(d) for d in diagonal]]).cumsum(0).tolist()
    one, two, three = (slice(a, b) for a, b in pairwise(ends))
    for here, d in zip((one, two, three), diagonal, strict=True):
        assert torch.allclose(exact[here, here], d, atol=1e-12)
    assert torch.allclose(exact[one, two], cross[0], atol=1e-12)
    assert torch.allclose(exact[two, three], cross[1], atol=1e-12)
    # What the approximation says about layers two apart: Ψ₁₂ Ψ₂₃ F₃₃ = F₁₂ F₂₂⁻¹ F₂₃.
    assert torch.allclose(exact[one, three], cross[0] @ torch.linalg.inv(diagonal[1]) @ cross[1], atol=1e-9)


def test_without_cross_factors_it_is_block_diagonal() -> None:
    model = chain(5, 7, 4, 3)
    pre, fisher = tridiagonal(model, torch.randn(30, 5, dtype=DOUBLE))
    with_cross = pre.results_flat.clone()
    for moments in (*fisher.cross.a, *fisher.cross.g):
        moments.zero_()
    pre.update_inverses([0.2] * 3)
    pre.precondition([p.grad for p in pre.covered])
    diagonal = Preconditioner(model, fisher="exact", likelihood="gaussian")
    diagonal.factors.running.data.copy_(pre.factors.running.data)
    diagonal.factors.trace.copy_(pre.factors.trace)
    diagonal.factors.updates.fill_(1)
    diagonal.update_inverses([0.2] * 3)
    diagonal.precondition([p.grad for p in pre.covered])
    assert torch.equal(pre.results_flat, diagonal.results_flat)
    assert not torch.allclose(with_cross, diagonal.results_flat, rtol=1e-2)


# ---- cross factors --------------------------------------------------------------------------------------------------


def moments(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """A₀₁ and G₁₂ of a net of two layers under the exact Gaussian Fisher, recomputed."""
    ones = torch.ones(len(x), 1, dtype=DOUBLE)
    z = model[0](x)
    h = model[1](z)
    a = torch.cat([x, ones], 1).T @ h / len(x)
    g = torch.zeros(z.shape[1], model[2].out_features, dtype=DOUBLE)
    for unit in torch.eye(model[2].out_features, dtype=DOUBLE):
        (rows,) = torch.autograd.grad(model[2](h), z, unit.expand(len(x), -1), retain_graph=True)
        g += torch.outer(rows.sum(0), unit) / len(x)
    return a.detach(), g


def test_cross_factors_are_the_moments_of_both_layers_rows() -> None:
    model, x = chain(4, 5, 3), torch.randn(12, 4, dtype=DOUBLE)
    a, g = moments(model, x)
    for pieces in (1, 3):
        pre = Preconditioner(model, approximation="block_tridiagonal", fisher="exact", likelihood="gaussian")
        for part in x.chunk(pieces):
            (half_square(model(part)) / pieces).backward()
        pre.step()
        pre.close()
        assert torch.allclose(pre.approximation.cross.a[0], a, atol=1e-12)
        assert torch.allclose(pre.approximation.cross.g[0], g, atol=1e-12)


def test_cross_factors_from_a_fraction_and_their_average() -> None:
    model, x = chain(4, 5, 3), torch.randn(12, 4, dtype=DOUBLE)
    pre = Preconditioner(
        model, approximation="block_tridiagonal", fisher="exact", likelihood="gaussian", factor_fraction=1 / 4
    )
    for _ in range(2):
        half_square(model(x)).backward()
        pre.natural_gradients(0.1)
    parts = [moments(model, x[start::4]) for start in range(2)]
    assert torch.allclose(pre.approximation.cross.a[0], (parts[0][0] + parts[1][0]) / 2, atol=1e-12)
    assert torch.allclose(pre.approximation.cross.g[0], (parts[0][1] + parts[1][1]) / 2, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_factors_of_the_empirical_fisher(reduction: str) -> None:
    model, x = chain(4, 5, 3), torch.randn(12, 4, dtype=DOUBLE)
    pre = Preconditioner(
        model, approximation="block_tridiagonal", fisher="empirical", likelihood="gaussian", loss_reduction=reduction
    )
    z = model[0](x)
    y = model[2](model[1](z))
    loss = 0.5 * y.square().sum()
    g = torch.autograd.grad(loss, (z, y))
    (half_square(model(x)) * (1 if reduction == "mean" else len(x))).backward()
    pre.step()
    assert torch.allclose(pre.approximation.cross.g[0], g[0].T @ g[1] / len(x), atol=1e-12)
    assert torch.allclose(pre.approximation.cross.a[0], moments(model, x)[0], atol=1e-12)


def test_sampled_cross_factors_average_to_the_exact_ones() -> None:
    model, x = chain(4, 5, 3), torch.randn(12, 4, dtype=DOUBLE)
    a, g = moments(model, x)
    errors = []
    for samples in (4, 400):
        pre = Preconditioner(model, approximation="block_tridiagonal", likelihood="gaussian", decay=0.999)
        for _ in range(samples):
            half_square(model(x)).backward()
            pre.update_factors()
            pre.capture.forget()
        pre.close()
        assert torch.allclose(pre.approximation.cross.a[0], a, atol=1e-12)
        errors.append(float((pre.approximation.cross.g[0] - g).norm() / g.norm()))
    assert errors[1] < min(0.15, errors[0] / 3)


def test_float32_and_half_precision_activations() -> None:
    model = chain(4, 5, 3).float()
    pre = Preconditioner(model, approximation="block_tridiagonal", fisher="exact", likelihood="gaussian", damping=0.05)
    x = torch.randn(12, 4)
    half_square(model(x)).backward()
    pre.step()
    twin = copy.deepcopy(model).double()
    _, exact = tridiagonal(twin, x.double())
    assert torch.allclose(pre.approximation.cross.a[0].double(), exact.cross.a[0], atol=1e-6)
    assert torch.allclose(pre.results[0].double(), exact_results(twin, x.double())[0], rtol=1e-3, atol=1e-5)
    pre = Preconditioner(model, approximation="block_tridiagonal", likelihood="gaussian")
    with torch.autocast("cpu", torch.bfloat16):
        loss = half_square(model(x).float())
    loss.backward()
    pre.step()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def exact_results(model: nn.Module, x: Tensor) -> list[Tensor]:
    pre, _ = tridiagonal(model, x)
    return pre.results


# ---- chains ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Three layers, wired by a function."""

    def __init__(self, wiring) -> None:
        super().__init__()
        self.c = nn.Linear(4, 4)
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


@pytest.mark.parametrize(
    "wiring",
    [
        lambda m, x: m.c(m.b(m.a(x).tanh()).tanh()),
        lambda m, x: m.c(F.dropout(m.norm(F.relu_(m.b(m.a(x).tanh()))), 0.2)),
        lambda m, x: m.c(m.b(m.a(x).sigmoid() * m.a.out_features).square() + 3) + x,
        lambda m, x: m.c(m.b(m.a(x.unsqueeze(1).expand(-1, 3, -1)).tanh()).tanh()).mean(1),
    ],
)
def test_the_order_of_the_forward_pass_counts(wiring) -> None:
    model = Block(wiring).double()
    _, fisher = tridiagonal(model, torch.randn(6, 4, dtype=DOUBLE))
    assert list(fisher.order) == ["a", "b", "c"]
    assert all(moments.norm() > 0 for moments in (*fisher.cross.a, *fisher.cross.g))


@pytest.mark.parametrize(
    ("wiring", "message"),
    [
        (lambda m, x: m.c(m.b(h := m.a(x)) + h), "layer c is fed by a and b, not by b alone"),
        (lambda m, x: m.c(m.b(m.a(x)) + x), "layer c is fed by b and the model's input, not by b alone"),
        (lambda m, x: m.b(h := m.a(x)) + m.c(h), "layer c is fed by a, not by b alone"),
        (lambda m, x: m.c(m.b(h := m.a(x))) + h, "the outputs depend on c and a, not on c alone"),
        (lambda m, x: m.b(m.a(m.a(x))), "layer c was not called in the forward pass"),
        (lambda m, x: m.c(m.b(m.a(m.a(x)))), "layer a was called 2 times in the forward pass"),
        (
            lambda m, x: m.c(m.b(m.a(x.unsqueeze(1).expand(-1, 3, -1))).mean(1)),
            r"layer b has inputs of shape \(6, 3, 4\), layer c of shape \(6, 4\): their rows do not belong together",
        ),
    ],
)
def test_what_is_no_chain_is_refused_in_the_first_forward_pass(wiring, message: str) -> None:
    model = Block(wiring).double()
    pre = Preconditioner(model, approximation="block_tridiagonal", likelihood="gaussian")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"needs a model whose layers are a chain: {message}.*'ekfac'"):
            model(torch.randn(6, 4, dtype=DOUBLE))
    pre.close()


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_chain_that_changes_later_is_refused(fisher: str) -> None:
    model = Block(lambda m, x: m.c(m.b(m.a(x)))).double()
    pre = Preconditioner(model, approximation="block_tridiagonal", likelihood="gaussian", fisher=fisher)
    x = torch.randn(6, 4, dtype=DOUBLE)
    half_square(model(x)).backward()
    pre.step()
    before = [m.clone() for m in (*pre.approximation.cross.a, *pre.approximation.cross.g, pre.factors.running.data)]
    model.wiring = lambda m, x: m.c(m.b(m.b(m.a(x))))
    with pytest.raises(ValueError, match=r"in the order \['a', 'b', 'b', 'c'\], but was a chain .* \['a', 'b', 'c'\]"):
        half_square(model(x)).backward()
    pre.step()
    after = (*pre.approximation.cross.a, *pre.approximation.cross.g, pre.factors.running.data)
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))


def test_convolutions_are_refused_at_once() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="takes chains of Linear layers, but 0 is a Conv2d"):
        KFAC(model, approximation="block_tridiagonal")


def test_looking_at_the_chain_goes_unnoticed() -> None:
    assert_unnoticed(approximation="block_tridiagonal")


def test_looking_at_the_chain_is_not_seen_by_another_preconditioner() -> None:
    model, x = chain(4, 5, 3), torch.randn(12, 4, dtype=DOUBLE)
    options = {"fisher": "exact", "likelihood": "gaussian"}
    alone, _ = tridiagonal(model, x)
    alone.close()
    several = [Preconditioner(model, approximation=a, **options) for a in ("block_tridiagonal", "block_tridiagonal")]
    half_square(model(x)).backward()
    for pre in several:
        pre.update_factors()
        assert torch.equal(pre.factors.running.data, alone.factors.running.data)
        assert torch.equal(pre.approximation.cross.g[0], alone.approximation.cross.g[0])


def test_a_single_layer_is_a_chain() -> None:
    model = nn.Linear(4, 3).double()
    pre, fisher = tridiagonal(model, torch.randn(9, 4, dtype=DOUBLE))
    (block,), _ = blocks(fisher, math.sqrt(pre.damping))
    gradient = flat([p.grad for p in pre.covered])
    assert torch.allclose(flat(pre.results), torch.linalg.solve(block, gradient), rtol=1e-8)


# ---- failures -------------------------------------------------------------------------------------------------------


def test_a_pair_that_determines_itself_is_taken_apart_and_said_once() -> None:
    """In a linear net the layers' rows determine each other, so without damping 1 − d_G d_Aᵀ reaches 0."""
    model = chain(3, 3, 3, activation=nn.Identity)
    x = torch.randn(30, 3, dtype=DOUBLE)
    with pytest.warns(KFACWarning, match="layers 0 and 2 are too strongly correlated"):
        pre, fisher = tridiagonal(model, x, damping=1e-20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pre.update_inverses([1e-10] * 2)
    assert fisher.failures().tolist() == [2, 0]
    pre.precondition([p.grad for p in pre.covered])
    diagonal = Preconditioner(copy.deepcopy(model), fisher="exact", likelihood="gaussian", damping=1e-20)
    half_square(diagonal.model(x)).backward()
    diagonal.natural_gradients(1e-20)
    assert torch.equal(pre.results_flat, diagonal.results_flat)


def test_a_pair_with_numbers_that_are_not_finite_is_taken_apart_alone() -> None:
    pre, fisher = tridiagonal(chain(4, 5, 4, 3), torch.randn(30, 4, dtype=DOUBLE))
    fisher.cross.g[0][0, 0] = math.nan
    with pytest.warns(KFACWarning, match="layers 0 and 2"):
        pre.update_inverses([0.2] * 3)
    pre.precondition([p.grad for p in pre.covered])
    assert fisher.failures().tolist() == [1, 0, 0]
    assert all(u.isfinite().all() for u in pre.results)
    fisher.cross.g[0].zero_()
    healthy = pre.results_flat.clone()
    pre.update_inverses([0.2] * 3)
    pre.precondition([p.grad for p in pre.covered])
    assert torch.equal(healthy, pre.results_flat)
