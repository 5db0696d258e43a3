"""Mixed precision by ``torch.autocast``: what the layers really computed with."""

from __future__ import annotations

import pytest
import torch
from recompute import Net, exact, half_square, moments
from torch import Tensor, nn

from kfac_fast.layers.linear import LinearLayer

HALVES = [torch.bfloat16, torch.float16]


class Witness(nn.Tanh):
    """Keeps the dtypes it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.dtype)
        return super().forward(x)


def by_hand(model: Net, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    with torch.autocast("cpu", dtype):
        before = model.first(x)
        hidden = model.activation(before)
        y = model.last(hidden)
    gradients = []
    for c in range(2):
        root = torch.zeros_like(y)
        root[:, c] = 1
        gradients.append([g.float() for g in torch.autograd.grad(y, [before, y], root, retain_graph=True)])
    a = [moments([rows.detach().to(dtype).float()], bias=True) for rows in (x, hidden)]
    return a + [moments(list(rows), terms=len(x)) for rows in zip(*gradients, strict=True)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("own_pass", [False, True])
def test_statistics_are_those_of_the_autocast_pass(
    dtype: torch.dtype, own_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LinearLayer, "needs_own_pass", own_pass)
    witness = Witness()
    model, x = Net(witness), torch.randn(16, 3)
    pre = exact(model)
    with torch.autocast("cpu", dtype):
        loss = half_square(model(x).float())
    loss.backward()  # outside, as torch recommends
    assert witness.seen == [dtype] * (1 + own_pass)
    pre.step()
    for found, expected in zip(pre.factors.running, by_hand(model, x, dtype), strict=True):
        assert torch.allclose(found, expected, rtol=1e-2, atol=1e-3)


def test_a_pass_without_autocast_stays_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearLayer, "needs_own_pass", True)
    witness = Witness()
    model = Net(witness)
    pre = exact(model)
    loss = half_square(model(torch.randn(5, 3)))
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert witness.seen == [torch.float32] * 2
    pre.step()
