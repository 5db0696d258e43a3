"""The step itself: against a float64 recomputation, its options, its failure policy, its arguments."""

from __future__ import annotations

import copy
import math
import warnings

import kfac_fast.KFAC
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fast
from kfac_fast import KFAC, KFACWarning, Preconditioner
from kfac_fast.layers import KroneckerBlock


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)


def batch(n: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 6, dtype=dtype), torch.randint(3, (n,))


def backward(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def test_both_imports_are_the_class() -> None:
    assert kfac_fast.KFAC is KFAC
    assert isinstance(KFAC(mlp()), torch.optim.Optimizer)


def test_one_plain_step_is_the_natural_gradient() -> None:
    """Without clip, momentum and decay a step is exactly −lr · G⁻¹ V A⁻¹ (sec. 4.2), damped with γ = √λ and π."""
    model = mlp(torch.float64)
    x, y = batch(dtype=torch.float64)
    damping, lr = 0.02, 0.3
    optimizer = KFAC(model, lr=lr, momentum=0.0, damping=damping, kl_clip=None, fisher="exact")
    backward(model, x, y)
    before = [p.detach().clone() for p in model.parameters()]
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    factors = optimizer.preconditioner.factors
    eye = torch.eye
    for i in range(3):
        a, g = factors.running[i], factors.running[3 + i]
        pi = math.sqrt(float(a.trace() / len(a)) / float(g.trace() / len(g)))
        gamma = math.sqrt(damping)
        v = torch.cat([gradients[2 * i], gradients[2 * i + 1][:, None]], 1)
        left = torch.linalg.solve(g + gamma / pi * eye(len(g), dtype=g.dtype), v)
        u = torch.linalg.solve(a + pi * gamma * eye(len(a), dtype=a.dtype), left.T).T
        weight, bias = list(model.parameters())[2 * i : 2 * i + 2]
        assert torch.allclose(before[2 * i] - lr * u[:, :-1], weight, atol=1e-12)
        assert torch.allclose(before[2 * i + 1] - lr * u[:, -1], bias, atol=1e-12)


def test_preconditioner_rewrites_gradients_like_kfac() -> None:
    model = mlp(torch.float64)
    twin = copy.deepcopy(model)
    x, y = batch(dtype=torch.float64)
    optimizer = KFAC(model, lr=0.1, momentum=0.0, damping=0.05, kl_clip=None)
    pre = Preconditioner(twin, damping=0.05)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        backward(model, x, y)
        optimizer.step()
        backward(twin, x, y)
        pre.step()
        sgd.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-12)


def test_kl_clip_bounds_the_quadratic_form() -> None:
    model = mlp(torch.float64)
    x, y = batch(dtype=torch.float64)
    kappa, lr = 1e-4, 0.5
    optimizer = KFAC(model, lr=lr, momentum=0.0, damping=1e-3, kl_clip=kappa)
    free = KFAC(twin := copy.deepcopy(model), lr=lr, momentum=0.0, damping=1e-3, kl_clip=None)
    backward(model, x, y)
    backward(twin, x, y)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    free.step()
    clipped = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    full = torch.cat([p.detach().flatten() for p in twin.parameters()]) - start
    form = -lr * float(gradient @ full)
    assert form > kappa
    assert torch.allclose(clipped, full * math.sqrt(kappa / form), rtol=1e-8, atol=1e-14)
    assert optimizer.stats()["clip"] == pytest.approx(math.sqrt(kappa / form), rel=1e-8)
    assert "clip" not in free.stats()


def test_momentum_and_weight_decay_follow_sgd_on_natural_gradients() -> None:
    for nesterov in (True, False):
        model = mlp(torch.float64)
        twin = copy.deepcopy(model)
        options = {"lr": 0.05, "momentum": 0.9, "nesterov": nesterov}
        optimizer = KFAC(model, damping=0.1, kl_clip=None, weight_decay=0.01, **options)
        pre = Preconditioner(twin, damping=0.1)
        sgd = torch.optim.SGD(twin.parameters(), **options)
        for _ in range(4):
            x, y = batch(dtype=torch.float64)
            backward(model, x, y)
            optimizer.step()
            backward(twin, x, y)
            pre.step()
            with torch.no_grad():
                for p in twin.parameters():
                    p.mul_(1 - 0.05 * 0.01)
            sgd.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(p, q, atol=1e-12)


