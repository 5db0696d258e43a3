"""What goes wrong in training changes nothing that was good, is counted, and is said once."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_optimizer import backward, batch, mlp
from torch import Tensor, nn

import kfac_fast.inverses
import kfac_fast.optimizer
from kfac_fast import KFAC, KFACWarning, Preconditioner, ops


def snapshot(model: nn.Module, optimizer: KFAC) -> list[Tensor]:
    factors = optimizer.preconditioner.factors
    buffers = [s["momentum_buffer"] for s in optimizer.state.values() if "momentum_buffer" in s]
    return [t.clone() for t in (*model.parameters(), *buffers, factors.running.data, factors.updates)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_batch_with_nan_changes_nothing(value: float, fisher: str) -> None:
    model = mlp()
    optimizer = KFAC(model, fisher=fisher)
    for _ in range(3):
        backward(model, *batch())
        optimizer.step()
    before = snapshot(model, optimizer)
    x, y = batch()
    x[3, 2] = value
    for again in (False, True):
        backward(model, x, y)
        with (
            warnings.catch_warnings()
            if again
            else pytest.warns(KFACWarning, match="gradient of 0.weight is not finite")
        ):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, snapshot(model, optimizer), strict=True))
    stats = optimizer.stats()
    assert (stats["step"], stats["skipped_steps"], stats["refused_statistics"], stats["failures"]) == (5, 2, 2, 0)
    backward(model, *batch())
    optimizer.step()
    after = snapshot(model, optimizer)
    assert all(t.isfinite().all() for t in after)
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("options", [{}, {"kl_clip": None, "weight_decay": 0.1}, {"momentum": 0.0}], ids=str)
def test_a_nan_batch_changes_nothing_where_the_host_does_not_wait(
    options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the host never learns that the step is left out, the device has to."""
    monkeypatch.setattr(kfac_fast.optimizer, "read_if_free", lambda flag: None)
    model = nn.Sequential(nn.Linear(6, 8), nn.PReLU(8), nn.Linear(8, 3))
    twin = copy.deepcopy(model)
    optimizer, plain = KFAC(model, **options), KFAC(twin, **options)
    for _ in range(3):
        x, y = batch()
        for m, o in ((model, optimizer), (twin, plain)):
            backward(m, x, y)
            o.step()
    before = snapshot(model, optimizer)
    x, y = batch()
    x[0, 0] = math.nan
    backward(model, x, y)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, snapshot(model, optimizer), strict=True))
    assert optimizer.stats()["skipped_steps"] == 1
    monkeypatch.undo()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_nan_in_the_very_first_batch_is_survived() -> None:
    model = mlp()
    optimizer = KFAC(model)
    x, y = batch()
    x[0, 0] = math.nan
    backward(model, x, y)
    with pytest.warns(KFACWarning, match="is not finite; the step was left out"):
        optimizer.step()
    for _ in range(2):
        backward(model, *batch())
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert int(optimizer.preconditioner.factors.updates[0]) == 2


