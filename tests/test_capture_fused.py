"""Fused modules in ways of running that torch has special paths for."""

from __future__ import annotations

import pytest
import torch
from recompute import DOUBLE, exact, half_square
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_fast import KFAC


class Encoder(nn.Module):
    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.lstm = nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True, proj_size=2)
        self.head = nn.Linear(4, 3)
        self.checkpointed = checkpointed

    def inside(self, x: Tensor) -> Tensor:
        return self.lstm(self.body(x))[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inside, x, use_reentrant=False) if self.checkpointed else self.inside(x))


def factors(model: Encoder, x: Tensor, **options) -> Tensor:
    pre = exact(model, **options)
    half_square(model(x)).backward()
    pre.steps = 1  # the inverses do not matter here
    pre.step()
    pre.close()
    model.zero_grad()
    return pre.factors.running.data.clone()


def test_evaluation_on_the_fast_path_between_steps_is_not_seen() -> None:
    model, x = Encoder().double(), torch.randn(3, 5, 4, dtype=DOUBLE)
    expected = factors(model, x)
    with torch.no_grad():
        plain = model.eval()(x)
    pre = exact(model.train())
    half_square(model(x)).backward()
    with torch.no_grad():  # here torch computes a layer in one fused call
        assert torch.equal(model.eval()(x), plain)
    pre.steps = 1
    pre.step()
    assert torch.equal(pre.factors.running.data, expected)


def test_training_in_eval_mode_has_the_same_statistics() -> None:
    model, x = Encoder().double(), torch.randn(3, 5, 4, dtype=DOUBLE)
    assert torch.allclose(factors(model.eval(), x), factors(model.train(), x), atol=1e-12)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_fused_modules_inside_a_checkpoint(fisher: str) -> None:
    model, x = Encoder().double(), torch.randn(3, 5, 4, dtype=DOUBLE)
    expected = factors(model, x, fisher=fisher)
    model.checkpointed = True
    assert torch.allclose(factors(model, x, fisher=fisher), expected, atol=1e-12)


def test_every_parameter_has_a_block() -> None:
    assert {row.reason for row in KFAC(Encoder()).report()} == {""}