def test_maximize_climbs() -> None:
    model = mlp(torch.float64)
    twin = copy.deepcopy(model)
    x, y = batch(dtype=torch.float64)
    up, down = KFAC(model, maximize=True), KFAC(twin)
    start = [p.detach().clone() for p in model.parameters()]
    for m, o in ((model, up), (twin, down)):
        backward(m, x, y)
        o.step()
    for s, p, q in zip(start, model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p - s, s - q, atol=1e-12)


def test_closure_is_called_once_with_gradients() -> None:
    model = mlp()
    x, y = batch()
    optimizer = KFAC(model)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    assert calls == [True]


def test_parameters_without_a_block_take_the_base_update_and_are_named() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.PReLU(8), nn.Linear(8, 3))
    twin = copy.deepcopy(model)
    optimizer = KFAC(model, lr=0.1, momentum=0.9, nesterov=True)
    x, y = batch()
    report = {row.name: row for row in optimizer.report()}
    assert report["0.weight"].blocks == (KroneckerBlock(("weight", "bias"), a=7, g=8, bias=True),)
    assert report["0.weight"].kind == "LinearLayer"
    assert not report["1.weight"].covered
    assert report["1.weight"].reason == "no block for PReLU"
    assert "4 of 5 parameters preconditioned" in str(optimizer.report())
    assert report["0.weight"].bytes == 3 * 4 * (7 * 7 + 8 * 8)
    backward(model, x, y)
    gradient = model[1].weight.grad.clone()
    optimizer.step()
    # The first Nesterov step is −lr (1 + momentum) gradient.
    assert torch.allclose(model[1].weight, twin[1].weight - 0.1 * 1.9 * gradient)


def test_parameter_groups_have_their_own_settings() -> None:
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters(), "damping": 1.0}]
    optimizer = KFAC(model, groups, kl_clip=None)
    before = copy.deepcopy(model.state_dict())
    backward(model, *batch())
    optimizer.step()
    after = model.state_dict()
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["2.weight"], after["2.weight"])
    assert torch.equal(before["4.weight"], after["4.weight"])
    assert {row.name: row.reason for row in optimizer.report()}[
        "4.weight"
    ] == "its parameters are not all in this optimizer"


