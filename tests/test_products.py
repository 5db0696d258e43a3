"""Products with the exact Fisher: against the explicit matrix, by every way of differentiating, unnoticed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fast import KFAC, Bernoulli, Categorical, Gaussian, Likelihood
from kfac_fast.passes import ModelInputs
from kfac_fast.products import Direction, FisherProducts

DOUBLE = torch.float64


def products(model: nn.Module, likelihood: Likelihood | None = None) -> FisherProducts:
    return FisherProducts(model, likelihood or Gaussian(), lambda outputs: outputs)


def random_directions(model: nn.Module, count: int = 2, without: tuple[str, ...] = ()) -> list[Direction]:
    return [
        {name: torch.randn_like(p) for name, p in model.named_parameters() if name not in without} for _ in range(count)
    ]


def explicit(model: nn.Module, likelihood: Likelihood, x: Tensor, directions: list[Direction]) -> Tensor:
    """vᵢᵀ F vⱼ from the Jacobian and the roots of F_R, one column at a time."""
    model = copy.deepcopy(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(*changed: Tensor) -> Tensor:
        return torch.func.functional_call(
            model, {**parameters, **dict(zip(directions[0], changed, strict=False))}, (x,)
        )

    moving = tuple(parameters[name] for name in directions[0])
    jacobian = dict(zip(directions[0], torch.autograd.functional.jacobian(outputs, moving), strict=True))
    z = outputs().detach()
    moved = [sum((jacobian[n] * v).flatten(z.ndim).sum(-1) for n, v in d.items()) for d in directions]
    forms = torch.zeros(len(directions), len(directions), dtype=DOUBLE)
    for root in likelihood.fisher_root(z):
        along = [likelihood.per_term(root * m) for m in moved]
        forms += torch.stack([torch.stack([(a * b).sum() for a in along]) for b in along]).double()
    return forms / likelihood.terms_shape(z).numel()


@pytest.mark.parametrize(
    ("likelihood", "root"),
    [
        (Categorical(), lambda z: torch.diag(z.softmax(0)) - torch.outer(z.softmax(0), z.softmax(0))),
        (Bernoulli(), lambda z: torch.diag(z.sigmoid() * (1 - z.sigmoid()))),
        (Gaussian(0.5), lambda z: 4 * torch.eye(3, dtype=DOUBLE)),
    ],
)
def test_forms_are_those_of_the_explicit_matrix(likelihood: Likelihood, root: Callable[[Tensor], Tensor]) -> None:
    """With some loss terms ignored; F_R is written out here."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(6, 4, dtype=DOUBLE)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(parameters)
    j = torch.cat([jacobian[name].flatten(2) for name in parameters], -1)
    counted = torch.tensor([True, True, False, True, True, True])
    fisher = sum(jn.T @ root(z) @ jn for jn, z, c in zip(j, model(x).detach(), counted, strict=True) if c) / 5
    directions = random_directions(model)
    vectors = torch.stack([torch.cat([d[name].flatten() for name in parameters]) for d in directions])
    forms = products(model, likelihood).forms(ModelInputs((x,), {}, 6), counted, directions)
    assert torch.allclose(forms, vectors @ fisher @ vectors.T, atol=1e-12)


class Doubled(torch.autograd.Function):
    """2x, without a forward-mode rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class NoForwardRule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(x)


class Residual(nn.Module):
    """No chain: every path of the model that is not one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.second(x + self.norm(self.first(x)).relu())


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2).add_(1)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].register_forward_hook(lambda module, args, output: 3 * output)
    return model


