"""What a model may be and become: results of any kind, the user's own hooks, parts replaced or unfrozen later."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple

import pytest
import torch
from recompute import DOUBLE, Net, by_hand, exact, half_square, same
from torch import Tensor, nn

from kfac_fast import KFAC, KFACWarning
from kfac_fast.layers.linear import LinearLayer


class ModelOutput(OrderedDict):
    """As in transformers: entries are attributes too, None is left out."""

    def __getattr__(self, name: str) -> object:
        return self[name] if name in self else super().__getattribute__(name)


@dataclasses.dataclass
class Result:
    logits: Tensor
    hidden: Tensor | None = None


Pair = namedtuple("Pair", ["scores", "lengths"])


class Structured(Net):
    def __init__(self, wrap) -> None:
        super().__init__(nn.Tanh())
        self.wrap = wrap

    def forward(self, x: Tensor):
        return self.wrap(super().forward(x))


@pytest.mark.parametrize("own_pass", [False, True])
@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda y: ModelOutput(loss=y.sum(), logits=y), lambda r: r.logits),
        (lambda y: Result(y, y * 2), lambda r: r.logits),
        (lambda y: Pair(y, torch.arange(len(y))), lambda r: r.scores),
        (lambda y: [y], lambda r: r[0]),
    ],
)
def test_results_of_any_kind(wrap, unwrap, own_pass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearLayer, "needs_own_pass", own_pass)
    model, x = Structured(wrap).double(), torch.randn(5, 3, dtype=DOUBLE)
    pre = exact(model)
    half_square(unwrap(model(x))).backward()
    pre.step()
    assert same(pre, by_hand(model, [x]))


@pytest.mark.parametrize("own_pass", [False, True])
def test_arguments_of_any_kind(own_pass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fed(Net):
        def forward(self, batch: dict[str, Tensor], *, phase: Tensor, name: str = "") -> Tensor:
            assert name == "given"
            return super().forward(batch["x"] * phase.abs())

    monkeypatch.setattr(LinearLayer, "needs_own_pass", own_pass)
    model, x = Fed(nn.Tanh()).double(), torch.randn(5, 3, dtype=DOUBLE)
    model.register_buffer("table", torch.polar(torch.ones(3), torch.rand(3)))
    model.spectrum = nn.Parameter(torch.randn(2, dtype=torch.complex64))
    pre = exact(model)
    half_square(model({"x": x, "ids": torch.arange(5)}, phase=torch.tensor(1j), name="given")).backward()
    pre.step()
    assert same(pre, by_hand(model, [x]))


@pytest.mark.parametrize("own_pass", [False, True])
def test_hooks_of_the_user(own_pass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks that change something are part of the model; the user's gradients stay as they are."""
    monkeypatch.setattr(LinearLayer, "needs_own_pass", own_pass)
    model, x = Net(nn.Tanh()).double(), torch.randn(5, 3, dtype=DOUBLE)
    calls: list[str] = []
    model.first.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.last.register_forward_hook(lambda module, args, result: result * 3)
    model.activation.register_full_backward_hook(lambda *_: calls.append("backward"))
    half_square(model(x)).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    pre = exact(model)
    calls.clear()
    half_square(model(x)).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert len(calls) == 3  # the user's pass, and one for each dimension of the outputs
    pre.step()
    plain = Net(nn.Tanh()).double()
    plain.load_state_dict(model.state_dict())
    scaled = [3 * root for root in torch.eye(2, dtype=DOUBLE).unsqueeze(1).expand(2, 5, 2)]
    assert same(pre, by_hand(plain, [2 * x], root=lambda y: scaled))


