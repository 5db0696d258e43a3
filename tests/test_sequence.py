"""What the user's forward pass computed stands in for a pass of its own, and only where it is the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from recompute import DOUBLE, exact, half_square
from torch import Tensor, nn

from kfac_fast import KFAC, Adaptive, Blocks, Gaussian
from kfac_fast.passes import ModelInputs
from kfac_fast.sequence import Kept, Values, modules_in_order

SERVED: dict[str, Callable[[], nn.Module]] = {
    "sigmoids": lambda: nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
    "others": lambda: nn.Sequential(
        nn.Linear(6, 5, bias=False), nn.GELU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)
    ),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.Softplus()), nn.Identity(), nn.Linear(5, 3)),
    "positions": lambda: nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 2), nn.Flatten(), nn.Linear(8, 3)),
    "two in a row": lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3), nn.Sigmoid()),
}
CONVOLUTION = {"convolution": lambda: nn.Sequential(nn.Conv1d(4, 2, 3), nn.ELU(), nn.Flatten(), nn.Linear(8, 3))}


def batch(name: str) -> Tensor:
    shape = (16, 4, 6) if name in ("positions", "convolution") else (16, 6)
    return torch.randn(*shape, dtype=DOUBLE)


def calls_of(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of a linear layer's forward; hooks of ours do not count."""
    seen: list[int] = []
    original = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        seen.append(len(x))
        return original(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    return seen


@pytest.mark.parametrize("fisher", ["mc", "exact"])
@pytest.mark.parametrize("name", SERVED)
def test_statistics_of_a_fraction(name: str, fisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same examples with the same targets as those of a pass of its own, without one."""
    model, x = SERVED[name]().double(), batch(name)
    found, passes = [], []
    for served in (True, False):
        if not served:
            monkeypatch.setattr(Kept, "of", lambda model, inputs: None)
        pre = exact(model, fisher=fisher, factor_fraction=1 / 4)
        calls = calls_of(model, monkeypatch)
        for _ in range(2):
            model.zero_grad()
            half_square(model(x)).backward()
            pre.step()
        passes.append(calls.count(4))
        found.append(pre.factors.running.data.clone())
        pre.close()
    assert torch.allclose(found[0], found[1], rtol=1e-10, atol=1e-14)
    assert found[0].abs().sum() > 0
    needs_inputs = name in ("others", "nested", "positions")  # whose derivative does not follow from the output
    assert passes[0] < passes[1] if needs_inputs else passes[0] == 0


@pytest.mark.parametrize("name", [*SERVED, *CONVOLUTION])
def test_adaptive_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and statistics: the parameters are where they would be with passes of their own."""
    ends = []
    for served in (True, False):
        if not served:
            monkeypatch.setattr(Kept, "of", lambda model, inputs: None)
        torch.manual_seed(0)
        model, x = (SERVED | CONVOLUTION)[name]().double(), batch(name)
        options = {"factor_fraction": 1.0 if name == "convolution" else 0.5, "damping": 1.0, "weight_decay": 1e-3}
        monkeypatch.setattr("kfac_fast.adaptive.LEAST_EXAMPLES", 1)
        kfac = KFAC(model, likelihood="gaussian", adaptive=Adaptive(), fisher="exact", **options)
        calls = calls_of(model, monkeypatch)

        def closure(kfac: KFAC = kfac, model: nn.Module = model, x: Tensor = x) -> Tensor:
            kfac.zero_grad()
            loss = half_square(model(x) - 1)
            loss.backward()
            return loss

        for _ in range(4):  # before λ is adjusted, which runs the model
            kfac.step(closure)
        assert not served or name != "sigmoids" or set(calls) == {16}
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*ends, rtol=1e-9)


def test_a_layer_that_has_no_block_is_passed_through() -> None:
    model, x = SERVED["sigmoids"]().double(), batch("sigmoids")
    found = []
    for left_out in ([], ["2"]):
        pre = exact(model, factor_fraction=0.5, blocks=Blocks(exclude=left_out))
        model.zero_grad()
        half_square(model(x)).backward()
        pre.step()
        blocks = dict(zip([layer.name for layer in pre.layers], range(len(pre.layers)), strict=True))
        found.append([pre.factors.running[i].clone() for i in (blocks["0"], len(blocks) + blocks["0"])])
        pre.close()
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(*found, strict=True))


