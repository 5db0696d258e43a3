"""Hooks and graphs live as long as they should, and no longer."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from recompute import DOUBLE, Net, exact, half_square, plain_factors
from torch import nn
from torch.utils.checkpoint import checkpoint

from kfac_fast import KFAC


def test_copies_of_the_model_carry_no_hooks() -> None:
    model = Net(nn.Tanh())
    pre = exact(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        half_square(twin(torch.randn(5, 3))).backward()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
    assert not pre.factors.has_pending


def test_close_removes_every_hook() -> None:
    model = Net(nn.Tanh())
    optimizer = KFAC(model, likelihood="gaussian")
    y = model(torch.randn(5, 3))
    optimizer.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    half_square(y).backward()
    optimizer.step()  # goes on with what it has
    assert not optimizer.preconditioner.factors.updates.any()


def test_a_dropped_optimizer_and_dropped_graphs_are_freed() -> None:
    model = Net(nn.Tanh())
    optimizer = KFAC(model, likelihood="gaussian")
    for _ in range(2):
        y = model(torch.randn(5, 3))  # no backward pass: the graph must die with its output
        node = weakref.ref(y)
        del y
        gc.collect()
        assert node() is None
    capture = weakref.ref(optimizer.preconditioner.capture)
    del optimizer
    gc.collect()
    assert capture() is None
    model(torch.randn(5, 3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_memory_does_not_grow_when_backward_never_comes() -> None:
    model = Net(nn.Tanh())
    optimizer = KFAC(model, likelihood="gaussian")
    inputs = [weakref.ref(model(x).grad_fn and x) for x in [torch.randn(5, 3) for _ in range(5)]]
    gc.collect()
    assert sum(ref() is not None for ref in inputs) == 0
    optimizer.close()


def test_two_optimizers_on_one_model() -> None:
    model = Net(nn.Tanh()).double()
    x = torch.randn(5, 3, dtype=DOUBLE)
    expected = plain_factors(model, x)
    first, second = exact(model), exact(model)
    half_square(model(x)).backward()
    first.step()
    second.step()
    assert torch.equal(first.factors.running.data, expected)
    assert torch.equal(second.factors.running.data, expected)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_error_of_the_model_is_seen_after_the_optimizer_is_gone(checkpointed: bool) -> None:
    """Its hooks are then still there, and go when the model is next called."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    exact(model)
    exact(model)
    gc.collect()
    x = torch.randn(5, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
    model(torch.randn(5, 3))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
