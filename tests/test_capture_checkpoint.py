"""Activation checkpointing: parts of the model run again in the backward pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from recompute import DOUBLE, Net, by_hand, exact, half_square, same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_fast.kept import Awaited

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def pair(kind: str, activation: nn.Module | None = None) -> tuple[Net, Tensor]:
    model = Net(activation or nn.Tanh(), checkpointed=kind).double()
    return model, torch.randn(6, 3, dtype=DOUBLE, requires_grad=True)


def root(fisher: str):
    return (lambda y: [y]) if fisher == "empirical" else None


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_non_reentrant(fisher: str) -> None:
    model, x = pair("non-reentrant")
    pre = exact(model, fisher=fisher)
    half_square(model(x)).backward()
    pre.step()
    assert same(pre, by_hand(model, [x.detach()], root(fisher)))


def test_non_reentrant_with_a_fraction() -> None:
    model, x = pair("non-reentrant")
    pre = exact(model, factor_fraction=0.5)
    half_square(model(x)).backward()
    pre.step()
    assert same(pre, by_hand(model, [x.detach()[::2]]))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_running_statistics_change_as_without_the_optimizer(fraction: float) -> None:
    """A checkpoint updates them twice by itself; the extra pass must not do it once more."""

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layers, x, use_reentrant=False)

    model, x = Normalised(), torch.randn(6, 3)
    twin = copy.deepcopy(model)
    pre = exact(model, factor_fraction=fraction)
    for net in (model, twin):
        torch.manual_seed(1)
        half_square(net(x)).backward()
        net.after = torch.rand(2)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert torch.equal(model.after, twin.after)
    pre.step()
    assert bool(pre.factors.updates.all())


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_whole_model_in_a_checkpoint(reentrant: bool, fisher: str) -> None:
    model = Net(nn.Tanh()).double()
    x = torch.randn(6, 3, dtype=DOUBLE, requires_grad=True)
    pre = exact(model, fisher=fisher)
    half_square(checkpoint(model, x, use_reentrant=reentrant)).backward()
    pre.step()
    assert same(pre, by_hand(model, [x.detach()], root(fisher)))


def test_reentrant_serves_the_empirical_fisher() -> None:
    model, x = pair("reentrant")
    pre = exact(model, fisher="empirical")
    for _ in range(2):
        half_square(model(x)).backward()
        pre.step()
        assert same(pre, by_hand(model, [x.detach()], root("empirical")))
        model.zero_grad()


def test_nested_reentrant_checkpoints_serve_the_empirical_fisher() -> None:
    class Nested(Net):
        def body(self, x: Tensor) -> Tensor:
            hidden = checkpoint(lambda z: self.activation(self.first(z)), x, use_reentrant=True)
            return self.last(hidden)

    model = Nested(nn.Tanh(), checkpointed="reentrant").double()
    x = torch.randn(6, 3, dtype=DOUBLE, requires_grad=True)
    pre = exact(model, fisher="empirical")
    half_square(model(x)).backward()
    pre.step()
    assert same(pre, by_hand(model, [x.detach()], root("empirical")))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_reentrant_is_refused_for_the_true_fisher(fisher: str, fraction: float) -> None:
    model, x = pair("reentrant")
    pre = exact(model, fisher=fisher, factor_fraction=fraction)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        half_square(model(x)).backward()
    model.zero_grad()
    model.checkpointed = "non-reentrant"
    half_square(model(x)).backward()
    pre.step()
    part = x.detach()[pre.capture.own_pass.count - 1 :: 2] if fraction < 1 else x.detach()
    assert fisher == "mc" or same(pre, by_hand(model, [part]))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_layers_that_run_without_a_graph_are_not_taken_for_a_checkpoint(fraction: float) -> None:
    class Trunk(Net):
        def body(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                hidden = self.activation(self.first(x))
            return self.last(hidden)

    model, x = Trunk(nn.Tanh()).double(), torch.randn(6, 3, dtype=DOUBLE)
    pre = exact(model, factor_fraction=fraction)
    half_square(model(x)).backward()
    pre.step()
    assert pre.factors.updates.tolist() == [0, 1, 0, 1]


class Shapes(nn.Module):
    """A network whose parts run inside checkpoints of several shapes, or without any."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Linear(3, 4)
        self.square = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True) if shape == "attention" else nn.Identity()
        self.head = nn.Linear(4, 2)
        self.checkpoints = True

    def inside(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.square(x)))

    def attend(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inside(x) + self.mix(x, x, x, need_weights=False)[0])

    def again(self, function, x: Tensor) -> Tensor:
        return checkpoint(function, x, use_reentrant=False) if self.checkpoints else function(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.shape == "the lowest alone":
            return self.head(torch.tanh(self.again(self.embed, x)))
        x = torch.tanh(self.embed(x))
        if self.shape == "twice in one":
            x = self.again(lambda z: self.inside(self.inside(z)), x)
        elif self.shape == "loop":
            for _ in range(3):
                x = self.again(self.inside, x) + self.again(lambda z: self.inside(z) * self.inside(z.sin()), x)
        elif self.shape == "two":
            x = self.again(self.inside, self.again(self.inside, x))
        elif self.shape == "nested":
            x = self.again(lambda z: torch.tanh(self.again(self.inside, z)), x)
        elif self.shape == "alone":
            x = self.again(self.square, x)
        elif self.shape == "with the outputs":
            return self.again(lambda z: self.head(self.inside(z)), x)
        else:
            x = self.again(self.attend if self.shape == "attention" else self.inside, x)
        return self.head(x)


@pytest.mark.parametrize(("fisher", "fraction"), [("exact", 1.0), ("exact", 0.5), ("empirical", 1.0)])
@pytest.mark.parametrize(
    "shape",
    ["one", "with the outputs", "nested", "attention", "alone", "the lowest alone", "two", "twice in one", "loop"],
)
def test_inputs_that_a_checkpoint_computes_again(shape: str, fisher: str, fraction: float) -> None:
    """The factors are those without checkpoints."""
    model = Shapes(shape).double()
    plain = copy.deepcopy(model)
    plain.checkpoints = False
    found = []
    for net in (model, plain):
        pre = exact(net, factor_fraction=fraction, fisher=fisher)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            x = torch.randn(4, 3, 3, dtype=DOUBLE, generator=generator)
            half_square(net(x)).backward()
            pre.steps = 1  # the inverses do not matter here
            pre.step()
        assert pre.capture.own_pass.count == (3 if fraction < 1 or shape == "attention" else 0)
        found.append((pre.factors.running.data, *(tensor for part in pre.parts for tensor in part.state(0).values())))
    for a, b in zip(*found, strict=True):
        for one, other in zip(a, b, strict=True):
            assert torch.allclose(one, other, atol=1e-12)


class Images(nn.Module):
    def __init__(self, layer: nn.Module, shape: tuple[int, ...], prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before = nn.Linear(5, math.prod(shape))
        self.layer = layer
        self.shape = shape
        self.prepare = prepare
        self.checkpoints = True

    def inside(self, x: Tensor) -> Tensor:
        x = self.prepare(x.tanh())
        return self.layer(x, x.cos()) if isinstance(self.layer, nn.Bilinear) else self.layer(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).view(len(x), *self.shape)
        y = checkpoint(self.inside, x, use_reentrant=False) if self.checkpoints else self.inside(x)
        return y.sin().flatten(1)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize(
    ("layer", "shape", "prepare"),
    [
        (nn.Linear(4, 3), (2, 4), torch.sin),
        (nn.Linear(2, 3, bias=False), (2, 4), lambda x: x.transpose(1, 2)),
        (nn.Bilinear(4, 4, 2), (4,), torch.sin),
        (nn.Conv1d(2, 3, 3, padding=1), (2, 4), torch.sin),
        (nn.Conv2d(2, 4, (3, 2), stride=2, groups=2), (2, 4, 4), torch.sin),
        (nn.ConvTranspose2d(2, 3, 3, stride=2), (2, 3, 3), torch.sin),
        (nn.LayerNorm(4), (2, 4), torch.sin),
        (nn.RMSNorm(4), (2, 4), torch.sin),
        (nn.GroupNorm(2, 4), (4, 3), torch.sin),
        (nn.BatchNorm1d(4), (4, 3), torch.sin),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_inputs_of_every_kind_of_layer_come_from_autograd(layer, shape, prepare, fisher, monkeypatch) -> None:
    model = Images(copy.deepcopy(layer), shape, prepare).double()
    plain = copy.deepcopy(model)
    plain.checkpoints = False
    awaited: list[Awaited] = []
    then = Awaited.then
    monkeypatch.setattr(Awaited, "then", lambda self, function: (awaited.append(self), then(self, function)))
    found = []
    for net in (model, plain):
        pre = exact(net, fisher=fisher)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            half_square(net(torch.randn(6, 5, dtype=DOUBLE, generator=generator))).backward()
            pre.steps = 1  # the inverses do not matter here
            pre.step()
        found.append(
            [tensor for part in pre.parts for i in range(len(part.layers)) for tensor in part.state(i).values()]
        )
        assert len(awaited) == 2  # once in each step of the checkpointed model
    for one, other in zip(*found, strict=True):
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(one, other, strict=True))
