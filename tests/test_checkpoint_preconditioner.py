"""Saving and resuming a `Preconditioner` beside another optimizer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_checkpoint import small_model, through_a_file
from torch import Tensor, nn

from kfac_fast import Preconditioner


def test_a_preconditioner_beside_another_optimizer_resumes_bit_for_bit() -> None:
    def run(steps: range, saved: dict | None = None) -> tuple[list[Tensor], dict]:
        model = small_model()
        pre = Preconditioner(model, factor_every=2, inverse_every=3)
        adam = torch.optim.Adam(model.parameters(), lr=0.01)
        if saved is not None:
            model.load_state_dict(saved["model"])
            adam.load_state_dict(saved["adam"])
            assert pre.load_state_dict(saved["preconditioner"]) == ([], [])
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            adam.zero_grad()
            F.cross_entropy(model(torch.randn(16, 6, generator=generator)), torch.arange(16) % 3).backward()
            pre.step()
            adam.step()
        state = {"model": model.state_dict(), "adam": adam.state_dict(), "preconditioner": pre.state_dict()}
        return [p.detach().clone() for p in model.parameters()], through_a_file(state)

    expected, _ = run(range(9))
    _, saved = run(range(4))
    resumed, _ = run(range(4, 9), saved)
    assert all(torch.equal(p, q) for p, q in zip(resumed, expected, strict=True))


def test_a_preconditioner_refuses_what_does_not_fit() -> None:
    pre = Preconditioner(small_model())
    state = pre.state_dict()
    with pytest.raises(ValueError, match=r"must have 'layers' and 'run', got \['state'\]"):
        pre.load_state_dict({"state": {}})
    larger = Preconditioner(nn.Sequential(*small_model(), nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="no 'a_factor' for layer 6"):
        larger.load_state_dict(state)
    assert larger.load_state_dict(state, strict=False) == (["6"], [])
    with pytest.raises(ValueError, match="layers that are not in the model: 6"):
        pre.load_state_dict(larger.state_dict())
    assert pre.load_state_dict(larger.state_dict(), strict=False) == ([], ["6"])
