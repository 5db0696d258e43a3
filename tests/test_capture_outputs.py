"""What the outputs mean: loss terms, classes in any place, structured results."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from recompute import DOUBLE, exact, half_square, moments
from torch import Tensor, nn

from kfac_fast import KFAC, Bernoulli, Categorical, Gaussian, Likelihood, Preconditioner


def test_ignored_targets_are_not_loss_terms() -> None:
    model = nn.Linear(3, 4).double()
    x = torch.randn(6, 3, dtype=DOUBLE)
    y = torch.tensor([0, -100, 2, 3, -100, 1])
    kept = y != -100
    results = []
    for inputs, targets in ((x, y), (x[kept], y[kept])):
        pre = exact(model, likelihood="categorical")
        F.cross_entropy(model(inputs), targets).backward()
        pre.step()
        pre.close()
        results.append(pre.factors.running[1].clone())
    assert torch.allclose(results[0], results[1], atol=1e-12)


def test_confident_predictions_still_count() -> None:
    """A gradient that underflows to zero is not an ignored target: M stays the number of examples."""
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[400.0, 0.0], [0.0, 0.0]]))
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    pre = exact(model, likelihood="categorical")
    F.cross_entropy(model(x), torch.zeros(4, dtype=torch.long)).backward()
    pre.step()
    assert torch.allclose(pre.factors.running[1], 0.5 * torch.tensor([[0.25, -0.25], [-0.25, 0.25]]))


@pytest.mark.parametrize(("class_dim", "shape"), [(1, (3, 4, 5)), (-1, (3, 5, 4)), (None, (2, 4, 3, 2)), (0, (4, 6))])
def test_class_dimension(class_dim: int | None, shape: tuple[int, ...]) -> None:
    likelihood = Categorical(class_dim=class_dim)
    z = torch.randn(shape, dtype=DOUBLE)
    dim = 1 if class_dim is None else class_dim
    terms = likelihood.terms_shape(z)
    assert terms == tuple(s for i, s in enumerate(shape) if i != dim % len(shape))
    p = z.softmax(dim).movedim(dim, -1).reshape(-1, 4)
    fisher = torch.stack([v.movedim(dim, -1).reshape(-1, 4) for v in likelihood.fisher_root(z)])
    found = torch.einsum("kni,knj->nij", fisher, fisher)
    assert torch.allclose(found, torch.diag_embed(p) - torch.einsum("ni,nj->nij", p, p))
    assert likelihood.spread(torch.ones(terms)).expand(shape).shape == shape
    gradient = likelihood.sample_gradient(z, torch.Generator().manual_seed(0))
    assert torch.allclose(gradient.sum(dim), torch.zeros(()).double(), atol=1e-12)


class Elsewhere(nn.Module):
    """Logits with the classes in a given dimension of three or four."""

    def __init__(self, dim: int, positions: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.dim, self.positions = dim, positions

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).unflatten(1, self.positions).movedim(-1, self.dim)


@pytest.mark.parametrize(("dim", "positions"), [(1, (5,)), (2, (5,)), (1, (5, 1)), (3, (5, 2)), (2, (5, 2)), (1, (4,))])
def test_the_place_of_the_classes_is_found_from_the_gradient(dim: int, positions: tuple[int, ...]) -> None:
    model = Elsewhere(dim, positions).double()
    size = torch.Size(positions).numel()
    x, y = torch.randn(2, size, 3, dtype=DOUBLE), torch.randint(4, (2, *positions))
    found = []
    for options in ({}, {"likelihood": Categorical(class_dim=dim)}):
        pre = exact(model, **{"likelihood": "categorical", **options})
        F.cross_entropy(model(x).movedim(dim, 1), y).backward()
        pre.step()
        pre.close()
        found.append(pre.factors.running.data.clone())
    assert torch.equal(*found)
    p = model(x).movedim(dim, -1).reshape(-1, 4).softmax(1)
    expected = (torch.diag_embed(p) - torch.einsum("ni,nj->nij", p, p)).mean(0)
    assert torch.allclose(pre.factors.running[1], expected)


def test_a_loss_without_a_class_dimension_is_refused() -> None:
    model = Elsewhere(2, (5,))
    pre = Preconditioner(model)
    with pytest.raises(ValueError, match=r"does not sum to zero over the classes.*class_dim"):
        model(torch.randn(2, 5, 3)).square().sum().backward()
    pre.close()


def test_the_place_of_the_classes_is_seen_from_the_targets() -> None:
    z, likelihood = torch.randn(2, 4, 5), Categorical()  # [N, C, S], which the rule takes for [N, S, C]
    y = torch.randint(4, (2, 5))
    assert torch.equal(likelihood.loss(z, y), F.cross_entropy(z, y))
    assert torch.equal(likelihood.log_prob(z, y), -F.cross_entropy(z, y, reduction="none"))
    assert torch.equal(likelihood.loss(z.mT, y), F.cross_entropy(z, y))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("kind", [Gaussian, Bernoulli])
def test_masked_targets_are_not_loss_terms(kind: type[Gaussian] | type[Bernoulli], fraction: float) -> None:
    """Padded sequences: A is a mean over all rows, M and G know nothing of the padding."""
    model, likelihood = nn.Linear(3, 2).double(), kind(masked=True)
    x, y = torch.randn(4, 5, 3, dtype=DOUBLE), torch.rand(4, 5, 2, dtype=DOUBLE)
    mask = torch.rand(4, 5) < 0.6
    mask[0] = False  # a whole sequence
    y[~mask] = torch.nan
    pre = exact(model, likelihood=likelihood, factor_fraction=fraction)
    loss = likelihood.loss(model(x), y, mask)
    loss.backward()
    assert torch.allclose(loss, kind().loss(model(x)[mask], y[mask]))
    assert all(p.grad.isfinite().all() for p in model.parameters())
    pre.step()
    part = slice(None) if fraction == 1 else slice(pre.capture.own_pass.count - 1, None, 2)
    x, mask = x[part], mask[part]
    p = model(x).sigmoid()
    fisher = torch.ones_like(p) if kind is Gaussian else p * (1 - p)
    assert torch.allclose(pre.factors.running[1], fisher[mask].mean(0).diag())
    assert torch.allclose(pre.factors.running[0], moments([x], bias=True))


def test_masks_that_do_not_fit() -> None:
    z, y = torch.randn(4, 2), torch.rand(4, 2)
    with pytest.raises(ValueError, match=r"mask needs Gaussian\(masked=True\)"):
        Gaussian().loss(z, y, torch.ones(4, dtype=torch.bool))
    for mask in (torch.ones(4, 2, dtype=torch.bool), torch.ones(4)):
        with pytest.raises(ValueError, match=r"mask must be bool of shape \(4,\)"):
            Bernoulli(masked=True).loss(z, y, mask)
    with pytest.raises(TypeError, match="masked must be a bool"):
        Gaussian(masked=1)


def test_a_vector_without_error_is_a_loss_term_unless_masks_are_expected() -> None:
    model = nn.Linear(2, 2).double()
    x = torch.randn(3, 2, dtype=DOUBLE)
    y = model(x).detach() + torch.tensor([[0.0], [1.0], [1.0]])
    for likelihood, terms in ((Gaussian(), 3), (Gaussian(masked=True), 2)):
        assert int(likelihood.counted(model(x), model(x) - y).sum()) == terms


def test_log_probabilities_are_accepted_as_logits() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(1)).double()
    x, y = torch.randn(5, 3, dtype=DOUBLE), torch.randint(4, (5,))
    pre = exact(model, likelihood="categorical")
    F.nll_loss(model(x), y).backward()
    pre.step()
    bare = exact(model[0], likelihood="categorical")
    F.cross_entropy(model[0](x), y).backward()
    bare.step()
    assert torch.allclose(pre.factors.running.data, bare.factors.running.data)


@pytest.mark.parametrize(
    ("model", "likelihood", "message"),
    [
        (nn.Linear(3, 1), "categorical", r"at least 2 classes.*\(5, 1\).*likelihood='bernoulli'"),
        (nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), "bernoulli", r"outputs must be \[N, …\]"),
    ],
)
def test_outputs_that_do_not_fit_the_likelihood(model: nn.Module, likelihood: str, message: str) -> None:
    pre = Preconditioner(model, likelihood=likelihood)
    with pytest.raises(ValueError, match=message):
        model(torch.randn(5, 3))
    pre.close()


class Structured(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.wrap = wrap

    def forward(self, x: Tensor):
        return self.wrap(self.layer(x))


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda y: {"logits": y, "extra": 3}, lambda r: r["logits"]),
        (Output, lambda r: r.logits),
        (lambda y: (y, "name"), lambda r: r[0]),
    ],
)
def test_structured_outputs(wrap, unwrap) -> None:
    model = Structured(wrap)
    pre = exact(model)
    half_square(unwrap(model(torch.randn(5, 3)))).backward()
    pre.step()
    assert int(pre.factors.updates[0]) == 1


def test_outputs_that_are_not_found_say_what_to_pass() -> None:
    model = Structured(lambda y: {"a": y, "b": y})
    pre = Preconditioner(model)
    with pytest.raises(TypeError, match=r"found no output tensor in the dict .* pass outputs="):
        model(torch.randn(5, 3))
    pre.close()
    pre = exact(model, outputs=lambda r: r["a"])
    half_square(model(torch.randn(5, 3))["a"]).backward()
    pre.step()
    assert int(pre.factors.updates[0]) == 1


def test_a_likelihood_of_ones_own() -> None:
    class Poisson(Likelihood):
        def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return (targets * outputs - outputs.exp()).sum(-1)

        def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return torch.poisson(outputs.exp(), generator=generator)

    model = nn.Linear(3, 2)
    likelihood = Poisson()
    optimizer = KFAC(model, likelihood=likelihood)
    x = torch.randn(2000, 3)
    likelihood.loss(model(x), torch.ones(2000, 2)).backward()
    optimizer.step()
    rate = model(x).exp().mean(0).detach()  # the Fisher of a Poisson log-rate is its rate
    assert torch.allclose(optimizer.preconditioner.factors.running[1].diagonal(), rate, rtol=0.2)
    with pytest.raises(ValueError, match="use fisher='mc'"):
        exact_optimizer = KFAC(model, likelihood=likelihood, fisher="exact")
        likelihood.loss(model(x), torch.ones(2000, 2)).backward()
        exact_optimizer.close()
