"""Activation checkpointing."""

from __future__ import annotations

import pytest
import torch
from recompute import DOUBLE, Net, exact, plain_factors
from torch import nn


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
