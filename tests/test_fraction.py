"""Statistics from a fraction of the batch, in a pass of their own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from recompute import DOUBLE, Net, assert_unnoticed, exact, half_square, plain_factors
from torch import Tensor, nn

from kfac_fast import Preconditioner


def test_a_fraction_of_the_batch_is_that_part_of_it() -> None:
    model = Net(nn.Tanh()).double()
    x = torch.randn(16, 3, dtype=DOUBLE)
    pre = exact(model, factor_fraction=1 / 4)
    average = torch.zeros_like(pre.factors.running.data)
    for step in range(2):
        model.zero_grad()
        half_square(model(x)).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        pre.natural_gradients(0.1)
        expected = plain_factors(copy.deepcopy(model), x[step::4])
        average = expected if step == 0 else (average + expected) / 2
        assert torch.allclose(pre.factors.running.data, average, atol=1e-14)
        half_square(copy.deepcopy(model)(x)).backward()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    pre.close()


def test_the_pass_over_a_fraction_goes_unnoticed() -> None:
    assert_unnoticed(fisher="exact", factor_fraction=0.5)


def test_ignored_targets_in_a_fraction() -> None:
    model = nn.Linear(3, 4).double()
    x = torch.randn(8, 3, dtype=DOUBLE)
    y = torch.tensor([0, 1, -100, 2, 3, 3, -100, 1])
    pre = exact(model, likelihood="categorical", factor_fraction=0.5)
    F.cross_entropy(model(x), y).backward()
    pre.step()
    pre.close()
    whole = exact(model, likelihood="categorical")
    F.cross_entropy(model(x[[0, 4]]), y[[0, 4]]).backward()
    whole.step()
    assert torch.allclose(pre.factors.running[1], whole.factors.running[1], atol=1e-12)


def test_a_fraction_needs_a_batched_input() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.x = torch.randn(5, 3)

        def forward(self) -> Tensor:
            return self.layer(self.x)

    model = Constant()
    pre = exact(model, factor_fraction=0.5)
    with pytest.raises(ValueError, match=r"factor_fraction=0.5 needs a model input whose first dimension is the batch"):
        half_square(model()).backward()
    pre.close()
    with pytest.raises(ValueError, match="factor_fraction must be 1 with fisher='empirical'"):
        Preconditioner(model, fisher="empirical", factor_fraction=0.5)
