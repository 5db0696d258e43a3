"""autocast, GradScaler, and parameters in half precision."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from small import equal, mlp
from torch import Tensor, nn

from kfac_fast import KFAC, KFACWarning, Preconditioner

HALF = [torch.bfloat16, torch.float16]


def batch(step: int, n: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(n, 6, generator=generator)
    return x, x[:, :3].argmax(1)


# ---- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_statistics_under_autocast_are_those_of_the_half_precision_rows(dtype: torch.dtype, fisher: str) -> None:
    """Inputs and output gradients are half precision; their second moments are summed in float32 from just those."""
    model = mlp()
    rows: dict[str, list[Tensor]] = {"a": [], "g": []}
    pre = Preconditioner(model, fisher=fisher)
    if fisher == "empirical":  # the user's own gradients can be watched
        model[2].register_forward_hook(
            lambda m, args, out: (rows["a"].append(args[0].detach()), out.register_hook(lambda g: rows["g"].append(g)))[
                0
            ]
        )
    x, y = batch(0)
    with torch.autocast("cpu", dtype):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    pre.step()
    assert pre.factors.running.data.dtype == torch.float32
    whole = Preconditioner(twin := mlp(), fisher=fisher)
    F.cross_entropy(twin(x), y).backward()
    whole.step()
    for i, (half, full) in enumerate(zip(pre.factors.running, whole.factors.running, strict=True)):
        if not (fisher == "mc" and i >= 2):  # the other precision draws other targets
            assert torch.allclose(half, full, rtol=0.1, atol=0.05 * float(full.abs().max()))
    if fisher == "empirical":
        a, g = rows["a"][0].double(), rows["g"][0].double()
        assert rows["a"][0].dtype == rows["g"][0].dtype == dtype
        assert torch.allclose(pre.factors.running[1][:8, :8].double(), a.T @ a / len(a), rtol=1e-5, atol=1e-8)
        # Rows of G are gradients of a mean over as many terms as rows.
        assert torch.allclose(pre.factors.running[3].double(), len(g) * g.T @ g, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("options", [{}, {"factor_fraction": 0.5}, {"fisher": "exact"}], ids=str)
def test_training_under_autocast(dtype: torch.dtype, options: dict) -> None:
    model = mlp()
    optimizer = KFAC(model, lr=0.1, **options)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    losses = []
    for step in range(40):
        x, y = batch(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())


# ---- GradScaler -----------------------------------------------------------------------------------------------------


def run(scaled: bool, clip: bool, *, fisher: str = "mc", tell: bool = True) -> tuple[list[Tensor], KFAC]:
    """Five steps in float32, where multiplying by a power of two and dividing again is exact."""
    model = mlp()
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**16)
    optimizer = KFAC(model, fisher=fisher, grad_scaler=scaler if tell else None)
    for step in range(5):
        x, y = batch(step)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    return list(model.parameters()), optimizer


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("clip", [False, True], ids=["default path", "unscale_ and clip_grad_norm_"])
def test_the_loss_scale_leaves_no_trace(fisher: str, clip: bool) -> None:
    plain, one = run(False, clip, fisher=fisher)
    scaled, other = run(True, clip, fisher=fisher)
    assert torch.equal(one.preconditioner.factors.running.data, other.preconditioner.factors.running.data)
    assert equal(plain, scaled)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_only_the_empirical_fisher_has_to_be_told_of_the_scaler(fisher: str) -> None:
    _, plain = run(False, False, fisher=fisher, tell=False)
    _, scaled = run(True, False, fisher=fisher, tell=False)
    g, blown_up = (o.preconditioner.factors.running[2] for o in (plain, scaled))
    assert torch.equal(g, blown_up) == (fisher == "mc")
    with pytest.raises(TypeError, match=r"grad_scaler must be a torch.amp.GradScaler, got float"):
        KFAC(mlp(), grad_scaler=65536.0)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("clear", ["optimizer", "optimizer, zeros", "model"])
def test_an_overflowing_step_commits_nothing(fisher: str, clear: str) -> None:
    """The scaler leaves the step out; the run goes on as if its batch had never come."""

    def zero(model: nn.Module, optimizer: KFAC) -> None:
        if clear == "model":
            model.zero_grad()
        else:
            optimizer.zero_grad(set_to_none=clear == "optimizer")

    def train(overflow: bool) -> tuple[list[Tensor], KFAC]:
        model = mlp()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1000)
        optimizer = KFAC(model, fisher=fisher, grad_scaler=scaler)
        for step in range(4):
            if overflow and step == 2:
                before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"][0]))
                x, y = batch(77)
                zero(model, optimizer)
                scaler.scale(F.cross_entropy(model(x), y) * 1e35).backward()
                scaler.step(optimizer)
                scaler.update()
                assert scaler.get_scale() == 2.0**15
                assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
                assert torch.equal(optimizer.state_dict()["state"][0]["g_factor"], before[1]["g_factor"])
                assert optimizer.preconditioner.steps == 2
            x, y = batch(step)
            zero(model, optimizer)
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        return list(model.parameters()), optimizer

    expected, clean = train(False)
    got, optimizer = train(True)
    assert equal(expected, got)
    assert torch.equal(clean.preconditioner.factors.running.data, optimizer.preconditioner.factors.running.data)


def test_a_preconditioner_between_unscale_and_step() -> None:
    def train(scaled: bool) -> list[Tensor]:
        model = mlp()
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        pre = Preconditioner(model)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(4):
            x, y = batch(step)
            sgd.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.unscale_(sgd)
            pre.step()
            scaler.step(sgd)
            scaler.update()
        return list(model.parameters())

    assert equal(train(False), train(True))


def test_a_real_overflow_in_float16() -> None:
    """Activations that float16 can't hold: the steps are left out until the scale has come down."""
    model = mlp()
    optimizer = KFAC(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-8)
    made = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KFACWarning)
        for step in range(12):
            x, y = batch(step)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            made = optimizer.preconditioner.steps
    assert 0 < made < 12
    assert optimizer.state_dict()["state"][0]["updates"].tolist() == [[made], [made]]
    assert all(p.isfinite().all() for p in model.parameters())


# ---- half-precision parameters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_parameters_have_float32_curvature(dtype: torch.dtype) -> None:
    """A step is the float32 step from the same weights, gradients and factors, rounded once."""
    model = mlp(dtype)
    optimizer = KFAC(model, lr=0.5, kl_clip=None, damping=0.1, momentum=0.0)
    x, y = batch(0)
    F.cross_entropy(model(x.to(dtype)), y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    pre = optimizer.preconditioner
    assert pre.factors.running.data.dtype == pre.results_flat.dtype == torch.float32
    for p, old, u in zip(model.parameters(), before, pre.results, strict=True):
        assert p.dtype == dtype
        assert torch.allclose(p.float(), old.float() - 0.5 * u, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.allclose(pre.factors.running[0][:6, :6], (x.to(dtype).float().T @ x.to(dtype).float()) / 32, rtol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_parameters_train(dtype: torch.dtype) -> None:
    model = mlp(dtype)
    optimizer = KFAC(model, lr=0.1)
    losses = []
    for step in range(40):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.to(dtype)), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(state["momentum_buffer"].dtype == torch.float32 for state in optimizer.state.values())
