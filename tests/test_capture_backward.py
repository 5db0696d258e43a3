"""Ways in which backward passes come: in several parts, more than once, from other threads, or not at all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from recompute import DOUBLE, Net, exact, half_square, plain_factors
from torch import Tensor, nn

from kfac_fast import Preconditioner


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