def partly_frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "chain": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 3, bias=False)), ()),
    "nested": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.SiLU(), nn.LayerNorm(4)), nn.Linear(4, 3)), ()),
    "in place": (lambda: nn.Sequential(nn.Linear(6, 4), InPlace(), nn.ReLU(inplace=True), nn.Linear(4, 3)), ()),
    "convolutions": (
        lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2, padding="same", padding_mode="circular"), nn.ELU(), nn.Conv1d(4, 2, 3, groups=2), nn.Flatten(), nn.Linear(2, 3)),
        (),
    ),
    "positions": (lambda: nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Linear(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), ()),
    "residual": (Residual, ()),
    "hooked": (hooked, ()),
    "frozen start": (partly_frozen, ("0.weight", "0.bias")),
    "frozen weight": (partly_frozen, ("2.weight",)),
    "frozen bias": (partly_frozen, ("0.bias", "4.bias")),
    "biases alone": (partly_frozen, ("0.weight", "0.bias", "2.weight", "4.weight")),
    "transformer": (
        lambda: nn.Sequential(nn.Unflatten(1, (3, 2)), nn.TransformerEncoderLayer(2, 1, 4, batch_first=True), nn.Flatten(), nn.Linear(6, 3)),
        (),
    ),
    "recurrent": (lambda: Recurrent(), ()),
    "no forward rule": (lambda: nn.Sequential(nn.Linear(6, 4), NoForwardRule(), nn.Tanh(), nn.Linear(4, 3)), ()),
}  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.view(-1, 3, 2))[0][:, -1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(0.5)], ids=repr)
def test_every_kind_of_model(name: str, dtype: torch.dtype, likelihood: Likelihood) -> None:
    make, frozen = MODELS[name]
    model = make().to(dtype).eval()  # eval: the transformer would take torch's fused path
    x = torch.randn(5, 6, dtype=dtype)
    directions = random_directions(model, 2, frozen)
    fisher = products(model, likelihood)
    given = x.clone()
    forms = fisher.forms(ModelInputs((given,), {}, 5), torch.ones(5, dtype=torch.bool), directions)
    expected = explicit(model, likelihood, x, directions)
    assert torch.allclose(forms, expected, rtol=1e-10 if dtype == DOUBLE else 2e-4, atol=1e-12)
    assert fisher.forward_mode == (name != "no forward rule")
    assert torch.equal(given, x)


@pytest.mark.parametrize("name", MODELS)
def test_the_ways_of_differentiating_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, frozen = MODELS[name]
    model = make().double()
    inputs, counted = ModelInputs((torch.randn(5, 6, dtype=DOUBLE),), {}, 5), torch.ones(5, dtype=torch.bool)
    model.eval()
    directions = random_directions(model, 3, frozen)
    along = products(model).forms(inputs, counted, directions)
    backward = products(model)
    backward.forward_mode = False
    assert torch.allclose(backward.forms(inputs, counted, directions), along, atol=1e-11)
    if name != "no forward rule":
        monkeypatch.setattr("kfac_fast.products.modules_in_order", lambda model: None)
        assert torch.allclose(products(model).forms(inputs, counted, directions), along, atol=1e-11)


@pytest.mark.parametrize("forward_mode", [True, False])
@pytest.mark.parametrize("chain", [True, False])
def test_nobody_notices(forward_mode: bool, chain: bool) -> None:
    """Buffers, generators, gradients and flags of torch are as before; both directions see the same dropout mask."""
    layers = nn.Sequential(nn.Linear(4, 50), nn.BatchNorm1d(50), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    model = layers if chain else nn.Sequential(nn.Identity(), nn.ModuleList([layers])[0])
    if not chain:
        layers.register_forward_hook(lambda module, args, output: None)
    before = copy.deepcopy(model.state_dict())
    v = random_directions(model, 1)[0]
    state = torch.get_rng_state()
    fisher = products(model)
    fisher.forward_mode = forward_mode
    x = torch.randn(6, 4, dtype=DOUBLE)
    state = torch.get_rng_state()
    forms = fisher.forms(ModelInputs((x,), {}, 6), torch.ones(6, dtype=torch.bool), [v, v])
    assert torch.allclose(forms, forms[0, 0].expand(2, 2), rtol=1e-12)
    assert forms[0, 0] > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.backends.mkldnn.is_available() == torch._C._get_mkldnn_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_dropout_masks_of_a_chain_differ() -> None:
    """F of w ↦ two masks in a row: with the same mask twice a quarter would be kept as a half."""
    model = nn.Sequential(nn.Linear(1, 4_000, bias=False), nn.Dropout(0.5), nn.Dropout(0.5)).double()
    v = [{"0.weight": torch.ones_like(model[0].weight)}] * 2
    one = ModelInputs((torch.ones(1, 1, dtype=DOUBLE),), {}, 1)
    forms = products(model).forms(one, torch.ones(1, dtype=torch.bool), v)
    kept = forms[0, 0] / 16  # each survivor is scaled by 4
    assert kept / 4_000 == pytest.approx(0.25, abs=0.03)


def test_a_model_that_fails_says_why() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of order")

    model = Broken()
    fisher = products(model)
    with pytest.raises(RuntimeError, match="out of order"):
        fisher.forms(ModelInputs((torch.ones(2, 3),), {}, 2), torch.ones(2, dtype=torch.bool), random_directions(model))
    assert fisher.forward_mode


def test_training_without_a_forward_rule() -> None:
    model = nn.Sequential(nn.Linear(6, 8), NoForwardRule(), nn.Tanh(), nn.Linear(8, 3))
    optimizer = KFAC(model, adaptive=True)
    x = torch.randn(64, 6)
    y = x[:, :3].argmax(1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(15)]
    assert losses[-1] < 0.2 * losses[0]
    assert not optimizer.rule.products.forward_mode