def test_statistics_and_inverses_follow_their_schedules() -> None:
    model = mlp()
    optimizer = KFAC(model, factor_every=3, inverse_every=4)
    factors, inverses = optimizer.preconditioner.factors, optimizer.preconditioner.approximation.damped
    updates, changed = [], []
    for _ in range(9):
        last = inverses.inverse.clone()
        backward(model, *batch())
        assert factors.has_pending == (len(updates) % 3 == 0)
        optimizer.step()
        updates.append(int(factors.updates[0]))
        changed.append(not all(torch.equal(x, y) for x, y in zip(last, inverses.inverse, strict=True)))
    assert updates == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert changed == [True, False, False, False, True, False, False, False, True]  # steps 1, 2: same factors again


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_micro_batches_equal_one_batch(fisher: str) -> None:
    """Factors do not depend on how the batch is cut; targets of "mc" are drawn anew, so it is compared elsewhere."""
    model = mlp(torch.float64)
    x, y = batch(12, torch.float64)
    results = []
    for pieces in (1, 3):
        pre = Preconditioner(model, fisher=fisher)
        model.zero_grad()
        for xs, ys in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            (F.cross_entropy(model(xs), ys) / pieces).backward()
        pre.step()
        pre.close()
        results.append(pre.factors.running)
    for i, (one, cut) in enumerate(zip(*results, strict=True)):
        if fisher == "mc" and i >= 3:
            continue
        assert torch.allclose(one, cut, atol=1e-12)


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_factors_do_not_depend_on_the_scale_of_the_loss(fisher: str) -> None:
    model = mlp(torch.float64)
    x, y = batch(dtype=torch.float64)
    results = []
    for scale in (1.0, 65536.0, 1e-3):
        pre = Preconditioner(model, fisher=fisher)
        model.zero_grad()
        (F.cross_entropy(model(x), y, reduction="sum") * scale).backward()
        pre.step()
        pre.close()
        results.append(pre.factors.running.data.clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_order_of_parameters_does_not_matter() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    x, y = batch()
    first = KFAC(model)
    second = KFAC(twin, list(twin.parameters())[::-1])
    for _ in range(3):
        backward(model, x, y)
        first.step()
        backward(twin, x, y)
        second.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_invariant_to_affine_maps_of_inputs_without_damping(fisher: str) -> None:
    """As λ → 0 training does not see an invertible affine map of the inputs, folded into the first layer (sec. 10)."""
    x, y = batch(64, torch.float64)
    model = mlp(torch.float64)
    m = torch.randn(6, 6, dtype=torch.float64) + 3 * torch.eye(6, dtype=torch.float64)
    shift = torch.randn(6, dtype=torch.float64)
    twin = copy.deepcopy(model)
    with torch.no_grad():  # W z + b = W M⁻¹ (M z + s) + (b − W M⁻¹ s)
        w = model[0].weight @ torch.linalg.inv(m)
        twin[0].weight.copy_(w)
        twin[0].bias.sub_(w @ shift)
    options = {"lr": 0.05, "momentum": 0.0, "damping": 1e-16, "kl_clip": None, "fisher": fisher}
    pairs = [(model, KFAC(model, **options), x), (twin, KFAC(twin, **options), x @ m.T + shift)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KFACWarning)
        for _ in range(3):
            for net, optimizer, z in pairs:
                backward(net, z, y)
                optimizer.step()
    assert torch.allclose(model(x), twin(x @ m.T + shift), atol=1e-3)
    assert not torch.allclose(model(x), mlp(torch.float64)(x), atol=1e-3)


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -0.001}, r"damping must be a number > 0, got damping=-0.001"),
        ({"damping": math.nan}, r"damping must be a number > 0, got damping=nan"),
        ({"lr": -1.0}, r"lr must be a number >= 0, got lr=-1.0"),
        ({"momentum": 1.0}, r"momentum must be a number >= 0 and < 1, got momentum=1.0"),
        ({"decay": 1.0}, r"decay must be a number >= 0 and < 1, got decay=1.0"),
        ({"weight_decay": -1}, r"weight_decay must be a number >= 0"),
        ({"kl_clip": 0}, r"kl_clip must be a number > 0, got kl_clip=0"),
        ({"factor_every": 0}, r"factor_every must be an integer >= 1, got factor_every=0"),
        ({"inverse_every": 2.5}, r"inverse_every must be an integer >= 1, got inverse_every=2.5"),
        ({"fisher": "true"}, r"fisher must be one of 'mc', 'exact', 'empirical', got fisher='true'"),
        ({"likelihood": "poisson"}, r"likelihood must be one of \['bernoulli', 'categorical', 'gaussian'\] or a Likelihood, got 'poisson'"),
        ({"lr": torch.ones(2)}, r"lr must be a number or a tensor with one element"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KFAC(mlp(), **options)


def test_wrong_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        KFAC(list(mlp().parameters()))
    with pytest.raises(ValueError, match="must not be a DataParallel"):
        KFAC(nn.DataParallel(mlp()))


def test_tensor_lr_and_schedulers_are_read_every_step() -> None:
    model = mlp()
    optimizer = KFAC(model, lr=torch.tensor(0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    backward(model, *batch())
    optimizer.step()
    scheduler.step()
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, *batch())
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_the_constructor_stays_small() -> None:
    import inspect

    parameters = inspect.signature(KFAC.__init__).parameters.values()
    assert sum(p.kind is p.KEYWORD_ONLY for p in parameters) <= 21


def test_a_model_without_supported_layers_trains_with_the_base_update() -> None:
    model = nn.LayerNorm(3)
    optimizer = KFAC(model)
    before = model.weight.detach().clone()
    F.cross_entropy(model(torch.randn(4, 3)), torch.randint(3, (4,))).backward()
    optimizer.step()
    assert not torch.equal(before, model.weight)
