"""deepcopy, pickle and torch.save of an optimizer, with its model and alone."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import backward, equal, mlp, train
from torch import Tensor, nn

from kfac_fast import KFAC, Preconditioner
from kfac_fast.approximations import APPROXIMATIONS


def through_pickle(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


def through_torch_save(pair: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": through_pickle, "torch.save": through_torch_save}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("adaptive", [False, True])
def test_model_and_optimizer_are_copied_together(how: str, adaptive: bool) -> None:
    def run(model: nn.Module, optimizer: KFAC, steps: range) -> list[Tensor]:
        for step in steps:

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                return backward(model, step)

            optimizer.step(closure)
        return [p.detach().clone() for p in model.parameters()]

    model = mlp()
    optimizer = KFAC(model, adaptive=adaptive, inverse_every=2, damping=0.1)
    run(model, optimizer, range(3))
    twin, other = COPIES[how]((model, optimizer))
    assert other.preconditioner.model is twin
    assert all(p is q for p, q in zip(other.param_groups[0]["params"], twin.parameters(), strict=True))
    before = [p.detach().clone() for p in model.parameters()]
    after = run(twin, other, range(3, 7))
    assert equal(before, list(model.parameters()))
    assert equal(after, run(model, optimizer, range(3, 7)))
    assert all(len(m._forward_hooks) <= 1 for m in twin.modules())  # those of the first model's optimizer are gone


@pytest.mark.parametrize("how", COPIES)
def test_an_optimizer_that_is_copied_alone_has_a_copy_of_the_model(how: str) -> None:
    model = mlp()
    optimizer = KFAC(model)
    train(model, optimizer, range(2))
    other = COPIES[how](optimizer)
    twin = other.preconditioner.model
    assert twin is not model
    assert equal(train(twin, other, range(2, 5)), train(model, optimizer, range(2, 5)))


def test_a_copy_of_the_model_alone_is_free_of_hooks() -> None:
    """As moving averages of weights (EMA, SWA) make it."""
    model = mlp()
    optimizer = KFAC(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    train(model, optimizer, range(2))
    average.update_parameters(model)
    updates = optimizer.preconditioner.factors.updates.clone()
    optimizer.zero_grad()
    F.cross_entropy(average(torch.randn(4, 6)), torch.arange(4) % 3).backward()
    optimizer.step()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in average.modules())
    assert torch.equal(optimizer.preconditioner.factors.updates, updates)


def test_a_closed_preconditioner_stays_closed_in_a_copy() -> None:
    model = mlp()
    pre = Preconditioner(model)
    pre.close()
    assert copy.deepcopy(pre).capture.closed


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_every_approximation_is_copied_and_resumed(approximation: str) -> None:
    model = mlp()
    optimizer = KFAC(model, approximation=approximation, inverse_every=2, damping=0.1)
    train(model, optimizer, range(3))
    twin, other = copy.deepcopy((model, optimizer))
    third = mlp()
    third.load_state_dict(model.state_dict())
    resumed = KFAC(third, approximation=approximation, inverse_every=2, damping=0.1)
    state = io.BytesIO()
    torch.save(optimizer.state_dict(), state)
    state.seek(0)
    saved = torch.load(state, weights_only=True)
    assert all(type(v) in (Tensor, int, float, bool) for entry in saved["state"].values() for v in entry.values())
    resumed.load_state_dict(saved)
    expected = train(model, optimizer, range(3, 7))
    assert equal(train(twin, other, range(3, 7)), expected)
    assert equal(train(third, resumed, range(3, 7)), expected)
    assert resumed.stats() == other.stats() == optimizer.stats()