def test_an_indefinite_factor_is_rescued_alone_and_named_once() -> None:
    model = mlp()
    optimizer = KFAC(model, inverse_every=1)
    backward(model, *batch())
    optimizer.step()
    factors, inverses = optimizer.preconditioner.factors, optimizer.preconditioner.approximation.damped
    factors.running[1].sub_(5000 * torch.eye(9))  # A of the second layer
    expected = ops.damped_inverse(factors.running, inverses.damping(torch.full((3,), 0.1))).inverse
    with pytest.warns(KFACWarning, match=r"factor A of 2 is not positive definite .*floored at the damping"):
        inverses.update(torch.full((3,), 0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inverses.update(torch.full((3,), 0.1))
    assert inverses.failures.tolist() == [0, 2, 0, 0, 0, 0]
    for i in (0, 2, 3, 4, 5):
        assert torch.equal(inverses.inverse[i], expected[i])
    assert torch.linalg.eigvalsh(inverses.inverse[1].double()).min() > 0


def test_a_factor_with_nan_keeps_the_last_good_inverse() -> None:
    model = mlp()
    optimizer = KFAC(model)
    backward(model, *batch())
    optimizer.step()
    inverses = optimizer.preconditioner.approximation.damped
    last = inverses.inverse.clone()
    optimizer.preconditioner.factors.running[4][0, 0] = math.nan  # G of the second layer
    with pytest.warns(KFACWarning, match="factor G of 2 .* kept its last good inverse"):
        inverses.update(torch.full((3,), 0.5))
    assert torch.equal(inverses.inverse[4], last[4])
    assert not torch.equal(inverses.inverse[0], last[0])


def test_where_the_host_does_not_wait_a_bad_factor_is_retried_with_ten_times_the_damping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU: all retries are queued, each for what has failed so far; the host reads the outcome later."""
    model = mlp()
    optimizer = KFAC(model)
    backward(model, *batch())
    optimizer.step()
    monkeypatch.setattr(kfac_fast.inverses, "reading_is_free", lambda device: False)
    running, inverses = optimizer.preconditioner.factors.running, optimizer.preconditioner.approximation.damped
    lowest = float(torch.linalg.eigvalsh(running[1].double())[0])
    gamma = torch.full((3,), 0.1)
    damping = float(inverses.damping(gamma)[1])
    running[1].sub_((lowest + 5 * damping) * torch.eye(9))  # of the second layer; ten times the damping suffices
    running[4][0, 0] = math.nan
    last = inverses.inverse.clone()
    expected = torch.linalg.inv(running[1].double() + 10 * damping * torch.eye(9, dtype=torch.float64))
    inverses.update(gamma)
    assert torch.allclose(inverses.inverse[1].double(), expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(inverses.inverse[4], last[4])
    assert not torch.equal(inverses.inverse[0], last[0])
    assert inverses.failures.tolist() == [0, 1, 0, 0, 1, 0]
    with pytest.warns(KFACWarning, match=r"factor [AG] of 2 .*with more damping, or kept its last inverse") as said:
        inverses.update(gamma)
    assert len(said) == 2


def test_a_rank_deficient_factor_with_tiny_damping_trains_on() -> None:
    """Two distinct rows in 200 dimensions, λ = 1e-12: float32 cannot, the ladder can."""
    model = nn.Linear(200, 3)
    optimizer = KFAC(model, damping=1e-12)
    x = torch.randn(2, 200).repeat(8, 1)
    y = torch.randint(3, (16,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KFACWarning)
        for _ in range(5):
            backward(model, x, y)
            optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert int(optimizer.preconditioner.approximation.damped.failures[0]) > 0


def test_dead_inputs_give_pi_one() -> None:
    """A factor with zero trace: its block is damped evenly, and nothing is NaN."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    optimizer = KFAC(model, momentum=0.0, kl_clip=None)
    F.cross_entropy(model(torch.zeros(5, 4, dtype=torch.float64)), torch.zeros(5, dtype=torch.long)).backward()
    optimizer.step()
    gamma = torch.full((1,), 0.2, dtype=torch.float64)
    assert optimizer.preconditioner.approximation.damped.damping(gamma).tolist() == [0.2, 0.2]
    assert model[0].weight.isfinite().all()


@pytest.mark.parametrize("since", [0, 4])
def test_a_layer_that_died_leaves_the_others_training(since: int) -> None:
    """No input of a ReLU is positive any more: nothing comes out of it, and no gradient goes below."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = KFAC(model)
    for step in range(12):
        if step == since:
            with torch.no_grad():
                model[2].bias.fill_(-1e3)
        head = model[4].bias.detach().clone()
        backward(model, *batch())
        optimizer.step()
    assert not model[2].weight.grad.any()
    assert not torch.equal(head, model[4].bias)
    assert all(p.isfinite().all() for p in model.parameters())
    stats = optimizer.stats()
    assert (stats["skipped_steps"], stats["refused_statistics"], stats["failures"]) == (0, 0, 0)


def test_one_by_one_factors() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    pre = Preconditioner(model, likelihood="gaussian", fisher="exact", damping=0.01)
    (0.5 * model(torch.full((4, 1), 2.0, dtype=torch.float64)).square().mean()).backward()
    v = float(model.weight.grad)
    pre.step()
    gamma, pi = 0.1, math.sqrt(4.0 / 1.0)
    assert float(model.weight.grad) == pytest.approx(v / ((4 + pi * gamma) * (1 + gamma / pi)), rel=1e-12)
