"""What code written for any optimizer of torch.optim does with this one; docs/integrations.md names each promise."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import DOUBLE, backward, equal, mlp, natural_gradient, train
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_fast import KFAC, Adaptive, KFACWarning, Preconditioner

# ---- parameter groups ------------------------------------------------------------------------------------------------


def test_each_group_has_its_own_lr_damping_weight_decay_and_kl_clip() -> None:
    model = mlp(DOUBLE)
    kappa = 1e-3
    groups = [
        {"params": model[0].parameters(), "lr": 0.7, "damping": 0.02, "weight_decay": 0.1, "kl_clip": kappa},
        {"params": model[2].parameters(), "lr": 0.3, "damping": 0.5, "kl_clip": None},
    ]
    optimizer = KFAC(model, groups, momentum=0.0)
    backward(model)
    before = [p.detach().clone() for p in model.parameters()]
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    first = natural_gradient(optimizer.preconditioner, 0, 0.02, *gradients[:2])
    second = natural_gradient(optimizer.preconditioner, 1, 0.5, *gradients[2:])
    form = 0.7**2 * float((torch.cat([gradients[0], gradients[1][:, None]], 1) * first).sum())
    assert form > kappa
    first *= math.sqrt(kappa / form)  # only the first group clips, and only it counts
    expected = [before[0] * (1 - 0.07) - 0.7 * first[:, :-1], before[1] * (1 - 0.07) - 0.7 * first[:, -1]]
    expected += [before[2] - 0.3 * second[:, :-1], before[3] - 0.3 * second[:, -1]]
    for p, q in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p, q, atol=1e-12)


def test_named_parameters() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    named, plain = KFAC(model, model.named_parameters()), KFAC(twin, twin.parameters())
    assert named.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert "param_names" not in plain.param_groups[0]
    assert equal(train(model, named, range(3)), train(twin, plain, range(3)))
    assert named.state_dict()["param_groups"][0]["param_names"] == named.param_groups[0]["param_names"]
    plain.load_state_dict(named.state_dict())
    assert "param_names" not in plain.param_groups[0]
    groups = [{"params": model[0].named_parameters(prefix="0")}, {"params": model[2].named_parameters(prefix="2")}]
    assert [g["param_names"] for g in KFAC(model, groups).param_groups] == [
        ["0.weight", "0.bias"],
        ["2.weight", "2.bias"],
    ]


def test_a_layer_that_is_unfrozen_later_joins_with_its_group() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = KFAC(model, lr=0.05)
    train(model, optimizer, range(4))
    assert [row.name for row in optimizer.report() if row.covered] == ["2.weight", "2.bias"]
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})
    assert all(row.covered for row in optimizer.report())
    state = optimizer.state_dict()["state"]
    for key in ("a_factor", "g_factor", "a_inverse", "g_inverse", "updates", "momentum_buffer"):
        assert torch.equal(state[0][key], kept[0][key]), key
    assert optimizer.preconditioner.steps == 4
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.01]
    before = model[0].weight.detach().clone()
    train(model, optimizer, range(4, 6))
    assert not torch.equal(before, model[0].weight)
    assert optimizer.state_dict()["state"][2]["updates"].tolist() == [[2.0], [2.0]]
    assert optimizer.state_dict()["state"][0]["updates"].tolist() == [[6.0], [6.0]]


def test_a_parameter_outside_the_model_takes_the_base_update_and_is_reported() -> None:
    model = mlp()
    temperature = nn.Parameter(torch.tensor([2.0]))
    optimizer = KFAC(model, lr=0.1, momentum=0.0)
    optimizer.add_param_group({"params": [temperature]})
    row = list(optimizer.report())[-1]
    assert (row.name, row.covered, row.reason) == ("param_groups.1.0", False, "it is not a parameter of the model")
    backward(model)
    temperature.grad = torch.tensor([3.0])
    optimizer.step()
    assert float(temperature.detach()) == pytest.approx(2.0 - 0.1 * 3.0)
    with pytest.raises(ValueError, match="adaptive needs all parameters to be the model's"):
        KFAC(model, [*model.parameters(), temperature], adaptive=True)


def test_a_group_that_is_refused_leaves_everything_as_it_was() -> None:
    model = mlp()
    optimizer = KFAC(model, list(model[0].parameters()))
    for group, message in (
        ({"params": model[2].parameters(), "damping": -1.0}, "damping must be a number > 0"),
        ({"params": model[0].parameters()}, "some parameters appear in more than one"),
        ({"params": [torch.zeros(2) * model[0].weight[0, 0]]}, "non-leaf"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, range(2))
    adaptive = KFAC(model, list(model[0].parameters()), adaptive=True, weight_decay=0.1)
    with pytest.raises(ValueError, match="one weight_decay"):
        adaptive.add_param_group({"params": model[2].parameters(), "weight_decay": 0.0})
    assert len(adaptive.param_groups) == 1


def test_a_group_joins_an_adaptive_run() -> None:
    model = mlp()
    optimizer = KFAC(model, list(model[0].parameters()), adaptive=Adaptive(t1=1), damping=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model)

    for _ in range(3):
        optimizer.step(closure)
    last, damping = optimizer.rule.last.data.clone(), optimizer.rule.damping
    optimizer.add_param_group({"params": model[2].parameters()})
    assert torch.equal(optimizer.rule.last.data[: len(last)], last)
    assert not optimizer.rule.last.data[len(last) :].any()
    assert optimizer.rule.damping == damping
    before = float(backward(model).detach())
    for _ in range(3):
        optimizer.step(closure)
    assert float(backward(model).detach()) < before


# ---- hooks, gradients, closures --------------------------------------------------------------------------------------


def test_step_hooks() -> None:
    model = mlp()
    optimizer = KFAC(model)
    seen: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
        register_optimizer_step_pre_hook(lambda *_: seen.append("global before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global after")),
    ]
    try:
        backward(model)
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(seen[:2]) == ["before", "global before"]
    assert sorted(seen[2:]) == ["after", "global after"]


def test_state_hooks_see_and_may_replace_the_whole_state() -> None:
    model = mlp()
    optimizer = KFAC(model)
    train(model, optimizer, range(2))
    seen: list[Any] = []
    handles = [
        optimizer.register_state_dict_pre_hook(lambda o: seen.append(o)),
        optimizer.register_state_dict_post_hook(lambda o, s: {**s, "note": sorted(s["state"][0])}),
    ]
    state = optimizer.state_dict()
    for handle in handles:
        handle.remove()
    assert seen == [optimizer]
    assert {"a_factor", "g_inverse", "momentum_buffer", "run/step", "step"} <= set(state["note"])
    other = KFAC(mlp())
    other.register_load_state_dict_pre_hook(lambda o, s: {k: v for k, v in s.items() if k != "note"} | {"seen": 1})
    other.register_load_state_dict_post_hook(seen.append)
    other.load_state_dict(state)
    assert seen == [optimizer, other]
    assert "note" in state
    assert other.preconditioner.steps == 2


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_takes_the_statistics_with_it(set_to_none: bool) -> None:
    """Gradients that are thrown away bring nothing: the next step is as if their pass had not been."""
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, other = KFAC(model), KFAC(twin)
    backward(model, 7)
    optimizer.zero_grad(set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in model.parameters())
    sampler = optimizer.preconditioner.generator(torch.device("cpu"))
    sampler.set_state(other.preconditioner.generator(torch.device("cpu")).get_state())
    for m, o in ((model, optimizer), (twin, other)):
        backward(m, 0)
        o.step()
    assert equal(list(model.parameters()), list(twin.parameters()))
    assert torch.equal(optimizer.preconditioner.factors.running.data, other.preconditioner.factors.running.data)


def test_gradients_cleared_by_the_model_take_the_statistics_with_them_too() -> None:
    """As the Trainer of transformers does, and with a Preconditioner beside another optimizer."""
    model = mlp(DOUBLE)
    pre = Preconditioner(model, fisher="exact")
    backward(model, 7)
    model.zero_grad()
    backward(model, 0)
    pre.step()
    alone = Preconditioner(twin := mlp(DOUBLE), fisher="exact")
    backward(twin, 0)
    alone.step()
    assert torch.equal(pre.factors.running.data, alone.factors.running.data)


def test_two_models_outputs_in_one_backward_pass_count_together() -> None:
    """No gradient is there yet when the second output is reached, and still the first one's statistics stay."""
    model = mlp(DOUBLE)
    pre = Preconditioner(model, fisher="exact")
    x = torch.randn(12, 6, dtype=DOUBLE)
    y = torch.randint(3, (12,))
    (
        F.cross_entropy(model(x[:4]), y[:4], reduction="sum") + F.cross_entropy(model(x[4:]), y[4:], reduction="sum")
    ).backward()
    pre.step()
    whole = Preconditioner(twin := mlp(DOUBLE), fisher="exact")
    F.cross_entropy(twin(x), y).backward()
    whole.step()
    assert torch.allclose(pre.factors.running.data, whole.factors.running.data, atol=1e-13)


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    class Tags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 6, sparse=True)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x))

    model = Tags()
    optimizer = KFAC(model)
    before = copy.deepcopy(model.state_dict())
    F.cross_entropy(model(torch.tensor([1, 2, 2])), torch.tensor([0, 1, 2])).backward()
    with pytest.raises(ValueError, match=r"sparse gradients, got one for table.weight of shape \(5, 6\).*sparse=False"):
        optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert optimizer.preconditioner.steps == 0


