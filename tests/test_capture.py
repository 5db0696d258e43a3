"""What the hooks see: the hard cases, each against a straightforward recomputation of the factors."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_fast import KFAC, Categorical, Gaussian, Likelihood, Preconditioner

DOUBLE = torch.float64


def moments(rows: list[Tensor], terms: int | None = None, *, bias: bool = False) -> Tensor:
    """Σ r rᵀ over all rows, divided by their number or by the number of loss terms."""
    x = torch.cat([r.reshape(-1, r.shape[-1]) for r in rows])
    if bias:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return x.T @ x / (len(x) if terms is None else terms)


def exact(model: nn.Module, **options) -> Preconditioner:
    return Preconditioner(model, **{"fisher": "exact", "likelihood": "gaussian", **options})


def half_square(y: Tensor) -> Tensor:
    return Gaussian().loss(y, torch.zeros_like(y))


def plain_factors(model: nn.Module, x: Tensor) -> Tensor:
    pre = exact(model)
    half_square(model(x)).backward()
    pre.step()
    pre.close()
    model.zero_grad()
    return pre.factors.running.data.clone()


class Net(nn.Module):
    def __init__(self, activation: nn.Module, *, checkpointed: str | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.activation = activation
        self.last = nn.Linear(4, 2)
        self.checkpointed = checkpointed

    def body(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.checkpointed == "reentrant")


def test_inplace_activation() -> None:
    model = Net(nn.ReLU(inplace=True)).double()
    twin = Net(nn.ReLU()).double()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 3, dtype=DOUBLE)
    assert torch.equal(plain_factors(model, x), plain_factors(twin, x))


def test_inplace_change_of_the_outputs() -> None:
    model = Net(nn.Tanh()).double()
    x = torch.randn(5, 3, dtype=DOUBLE)
    expected = plain_factors(model, x)
    pre = exact(model)
    y = model(x)
    y.mul_(3.0)  # after the model: its Fisher is unchanged
    y.sum().backward()
    pre.step()
    assert torch.allclose(pre.factors.running.data, expected)


def test_module_called_twice_pools_its_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    model = Twice().double()
    x = torch.randn(5, 3, dtype=DOUBLE)
    pre = exact(model)
    half_square(model(x)).backward()
    pre.step()
    hidden = model.layer(x).detach()
    assert torch.allclose(pre.factors.running[0], moments([x, torch.tanh(hidden)], bias=True))
    g_last = [torch.eye(3, dtype=DOUBLE)[c].expand(5, 3) for c in range(3)]
    g_first = [(g @ model.layer.weight.detach()) * (1 - torch.tanh(hidden) ** 2) for g in g_last]
    assert torch.allclose(pre.factors.running[1], moments(g_last + g_first, terms=5))


def test_non_reentrant_checkpointing() -> None:
    model = Net(nn.Tanh()).double()
    twin = Net(nn.Tanh(), checkpointed="non-reentrant").double()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 3, dtype=DOUBLE)
    assert torch.equal(plain_factors(model, x), plain_factors(twin, x))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused() -> None:
    model = Net(nn.Tanh(), checkpointed="reentrant")
    pre = exact(model)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(torch.randn(5, 3, requires_grad=True)).square().sum().backward()
    pre.close()


def test_forward_without_backward_does_not_count() -> None:
    model = Net(nn.Tanh()).double()
    x = torch.randn(5, 3, dtype=DOUBLE)
    expected = plain_factors(model, x)
    pre = exact(model)
    with torch.no_grad():
        model(torch.randn(9, 3, dtype=DOUBLE))
    model(torch.randn(9, 3, dtype=DOUBLE))
    half_square(model(x)).backward()
    model(torch.randn(9, 3, dtype=DOUBLE))
    pre.step()
    assert torch.equal(pre.factors.running.data, expected)


def test_exceptions_leave_nothing_half_recorded() -> None:
    class Broken(Net):
        broken = False

        def forward(self, x: Tensor) -> Tensor:
            h = self.activation(self.first(x))
            if self.broken:
                raise KeyError("as asked")
            return self.last(h)

    model = Broken(nn.Tanh()).double()
    x = torch.randn(5, 3, dtype=DOUBLE)
    expected = plain_factors(model, x)
    pre = exact(model)
    model.broken = True
    with pytest.raises(KeyError):
        model(x)
    model.broken = False
    half_square(model(x)).backward()
    pre.step()
    assert torch.equal(pre.factors.running.data, expected)


def test_create_graph_is_refused() -> None:
    model = Net(nn.Tanh())
    pre = exact(model)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(half_square(model(torch.randn(5, 3))), list(model.parameters()), create_graph=True)
    pre.close()


def test_layers_that_take_no_part_keep_their_factors() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)
            self.use_b = False

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x) if self.use_b else self.a(x)

    model = Branch()
    optimizer = KFAC(model, likelihood="gaussian")
    before = model.b.weight.detach().clone()
    half_square(model(torch.randn(5, 3))).backward()
    optimizer.step()
    assert optimizer.preconditioner.factors.updates.tolist() == [1, 0, 1, 0]
    assert torch.equal(model.b.weight, before)
    assert not optimizer.preconditioner.factors.running[1].any()


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


def test_classes_in_another_place_are_noticed() -> None:
    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).transpose(1, 2)  # [N, C, S], which the rule takes for [N, S, C]

    x = torch.randn(2, 5, 3)
    y = torch.randint(4, (2, 5))
    model = Channels()
    pre = Preconditioner(model)
    with pytest.raises(ValueError, match=r"does not sum to zero over the classes.*class_dim"):
        F.cross_entropy(model(x), y).backward()
    pre.close()
    pre = Preconditioner(model, likelihood=Categorical(class_dim=1))
    F.cross_entropy(model(x), y).backward()
    pre.step()


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


def test_the_users_gradients_are_untouched() -> None:
    model = Net(nn.Tanh())
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    F.cross_entropy(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    for fisher in ("mc", "exact", "empirical"):
        pre = Preconditioner(model, fisher=fisher)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        pre.close()
        assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_copies_of_the_model_carry_no_hooks() -> None:
    model = Net(nn.Tanh())
    pre = exact(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        half_square(twin(torch.randn(5, 3))).backward()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
    assert not pre.factors.has_pending


def test_close_removes_every_hook() -> None:
    model = Net(nn.Tanh())
    optimizer = KFAC(model, likelihood="gaussian")
    y = model(torch.randn(5, 3))
    optimizer.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    half_square(y).backward()
    optimizer.step()  # goes on with what it has
    assert not optimizer.preconditioner.factors.updates.any()


def test_a_dropped_optimizer_and_dropped_graphs_are_freed() -> None:
    model = Net(nn.Tanh())
    optimizer = KFAC(model, likelihood="gaussian")
    for _ in range(2):
        y = model(torch.randn(5, 3))  # no backward pass: the graph must die with its output
        node = weakref.ref(y)
        del y
        gc.collect()
        assert node() is None
    capture = weakref.ref(optimizer.preconditioner.capture)
    del optimizer
    gc.collect()
    assert capture() is None
    model(torch.randn(5, 3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_memory_does_not_grow_when_backward_never_comes() -> None:
    model = Net(nn.Tanh())
    optimizer = KFAC(model, likelihood="gaussian")
    inputs = [weakref.ref(model(x).grad_fn and x) for x in [torch.randn(5, 3) for _ in range(5)]]
    gc.collect()
    assert sum(ref() is not None for ref in inputs) == 0
    optimizer.close()


def test_two_optimizers_on_one_model() -> None:
    model = Net(nn.Tanh()).double()
    x = torch.randn(5, 3, dtype=DOUBLE)
    expected = plain_factors(model, x)
    first, second = exact(model), exact(model)
    half_square(model(x)).backward()
    first.step()
    second.step()
    assert torch.equal(first.factors.running.data, expected)
    assert torch.equal(second.factors.running.data, expected)


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


def test_queue_is_flushed_at_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(nn.Tanh()).double()
    x = torch.randn(50, 3, dtype=DOUBLE)
    expected = plain_factors(model, x)
    monkeypatch.setattr("kfac_fast.factors.QUEUE_BYTES", 100)
    assert torch.allclose(plain_factors(model, x), expected, atol=1e-14)


def test_shared_weights_take_the_base_update_and_say_so() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    reasons = {row.name: row.reason for row in KFAC(model).report()}
    assert "shared with a module that differs" in reasons["0.weight"]
