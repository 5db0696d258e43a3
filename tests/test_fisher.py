"""The factors are the Fisher matrix: against automatic differentiation, against sampling, against another package."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from fisher import exact_fisher, gather, kronecker_block, root_bernoulli, root_categorical, root_gaussian
from torch import Tensor, nn

from kfac_fast import Bernoulli, Categorical, Gaussian, Preconditioner

DOUBLE = torch.float64


def preconditioner(model: nn.Module, **options) -> Preconditioner:
    return Preconditioner(model, **{"fisher": "exact", "likelihood": "gaussian", "inverse_every": 1, **options})


def test_deep_linear_network_is_exact() -> None:
    """With squared error g does not depend on the data, so every block is A ⊗ G exactly (algorithm.md §9)."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3, bias=False), nn.Linear(3, 2)).double()
    x = torch.randn(7, 4, dtype=DOUBLE)
    pre = preconditioner(model)
    gather(pre, model, lambda y: Gaussian().loss(y, torch.zeros_like(y)), x)
    for i, layer in enumerate(pre.layers):
        exact = exact_fisher(model, layer, x, root_gaussian)
        assert torch.allclose(kronecker_block(pre, i), exact, atol=1e-12)


@pytest.mark.parametrize(
    ("likelihood", "output_fisher", "target"),
    [
        ("categorical", root_categorical, lambda y: torch.zeros(len(y), dtype=torch.long)),
        ("bernoulli", root_bernoulli, torch.zeros_like),
        ("gaussian", root_gaussian, torch.zeros_like),
    ],
)
def test_one_example_is_exact(likelihood: str, output_fisher, target) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x = torch.randn(1, 4, dtype=DOUBLE)
    pre = preconditioner(model, likelihood=likelihood)
    loss = {"categorical": Categorical(), "bernoulli": Bernoulli(), "gaussian": Gaussian()}[likelihood].loss
    gather(pre, model, lambda y: loss(y, target(y)), x)
    for i, layer in enumerate(pre.layers):
        assert torch.allclose(kronecker_block(pre, i), exact_fisher(model, layer, x, output_fisher), atol=1e-12)


class PixelNet(nn.Module):
    """A linear convolutional network with an output vector per pixel."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x).movedim(1, -1)


def test_per_pixel_loss_is_exact_in_the_last_convolution() -> None:
    """g of a pixel does not depend on the data: A ⊗ G with R/M = 1."""
    model = PixelNet(nn.Conv2d(3, 2, 3, stride=2, padding=1)).double()
    x = torch.randn(4, 3, 6, 5, dtype=DOUBLE)
    pre = preconditioner(model)
    gather(pre, model, lambda y: Gaussian().loss(y, torch.zeros_like(y)), x)
    exact = exact_fisher(model, pre.layers[0], x, root_gaussian)
    assert torch.allclose(kronecker_block(pre, 0), exact, atol=1e-12)


@pytest.mark.parametrize("mean_pool", [False, True])
def test_pooled_convolution_is_exact_where_positions_are_uncorrelated(mean_pool: bool) -> None:
    """KFC's assumption holds by construction, so its scale R/M = T shows (Grosse & Martens 2016, sec. 3)."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv1d(2, 3, 1, bias=False)
            self.out = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.convolution(x)
            return self.out(h.mean(-1) if mean_pool else h.sum(-1))

    # Columns of a Hadamard matrix: inputs at different positions are orthogonal over the data set.
    h = torch.tensor([[1.0, 1], [1, -1]], dtype=DOUBLE)
    h8 = torch.kron(torch.kron(h, h), h)
    x = h8[:, :8].reshape(8, 2, 4)
    model = Pooled().double()
    pre = preconditioner(model)
    gather(pre, model, lambda y: Gaussian().loss(y, torch.zeros_like(y)), x)
    exact = exact_fisher(model, pre.layers[0], x, root_gaussian)
    assert torch.allclose(kronecker_block(pre, 0), exact, atol=1e-12)


def test_per_position_categorical_outputs_of_a_language_model() -> None:
    """Outputs [N, S, C]: tokens are loss terms; one example and one token make the block exact."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    x = torch.randn(1, 1, 3, dtype=DOUBLE)
    pre = preconditioner(model, likelihood="categorical")
    gather(pre, model, lambda y: Categorical().loss(y, torch.zeros(1, 1, dtype=torch.long)), x)
    for i, layer in enumerate(pre.layers):
        assert torch.allclose(kronecker_block(pre, i), exact_fisher(model, layer, x, root_categorical), atol=1e-12)


class Mixing(nn.Module):
    """Positions of an example influence each other, as in attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3, bias=False)
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:  # [N, S, 2]
        h = self.first(x)
        return self.last(torch.tanh(h + h.mean(1, keepdim=True)))