# ---- compilation and speed -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of torch's own, while it traces
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_is_the_step(backend: str) -> None:
    """The kernels are opaque to the compiler, so it leaves the whole step as it is."""
    torch._dynamo.reset()
    model, twin = mlp(), mlp()
    optimizer, plain = KFAC(model), KFAC(twin)
    step = torch.compile(optimizer.step, backend=backend)
    for i in range(3):
        optimizer.zero_grad()
        backward(model, i)
        step()
    assert equal(list(model.parameters()), train(twin, plain, range(3)))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_training_step_is_the_training_step() -> None:
    """Everything in one compiled function: clearing, forward, backward, step."""

    def train_step(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    torch._dynamo.reset()
    model, twin = mlp(DOUBLE), mlp(DOUBLE)
    optimizer, plain = KFAC(model, fisher="exact"), KFAC(twin, fisher="exact")
    compiled = torch.compile(train_step, backend="eager")
    for _ in range(3):
        x, y = torch.randn(16, 6, dtype=DOUBLE), torch.randint(3, (16,))
        assert torch.allclose(compiled(model, optimizer, x, y), train_step(twin, plain, x, y), atol=1e-12)
    assert optimizer.stats() == plain.stats()


def test_a_model_that_was_moved_is_refused() -> None:
    model = mlp()
    optimizer = KFAC(model)
    train(model, optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict()["state"][0])
    model.double()
    optimizer.zero_grad()
    backward(model)
    with pytest.raises(
        ValueError, match=r"the model is torch.float64 on cpu, its curvature torch.float32.*after model.to"
    ):
        optimizer.step()
    assert all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(before[k]))
        for k, v in optimizer.state_dict()["state"][0].items()
        if k.endswith("_factor")
    )
    with pytest.raises(ValueError, match="parameters with data, got some on the device meta"):
        KFAC(mlp().to("meta"))


