"""EKFAC: S against automatic differentiation, nearer to the exact Fisher than K-FAC, and its bases through training."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from fisher import exact_blocks, root_categorical, root_gaussian
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from kfac_fast import KFAC, Categorical, Gaussian, KFACWarning, Preconditioner
from kfac_fast.approximations import EigenFisher

DOUBLE = torch.float64


class Positions(nn.Module):
    """Weights shared over the positions of an example, whose gradients are correlated."""

    def __init__(self, *, twice: bool = False, per_position: bool = False, batch_dim: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.last = nn.Linear(3, 2)
        self.twice = twice
        self.per_position = per_position
        self.batch_dim = batch_dim

    def forward(self, x: Tensor) -> Tensor:  # [N, S, 3]
        h = torch.tanh(self.first(x.transpose(0, self.batch_dim)))
        if self.twice:
            h = torch.tanh(self.first(h))
        h = h.transpose(0, self.batch_dim)
        h = h + h.mean(1, keepdim=True)
        return self.last(h if self.per_position else h.sum(1))


class Attending(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.batch_dim = 0 if batch_first else 1

    def forward(self, x: Tensor) -> Tensor:  # [N, S, 4]
        x = x.transpose(0, self.batch_dim)
        return self.attention(x, x, x, need_weights=False)[0].transpose(0, self.batch_dim).sum(1)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 2, stride=2, groups=2, bias=False), nn.Tanh(),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3))


CASES = {
    "mlp": (mlp, (12, 4)),
    "mlp, categorical": (mlp, (12, 4)),
    "convolutions": (convolutions, (6, 2, 4, 4)),
    "one-dimensional": (lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(12, 2)), (7, 2, 5)),
    "positions": (Positions, (8, 4, 3)),
    "positions first": (lambda: Positions(batch_dim=1), (8, 4, 3)),
    "a loss term per position": (lambda: Positions(per_position=True), (6, 4, 3)),
    "attention": (lambda: Attending(batch_first=True), (6, 3, 4)),
    "attention, positions first": (lambda: Attending(batch_first=False), (6, 3, 4)),
    "called twice": (lambda: Positions(twice=True), (8, 4, 3)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Tensor]:
    make, shape = CASES[request.param]
    return request.param, make().double(), torch.randn(*shape, dtype=DOUBLE)


def gathered(name: str, model: nn.Module, x: Tensor, **options) -> tuple[Preconditioner, EigenFisher]:
    """After two equal batches without decay: bases and S are of that batch."""
    likelihood = "categorical" if "categorical" in name else "gaussian"
    options = {"fisher": "exact", "decay": 0.0, "damping": 0.05, "likelihood": likelihood, **options}
    pre = Preconditioner(model, approximation="ekfac", **options)
    for _ in range(2):
        model.zero_grad()
        y = model(x)
        if "categorical" in name:
            Categorical().loss(y, torch.zeros(len(y), dtype=torch.long)).backward()
        else:
            Gaussian().loss(y, torch.ones_like(y)).backward()
        pre.natural_gradients(pre.damping)
    assert isinstance(pre.approximation, EigenFisher)
    return pre, pre.approximation


def bases(fisher: EigenFisher, block: int) -> tuple[Tensor, Tensor]:
    return fisher.bases[block], fisher.bases[fisher.factors.count + block]


def each_block(name: str, model: nn.Module, x: Tensor, pre: Preconditioner, fisher: EigenFisher):
    """The exact Fisher, the approximation of EKFAC and that of K-FAC, all undamped, of every block."""
    root = root_categorical if "categorical" in name else root_gaussian
    exact_of_all = [exact for layer in pre.layers for exact in exact_blocks(model, layer, x, root)]
    for block, exact in enumerate(exact_of_all):
        u_a, u_g = bases(fisher, block)
        basis = torch.kron(u_g, u_a)
        ekfac = basis @ torch.diag(fisher.spectra.running[block].flatten()) @ basis.T
        a, g = fisher.factors.running[block], fisher.factors.running[fisher.factors.count + block]
        yield exact, basis, ekfac, torch.kron(g, a)


def test_s_is_the_diagonal_of_the_exact_fisher_in_the_basis(case) -> None:
    name, model, x = case
    pre, fisher = gathered(*case)
    for block, (exact, basis, _, _) in enumerate(each_block(name, model, x, pre, fisher)):
        diagonal = (basis.T @ exact @ basis).diagonal()
        s = fisher.spectra.running[block].flatten()
        assert torch.allclose(s, diagonal, rtol=1e-9, atol=1e-12 * float(diagonal.max()))


def test_it_is_nearer_to_the_exact_fisher_than_kfac(case) -> None:
    name, model, x = case
    pre, fisher = gathered(*case)
    gains = []
    for exact, _, ekfac, kfac in each_block(name, model, x, pre, fisher):
        distance, of_kfac = float((exact - ekfac).norm()), float((exact - kfac).norm())
        assert distance <= of_kfac * (1 + 1e-9) + 1e-12
        gains.append(distance / of_kfac if of_kfac > 1e-9 else 1.0)
    assert min(gains) < 0.95


def test_the_step_is_the_inverse_of_the_damped_matrix(case) -> None:
    name, model, x = case
    pre, fisher = gathered(*case)
    gradients = pre.sharing.matrices([p.grad for p in pre.covered])[0]
    dot = pre.precondition([p.grad for p in pre.covered])
    for block, (_, _, ekfac, _) in enumerate(each_block(name, model, x, pre, fisher)):
        v, u = (as_flat(m[block]) for m in (gradients, pre.sharing.matrices(pre.results)[0]))
        expected = torch.linalg.solve(ekfac + pre.damping * torch.eye(len(ekfac), dtype=DOUBLE), v)
        assert torch.allclose(u, expected, rtol=1e-9, atol=1e-12)
        assert float(dot[block]) == pytest.approx(float(v @ expected), rel=1e-9)


def as_flat(gradient) -> Tensor:
    weight, bias = gradient if isinstance(gradient, tuple) else (gradient, None)
    weight = weight.flatten(1)
    return (weight if bias is None else torch.cat([weight, bias[:, None]], 1)).flatten()


# Those with one vector of outputs per example, and with modules of one weight.
SIMPLE = ["mlp", "convolutions", "one-dimensional", "positions", "positions first", "called twice"]


@pytest.mark.parametrize("name", SIMPLE)
def test_empirical_s_is_the_square_of_per_example_gradients(name: str) -> None:
    make, shape = CASES[name]
    model, x = make().double(), torch.randn(*shape, dtype=DOUBLE)
    pre, fisher = gathered(name, model, x, fisher="empirical")
    plain = copy.deepcopy(model)
    parameters = {key: p.detach() for key, p in plain.named_parameters()}

    def loss(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
        y = functional_call(plain, parameters, (example[None],))
        return Gaussian().loss(y, torch.ones_like(y))

    of_examples = vmap(grad(loss), (None, 0))(parameters, x)
    for n, layer in enumerate(pre.layers):
        gradients = [of_examples[f"{layer.name}.{key}"] for key in layer.parameters]
        for group in range(len(layer.blocks)):
            block = fisher.factors.first_block[n] + group
            parts = [g.chunk(len(layer.blocks), 1)[group].flatten(2) if g.ndim > 2 else g[..., None] for g in gradients]
            u_a, u_g = bases(fisher, block)
            expected = (u_g.T @ torch.cat(parts, -1) @ u_a).square().mean(0)
            assert torch.allclose(fisher.spectra.running[block], expected, rtol=1e-9, atol=1e-15)


def test_pieces_of_any_size_and_either_order_of_products_agree(case, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, x = case
    _, whole = gathered(*case)
    monkeypatch.setattr("kfac_fast.approximations.spectra.PIECE_BYTES", 1)
    _, cut = gathered(case[0], copy.deepcopy(model), x)
    for one, other in zip(whole.spectra.running, cut.spectra.running, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-15)


def test_many_positions_turn_the_gradients_instead_of_the_rows() -> None:
    """Twenty positions of four inputs: the rows are more work than the gradient. The reference is the exact Fisher."""
    model = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(40, 2)).double()
    x = torch.randn(5, 1, 20, dtype=DOUBLE)
    pre, fisher = gathered("long", model, x)
    assert 20 * (4**2 + 2**2) > 4 * 2 * (4 + 2)  # the rule in Spectra._add_squares
    for block, (exact, basis, _, _) in enumerate(each_block("long", model, x, pre, fisher)):
        diagonal = (basis.T @ exact @ basis).diagonal()
        assert torch.allclose(fisher.spectra.running[block].flatten(), diagonal, rtol=1e-9, atol=1e-12)


# ---- through training -----------------------------------------------------------------------------------------------


def test_first_s_is_that_of_kfac_and_counts_as_one_estimate() -> None:
    model, x = mlp().double(), torch.randn(12, 4, dtype=DOUBLE)
    pre = Preconditioner(model, approximation="ekfac", fisher="exact", likelihood="gaussian")
    fisher = pre.approximation
    Gaussian().loss(model(x), torch.zeros(12, 3, dtype=DOUBLE)).backward()
    pre.natural_gradients(0.1)
    first = [s.clone() for s in fisher.spectra.running]
    for block, s in enumerate(first):
        values = [torch.linalg.eigvalsh(fisher.factors.running[side]) for side in (block, 3 + block)]
        assert torch.allclose(s, torch.outer(values[1], values[0]), atol=1e-12)
    Gaussian().loss(model(x), torch.zeros(12, 3, dtype=DOUBLE)).backward()
    pre.update_factors()  # the bases stay
    _, own = gathered("mlp", copy.deepcopy(model), x)
    for s, before, exact in zip(fisher.spectra.running, first, own.spectra.running, strict=True):
        assert torch.allclose(s, (before + exact) / 2, atol=1e-10)


def test_a_new_basis_keeps_the_matrix_as_far_as_it_can() -> None:
    """S in the new basis is the diagonal of the old matrix; where the basis does not change, S does not."""
    model, x = mlp().double(), torch.randn(12, 4, dtype=DOUBLE)
    pre, fisher = gathered("mlp", model, x)
    old = [torch.kron(*bases(fisher, b)[::-1]) for b in range(3)]
    matrices = [u @ torch.diag(s.flatten()) @ u.T for u, s in zip(old, fisher.spectra.running, strict=True)]
    changed = torch.randn(5, 12, dtype=DOUBLE)
    fisher.factors.running[0].copy_(changed.T[:5] @ changed.T[:5].T + torch.eye(5, dtype=DOUBLE))
    fisher.factors.updates[0] += 1
    before = [s.clone() for s in fisher.spectra.running]
    pre.update_inverses([0.2] * 3)
    basis = torch.kron(*bases(fisher, 0)[::-1])
    assert not torch.allclose(basis, old[0])
    expected = (basis.T @ matrices[0] @ basis).diagonal()
    assert torch.allclose(fisher.spectra.running[0].flatten(), expected, atol=1e-12)
    assert torch.equal(fisher.spectra.running[1], before[1])


def test_another_damping_needs_no_new_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    pre, _ = gathered("mlp", mlp().double(), torch.randn(12, 4, dtype=DOUBLE))
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: pytest.fail("the factors have not changed"))
    pre.update_inverses([0.5] * 3)
    gradients = [torch.randn_like(p) for p in pre.covered]
    pre.precondition(gradients)
    small = pre.results_flat.clone()
    pre.update_inverses([50.0] * 3)
    pre.precondition(gradients)
    given = torch.cat([g.flatten() for g in gradients])
    assert torch.allclose(pre.results_flat, given / 2500, rtol=0.1)  # λ = γ² is all that counts there
    assert float(small.norm()) > 100 * float(pre.results_flat.norm())


def test_sampled_s_averages_to_the_exact_one() -> None:
    model, x = mlp().double(), torch.randn(12, 4, dtype=DOUBLE)
    _, exact = gathered("mlp", model, x)
    for hook in list(model._forward_hooks):
        model._forward_hooks.pop(hook)
    pre, fisher = gathered("mlp", model, x, fisher="mc", decay=0.999)
    fisher.bases.data.copy_(exact.bases.data)
    fisher.spectra.updates.zero_()
    errors = []
    for samples in (5, 500):
        fisher.spectra.updates.zero_()
        for _ in range(samples):
            Gaussian().loss(model(x), torch.ones(12, 3, dtype=DOUBLE)).backward()
            pre.update_factors()
        s, t = (torch.cat([m.flatten() for m in f.spectra.running]) for f in (fisher, exact))
        errors.append(float((s - t).norm() / t.norm()))
    assert errors[1] < min(0.1, errors[0] / 3)


def test_factors_that_are_not_finite_keep_the_last_basis() -> None:
    pre, fisher = gathered("mlp", mlp().double(), torch.randn(12, 4, dtype=DOUBLE))
    before = fisher.bases.data.clone(), fisher.spectra.running[1].clone()
    fisher.factors.running[4][0, 0] = math.nan  # G of the second block
    fisher.factors.updates[[1, 4]] += 1
    with pytest.warns(KFACWarning, match="the factors of 2 have no eigenvectors"):
        pre.update_inverses([0.2] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pre.update_inverses([0.2] * 3)
    assert fisher.failures().tolist() == [0, 2, 0]
    assert torch.equal(fisher.bases.data, before[0])
    assert torch.equal(fisher.spectra.running[1], before[1])
    pre.precondition([torch.randn_like(p) for p in pre.covered])
    assert all(u.isfinite().all() for u in pre.results)


def test_gradients_whose_squares_overflow_commit_nothing() -> None:
    model = nn.Linear(3, 2)
    pre = Preconditioner(model, approximation="ekfac", fisher="empirical", likelihood="gaussian", loss_reduction="sum")
    x = torch.randn(6, 3)
    for large in (1.0, 1.0, 1e5):  # inputs of 1e5 and gradients of 1e16: their squares are finite, S is not
        before = pre.approximation.spectra.running[0].clone(), pre.factors.running.data.clone()
        (Gaussian().loss(model(large * x), torch.zeros(6, 2)) * (1.0 if large == 1 else 1e11)).backward()
        pre.step()
        model.zero_grad()
    assert torch.equal(pre.approximation.spectra.running[0], before[0])
    assert torch.equal(pre.factors.running.data, before[1])


def test_it_trains_in_float32_and_under_autocast() -> None:
    torch.manual_seed(0)
    model = convolutions()
    optimizer = KFAC(model, approximation="ekfac", lr=0.1)
    x, y = torch.randn(32, 2, 4, 4), torch.randint(3, (32,))
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=step % 2 == 1):
            out = model(x)
        loss = F.cross_entropy(out.float(), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