def test_exact_fisher_keeps_loss_terms_of_an_example_apart() -> None:
    model = Mixing().double()
    x = torch.randn(3, 4, 2, dtype=DOUBLE)
    pre = preconditioner(model)
    gather(pre, model, lambda y: Gaussian().loss(y, torch.zeros_like(y)), x)
    # G of the first layer, term by term: Σ over loss terms and outputs of g gᵀ at every position, over M.
    hidden = model.first(x).detach().requires_grad_()
    y = model.last(torch.tanh(hidden + hidden.mean(1, keepdim=True)))
    g = torch.zeros(3, 3, dtype=DOUBLE)
    for n in range(3):
        for s in range(4):
            for c in range(2):
                rows = torch.autograd.grad(y[n, s, c], hidden, retain_graph=True)[0].reshape(-1, 3)
                g += rows.T @ rows / 12
    assert torch.allclose(pre.factors.running[pre.factors.count], g, atol=1e-12)


def test_running_average_of_a_later_step() -> None:
    """ε_k = min(1 − 1/k, decay): the plain mean of the first batches, then exponential (sec. 5)."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    batches = [torch.randn(5, 3, dtype=DOUBLE) for _ in range(4)]
    pre = preconditioner(model, decay=0.6)
    expected = None
    for k, x in enumerate(batches, start=1):
        gather(pre, model, lambda y: Gaussian().loss(y, torch.zeros_like(y)), x)
        rows = torch.cat([x, torch.ones(5, 1, dtype=DOUBLE)], 1)
        moment = rows.T @ rows / 5
        epsilon = min(1 - 1 / k, 0.6)
        expected = moment if expected is None else epsilon * expected + (1 - epsilon) * moment
        assert torch.allclose(pre.factors.running[0], expected, atol=1e-12)
    assert pre.factors.updates.tolist() == [4.0] * 4


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_sampled_targets_approach_the_exact_factor(likelihood: str) -> None:
    """The error falls like 1/√samples: a hundred times the samples, a tenth of the error."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x = torch.randn(2, 3, dtype=DOUBLE)
    losses = {"categorical": Categorical(), "bernoulli": Bernoulli(), "gaussian": Gaussian()}

    def loss(y: Tensor) -> Tensor:
        target = torch.zeros(len(y), dtype=torch.long) if likelihood == "categorical" else torch.zeros_like(y)
        return losses[likelihood].loss(y, target)

    exact = preconditioner(model, likelihood=likelihood)
    gather(exact, model, loss, x)
    target = exact.factors.running.data
    exact.close()

    def error(samples: int) -> float:
        squares = 0.0
        for seed in range(8):
            pre = preconditioner(model, likelihood=likelihood, fisher="mc", seed=seed)
            gather(pre, model, loss, x.repeat(samples, 1))
            pre.close()
            squares += float((pre.factors.running.data - target).square().sum())
        return math.sqrt(squares)

    ratio = error(10) / error(1000)
    assert 5 < ratio < 20
    assert error(1000) < 0.2 * float(target.norm())


def test_empirical_fisher_is_the_gradients_of_the_loss() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(6, 3, dtype=DOUBLE)
    y = torch.randint(3, (6,))
    results = []
    for reduction in ("mean", "sum"):
        pre = preconditioner(model, likelihood="categorical", fisher="empirical", loss_reduction=reduction)
        gather(pre, model, lambda z, r=reduction: F.cross_entropy(z, y, reduction=r), x)
        pre.close()
        results.append(pre.factors.running.clone())
    g = torch.zeros(3, 3, dtype=DOUBLE)
    for i in range(6):
        z = model(x[i]).detach().requires_grad_()
        gradient = torch.autograd.grad(F.cross_entropy(z, y[i]), z)[0]
        g += torch.outer(gradient, gradient) / 6
    for factors in results:
        assert torch.allclose(factors[-1], g, atol=1e-12)
    assert torch.allclose(results[0].data, results[1].data, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_agrees_with_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is a test extra")
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 9, 6),
        nn.Tanh(),
        nn.Linear(6, 4),
    ).double()
    x = torch.randn(5, 2, 6, 6, dtype=DOUBLE)
    y = torch.randint(4, (5,))
    pre = preconditioner(model, likelihood="categorical")
    gather(pre, model, lambda z: F.cross_entropy(z, y), x)
    pre.close()
    for i, layer in enumerate(pre.layers):
        operator = curvlinops.KFACLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            list(layer.parameters.values()),
            [(x, y)],
            fisher_type=curvlinops.FisherType.TYPE2,
            kfac_approx=curvlinops.KFACType.EXPAND,
            separate_weight_and_bias=False,
        )
        theirs = operator @ torch.eye(operator.shape[1], dtype=DOUBLE)
        # They order a block as weight then bias; G ⊗ A has the bias as last column of every row.
        a, g = layer.a_size, layer.g_size
        position = torch.arange(a * g).view(g, a)
        order = torch.cat([position[:, :-1].flatten(), position[:, -1]])
        ours = kronecker_block(pre, i)[order][:, order]
        assert torch.allclose(ours, theirs, atol=1e-10)