def inputs_of(*args: Tensor, **kwargs: Tensor) -> ModelInputs:
    return ModelInputs(args, kwargs, 16)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)),
        nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.Linear(6, 3)),
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
        nn.Sequential(nn.Flatten(0), nn.Linear(6, 3)),
        nn.Sequential(*[nn.Linear(6, 6)] * 2),
        nn.Linear(6, 3),
    ],
    ids=["batch norm", "dropout", "in place", "flattens the batch", "one module twice", "no sequence"],
)
def test_models_that_are_run_again(model: nn.Module) -> None:
    assert Kept.of(model, inputs_of(torch.ones(16, 6))) is None


def test_what_a_user_hook_may_alter_is_run_again() -> None:
    model = SERVED["sigmoids"]()
    x = torch.ones(16, 6)
    assert Kept.of(model, inputs_of(x)) is not None
    assert Kept.of(model, inputs_of(input=x)) is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert Kept.of(model, inputs_of(x)) is None
    model[2].register_forward_hook(lambda module, args, output: 2 * output)
    assert Kept.of(model, inputs_of(x)) is None


def test_values_that_were_changed_in_place_do_not_serve() -> None:
    model = SERVED["sigmoids"]()
    x, y = torch.randn(16, 6), torch.randn(16, 5)
    kept = Kept.of(model, inputs_of(x))
    assert kept is not None
    assert kept.rows(slice(None), 16) is None  # nothing was noted
    kept.note(model[0], x)
    kept.note(model[2], y)
    kept.note(nn.Linear(6, 5), y)  # not of the sequence
    values = kept.rows(slice(1, None, 4), 16)
    assert values is not None
    assert torch.equal(values[2], y[1::4])
    assert torch.equal(values.outputs, model[2:](y[1::4]))
    assert kept.rows(slice(None), 15) is None
    y.mul_(2)
    assert kept.rows(slice(None), 16) is None


def test_a_module_may_be_there_twice() -> None:
    layer = nn.Linear(6, 6)
    assert modules_in_order(nn.Sequential(layer, nn.Sequential(layer, layer))) == [layer] * 3


def test_gradients_are_pulled_back_as_autograd_does() -> None:
    model, x = SERVED["others"]().double(), batch("others")
    modules = modules_in_order(model)
    assert modules is not None
    gradient = torch.randn(16, 3, dtype=DOUBLE)
    activations = [x]
    for module in modules:
        activations.append(module(activations[-1]))
    expected = torch.autograd.grad(activations[-1], activations[1:], gradient)
    with torch.no_grad():
        found = dict(Values(modules, {0: x}).pull_back(gradient, 0))
    assert all(torch.allclose(found[i], expected[i]) for i in range(len(modules)))


def test_nothing_is_kept_after_the_step() -> None:
    model = SERVED["sigmoids"]().double()
    kfac = KFAC(model, likelihood=Gaussian(), adaptive=True)
    x = batch("sigmoids")
    noted: list[weakref.ref[Tensor]] = []
    losses: list[Tensor] = []
    model[2].register_forward_pre_hook(Observer(noted))

    def closure() -> Tensor:
        kfac.zero_grad()
        losses.append(half_square(model(x)))
        losses[-1].backward()
        return losses[-1]

    kfac.step(closure, lambda: half_square(model(x)))
    gc.collect()
    assert noted
    assert all(reference() is None for reference in noted[:1])


class Observer:
    """Notes which tensors a module is called with, and alters nothing."""

    observes_only = True

    def __init__(self, noted: list[weakref.ref[Tensor]]) -> None:
        self.noted = noted

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.noted.append(weakref.ref(args[0].untyped_storage()))


def test_the_backward_pass_frees_what_was_kept() -> None:
    model, x = SERVED["sigmoids"]().double(), batch("sigmoids")
    pre = exact(model, factor_fraction=0.5)
    noted: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    model[2].register_forward_pre_hook(Observer(noted))
    model[0].weight.register_hook(lambda gradient: alive.append(noted[0]() is not None))
    half_square(model(x)).backward()
    assert alive == [False]
    pre.step()
    assert pre.factors.running.data.abs().sum() > 0


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_compiled_sequence_is_run_again(adaptive: bool) -> None:
    """Its modules show nothing."""
    torch.manual_seed(0)
    model, x = SERVED["sigmoids"]().double(), batch("sigmoids")
    found = []
    for called in (model, torch.compile(model, backend="aot_eager")):
        pre = exact(called, factor_fraction=0.5)
        pre.capture.keep_batches = adaptive
        model.zero_grad()
        half_square(called(x)).backward()
        pre.step()
        found.append(pre.factors.running.data.clone())
        pre.close()
    assert torch.allclose(*found, rtol=1e-10, atol=1e-14)
    assert found[0].abs().sum() > 0