def test_a_user_may_patch_forward() -> None:
    model, x = Net(nn.Tanh()).double(), torch.randn(5, 3, dtype=DOUBLE)
    original = model.forward
    model.forward = lambda x: original(2 * x)  # as accelerate does
    pre = exact(model)
    half_square(model(x)).backward()
    pre.step()
    assert same(pre, by_hand(model, [2 * x]))


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0, "weight_decay": 0.1}])
def test_complex_parameters_take_the_base_update(options: dict[str, float]) -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
            self.spectrum = nn.Parameter(torch.randn(4, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.fft.ifft(torch.fft.fft(self.first(x)) * self.spectrum).real)

    model, x, y = Spectral(), torch.randn(32, 4), torch.randn(32, 2)
    optimizer = KFAC(model, likelihood="gaussian", lr=0.1, **options)
    assert {row.name: row.reason for row in optimizer.report()}["spectrum"] == "no block for Spectral"
    before, losses = model.spectrum.detach().clone(), []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(half_square(model(x) - y))
        losses[-1].backward()
        optimizer.step()
    assert not torch.equal(model.spectrum, before)
    assert losses[-1].item() < 0.9 * losses[0].item()
    optimizer.zero_grad()
    half_square(model(x) - y).backward()
    model.spectrum.grad.fill_(complex(0, float("nan")))
    with pytest.warns(KFACWarning, match="spectrum"):
        optimizer.step()
    assert bool(model.spectrum.isfinite().all())
    optimizer.load_state_dict(optimizer.state_dict())


def train(model: nn.Module, optimizer: KFAC, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        half_square(model(torch.randn(5, 3))).backward()
        optimizer.step()


def test_a_module_that_was_replaced_is_noticed() -> None:
    model = Net(nn.Tanh())
    optimizer = KFAC(model, likelihood="gaussian", inverse_every=1)
    train(model, optimizer)
    model.last = nn.Linear(4, 2)
    with pytest.warns(KFACWarning, match="'last': it was another one when the optimizer was made"):
        train(model, optimizer, 2)


def test_a_parameter_that_was_replaced_is_noticed() -> None:
    model = Net(nn.Tanh())
    optimizer = KFAC(model, likelihood="gaussian", inverse_every=1)
    train(model, optimizer)
    model.last.weight = nn.Parameter(torch.randn(2, 4))
    with pytest.warns(KFACWarning) as caught:
        train(model, optimizer, 2)
    assert any("'last': a parameter of it was another one" in str(w.message) for w in caught)


def test_a_layer_that_was_unfrozen_is_noticed() -> None:
    model = Net(nn.Tanh())
    model.first.requires_grad_(False)
    optimizer = KFAC(model, likelihood="gaussian", inverse_every=1)
    train(model, optimizer)
    model.first.requires_grad_(True)
    with pytest.warns(KFACWarning, match=r"'first': the parameter first\.(weight|bias) was frozen or not there"):
        train(model, optimizer)
    optimizer.add_param_group({"params": list(model.first.parameters())})
    train(model, optimizer)
    assert {row.kind for row in optimizer.report()} == {"LinearLayer"}
    assert bool(optimizer.preconditioner.factors.updates.all())


def test_a_layer_that_was_frozen_later_stays_as_it_is() -> None:
    model = Net(nn.Tanh())
    optimizer = KFAC(model, likelihood="gaussian", inverse_every=1)
    train(model, optimizer)
    model.first.requires_grad_(False)
    before = model.first.weight.clone()
    train(model, optimizer, 2)
    assert torch.equal(model.first.weight, before)


def test_data_parallel_is_refused_where_it_would_copy() -> None:
    with pytest.raises(ValueError, match="DataParallel"):
        exact(nn.DataParallel(Net(nn.Tanh())))
    model = nn.Sequential(nn.DataParallel(Net(nn.Tanh())))
    exact(model).close()  # without devices it copies nothing
    model[0].device_ids = [0, 1]
    with pytest.raises(ValueError, match="DataParallel"):
        exact(model)


def test_the_models_input_must_stay_for_a_pass_of_its_own() -> None:
    class Squared(Net):
        def body(self, x: Tensor) -> Tensor:
            return super().body(x * 2)

    model, x = Squared(nn.Tanh()).double(), torch.randn(6, 3, dtype=DOUBLE)
    pre = exact(model, factor_fraction=0.5)
    y = model(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place between the forward and the end of the backward pass"):
        half_square(y).backward()
    pre.close()


def test_random_layers_draw_the_same_after_a_pass_of_its_own() -> None:
    import random

    import numpy as np

    class Skipping(Net):
        def body(self, x: Tensor) -> Tensor:
            scale = random.random() + np.random.random() + torch.rand(())
            return super().body(x * scale)

    draws = []
    for fraction in (1.0, 0.5):
        model = Skipping(nn.Tanh())
        pre = exact(model, factor_fraction=fraction)
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        half_square(model(torch.ones(6, 3))).backward()
        draws.append((random.random(), np.random.random(), float(torch.rand(()))))
        pre.close()
    assert draws[0] == draws[1]
