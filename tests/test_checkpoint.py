"""Saving and resuming."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fast import KFAC


def model_and_optimizer(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, KFAC]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2, groups=2), nn.Flatten(), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)
    ).to(dtype)
    return model, KFAC(model, factor_every=2, inverse_every=3)


def train(model: nn.Module, optimizer: KFAC, steps: range) -> list[Tensor]:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=generator).to(next(model.parameters()).dtype)
        y = torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def through_a_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact_at_any_step(stop: int, dtype: torch.dtype) -> None:
    model, optimizer = model_and_optimizer(dtype)
    expected = train(model, optimizer, range(10))
    model, optimizer = model_and_optimizer(dtype)
    train(model, optimizer, range(stop))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    model, optimizer = model_and_optimizer(dtype)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert all(torch.equal(p, q) for p, q in zip(train(model, optimizer, range(stop, 10)), expected, strict=True))


def test_state_is_a_copy() -> None:
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    train(model, optimizer, range(2, 5))
    for entry, old in zip(state["state"].values(), before["state"].values(), strict=True):
        for key in set(entry) - {"momentum_buffer"}:
            assert torch.equal(entry[key], old[key]), key


@pytest.mark.parametrize("spoil", ["truncated", "shape", "sgd", "momentum", "more"])
def test_a_bad_checkpoint_is_refused_before_anything_changes(spoil: str) -> None:
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    if spoil == "truncated":
        del state["state"][4]["g_inverse"]
        message = "state_dict has no 'g_inverse' for layer 5"
    elif spoil == "shape":
        state["state"][4]["a_factor"] = torch.zeros(1, 4, 4)
        message = r"'a_factor' of shape \(1, 4, 4\) for layer 5, expected \(1, 9, 9\)"
    elif spoil == "more":
        state["state"][9] = {"momentum_buffer": torch.zeros(3)}
        message = r"state for parameters \[9\], of 6 here"
    elif spoil == "momentum":
        state["state"][2]["momentum_buffer"] = torch.zeros(3)
        message = "momentum_buffer of shape"
    else:
        state = torch.optim.SGD(model.parameters()).state_dict()
        message = "not of a KFAC"
    state["param_groups"][0]["lr"] = 77.0
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"][0]["lr"] == before["param_groups"][0]["lr"]
    for key in before["state"][4]:
        assert torch.equal(before["state"][4][key], after["state"][4][key])


def test_something_else_than_a_state_dict_is_named() -> None:
    _, optimizer = model_and_optimizer()
    with pytest.raises(ValueError, match=r"must have 'state' and 'param_groups', got \['lr'\]"):
        optimizer.load_state_dict({"lr": 0.1})
