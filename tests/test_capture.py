"""What the hooks see in the forward pass, against a straightforward recomputation of the factors."""

from __future__ import annotations

import pytest
import torch
from recompute import DOUBLE, Net, exact, half_square, moments, plain_factors
from torch import Tensor, nn

from kfac_fast import KFAC


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


class Branches(nn.Module):
    """Towers with nothing in common below, a trunk with a residual, a layer that is used twice, heads that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 4)
        self.twice = nn.Linear(4, 4)
        self.top = nn.Linear(4, 2)
        self.unused = nn.Linear(4, 2)
        self.lost = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        hidden = torch.tanh(self.left(x * self.scale)) * self.right(x)
        hidden = hidden + torch.tanh(self.twice(hidden))
        hidden = self.twice(hidden)
        self.lost(self.unused(hidden))
        return self.top(hidden.sin()), "and more"


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_gradients_that_are_not_kept_until_all_are_there(fisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Branches().double(), torch.randn(6, 3, dtype=DOUBLE)
    results = []
    for limit in (2**23, 0):
        monkeypatch.setattr("kfac_fast.sender.ELEMENTS_AT_ONCE", limit)
        pre = exact(model, fisher=fisher)
        for _ in range(3):  # the first pass finds out what is lowest
            half_square(model(x)[0]).backward()
            pre.statistics.commit()
            model.zero_grad()
        results.append([factor.clone() for factor in pre.factors.running])
        assert pre.factors.updates.tolist() == [3, 3, 3, 3, 0, 0] * 2
        pre.close()
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-14)
