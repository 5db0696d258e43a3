"""Compiled models: a graph shows nothing inside, so the statistics come from an eager pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from recompute import DOUBLE, Net, by_hand, exact, half_square, same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from kfac_fast import KFACWarning


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def wrapped(model: nn.Module, **options) -> Callable[..., Tensor]:
    return torch.compile(model, **options)


def in_place(model: nn.Module, **options) -> Callable[..., Tensor]:
    model.compile(**options)
    return model


def inside_a_function(model: nn.Module, **options) -> Callable[..., Tensor]:
    return torch.compile(lambda x: model(x), **options)


@pytest.mark.parametrize("compiler", [wrapped, in_place, inside_a_function])
@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_compiled_model(compiler, compiled_first: bool) -> None:
    model, x = Net(nn.Tanh()).double(), torch.randn(6, 3, dtype=DOUBLE)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compiler(model, backend=counter) if compiled_first else None
    pre = exact(model)
    compiled = compiler(model, backend=counter) if compiled is None else compiled
    for _ in range(3):
        model.zero_grad()
        half_square(compiled(x)).backward()
        pre.step()
        assert same(pre, by_hand(model, [x]))
    assert counter.frame_count == 1  # the hooks cut nothing
    assert counter.op_count == 3


@pytest.mark.parametrize("used_before", [False, True])
def test_made_from_the_compiled_model_it_may_be_one_graph(used_before: bool) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(6, 3, dtype=DOUBLE)
    net = Net(nn.Tanh()).double()
    net.first, net.last = model[0], model[2]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    if used_before:
        compiled(x)
    pre = exact(compiled)
    assert [row.name for row in pre.report()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    half_square(compiled(x)).backward()
    pre.step()
    assert same(pre, by_hand(net, [x]))
    assert counter.frame_count == 1
    half_square(model(x)).backward()  # the module itself is looked at too
    pre.step()
    assert int(pre.factors.updates[0]) == 2


def test_empirical_of_a_compiled_model() -> None:
    model, x = Net(nn.Tanh()).double(), torch.randn(6, 3, dtype=DOUBLE)
    pre = exact(model, fisher="empirical")
    half_square(torch.compile(model, backend="aot_eager")(x)).backward()
    pre.step()
    assert same(pre, by_hand(model, [x], root=lambda y: [y]))


def test_a_fraction_of_a_compiled_model() -> None:
    model, x = Net(nn.Tanh()).double(), torch.randn(6, 3, dtype=DOUBLE)
    pre = exact(model, factor_fraction=0.5)
    half_square(torch.compile(model, backend="aot_eager")(x)).backward()
    pre.step()
    assert same(pre, by_hand(model, [x[::2]]))


class Nested(Net):
    """Its body is a module of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Tanh())
        self.inner = nn.Sequential(self.first, self.activation)

    def body(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


@pytest.mark.parametrize("later", [False, True])
def test_a_compiled_part(later: bool) -> None:
    model, x = Nested().double(), torch.randn(6, 3, dtype=DOUBLE)
    if not later:
        model.inner.compile(backend="aot_eager")
    pre = exact(model, inverse_every=1)
    half_square(model(x)).backward()
    pre.step()
    assert same(pre, by_hand(model, [x]))
    if later:
        model.inner.compile(backend="eager")
        model.zero_grad()
        pre.step()  # looks for changes of the model
        before = pre.factors.updates.clone()
        half_square(model(x)).backward()
        pre.step()
        assert torch.equal(pre.factors.updates, before + 1)


def test_a_graph_without_any_hook_is_reported() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 3)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    pre = exact(model)
    half_square(compiled(x)).backward()
    with pytest.warns(KFACWarning, match=r"no curvature statistics.*: 0, 2\..*from the compiled model"):
        pre.step()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_graphs_of_other_kinds_are_refused() -> None:
    model, x = Net(nn.Tanh()), torch.randn(6, 3)
    with pytest.raises(ValueError, match="TorchScript"):
        exact(torch.jit.trace(model, x))
    exported = torch.export.export(model, (x,))
    with pytest.raises(TypeError, match="ExportedProgram; use the module that was exported"):
        exact(exported)
    with pytest.raises(ValueError, match="exported graph"):
        exact(exported.module())
    traced = torch.fx.symbolic_trace(model)  # its modules are called: it is a model like any other
    pre = exact(traced)
    half_square(traced(x)).backward()
    pre.step()
    assert bool(pre.factors.updates.all())