# All layers go through grouped kernels and torch's foreach functions; a step that is not clipped saves a pass.
@pytest.mark.parametrize("kl_clip", [1e-9, 1e3])
def test_a_step_makes_as_many_calls_for_thirty_layers_as_for_three(kl_clip: float) -> None:
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for depth in (3, 30):
        model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(depth)], nn.Linear(6, 3))
        optimizer = KFAC(model, inverse_every=2, kl_clip=kl_clip)
        train(model, optimizer, range(4))
        optimizer.zero_grad()
        backward(model, 4)
        with Count() as count:
            optimizer.step()
        counts.append(count.calls)
    assert counts[0] == counts[1]


# ---- beside other optimizers -----------------------------------------------------------------------------------------

OTHERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "Muon": lambda params: torch.optim.Muon([p for p in params if p.ndim == 2], lr=0.01),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_preconditioner_feeds_another_optimizer(name: str) -> None:
    """It gets G⁻¹ V A⁻¹ as the gradient, nothing else changes for it."""
    if not hasattr(torch.optim, name):
        pytest.skip(f"torch {torch.__version__} has no {name}")
    model = mlp(DOUBLE)
    shadow = [p.detach().clone().requires_grad_() for p in model.parameters()]
    pre = Preconditioner(model, damping=0.05, inverse_every=1)
    optimizer, other = OTHERS[name](list(model.parameters())), OTHERS[name](shadow)
    for step in range(3):
        model.zero_grad()
        backward(model, step)
        gradients = [p.grad.clone() for p in model.parameters()]
        pre.step()
        optimizer.step()
        for i in range(2):
            u = natural_gradient(pre, i, 0.05, gradients[2 * i], gradients[2 * i + 1])
            shadow[2 * i].grad, shadow[2 * i + 1].grad = u[:, :-1].contiguous(), u[:, -1].contiguous()
        other.step()
    for p, q in zip(model.parameters(), shadow, strict=True):
        assert torch.allclose(p, q, atol=1e-6 if name == "Muon" else 1e-11)  # Muon computes in bfloat16


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_stats_are_plain_numbers_that_count() -> None:
    model = mlp()
    optimizer = KFAC(model, inverse_every=2)
    assert optimizer.stats() == {
        "step": 0, "inversions": 0, "refused_statistics": 0, "failures": 0, "skipped_steps": 0,
    }  # fmt: skip
    train(model, optimizer, range(4))
    assert optimizer.stats()["step"] == 4
    assert optimizer.stats()["inversions"] == 3  # steps 0, 1, 2
    optimizer.preconditioner.factors.running[1].sub_(5000 * torch.eye(9))  # A of the second layer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KFACWarning)
        train(model, optimizer, range(4, 5))
    assert optimizer.stats()["failures"] == 1
    assert optimizer.stats()["failures/2"] == 1
    assert all(type(value) is float for value in optimizer.stats().values())


def test_a_loss_that_is_not_finite_commits_nothing_though_the_outputs_are() -> None:
    model = mlp()
    optimizer = KFAC(model)
    train(model, optimizer, range(2))
    factors = optimizer.preconditioner.factors.running.data.clone()
    (F.cross_entropy(model(torch.randn(8, 6)), torch.arange(8) % 3) * math.inf).backward()
    with pytest.warns(KFACWarning, match="gradient of 0.weight is not finite"):
        optimizer.step()
    assert torch.equal(optimizer.preconditioner.factors.running.data, factors)
    assert optimizer.stats()["refused_statistics"] == 1
