"""Activation checkpointing: parts of the model run again in the backward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from recompute import DOUBLE, Net, by_hand, exact, half_square, same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
