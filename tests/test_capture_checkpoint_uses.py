"""Checkpoints around layers used several times, around whole models, and with all that may surround them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from recompute import DOUBLE, exact, half_square
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from kfac_fast import Preconditioner
from kfac_fast.passes import saves_are_packed

FISHERS = ["mc", "exact", "empirical"]
Run = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def plainly(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def again(function: Callable[[Tensor], Tensor], x: Tensor, **options) -> Tensor:
    return checkpoint(function, x, use_reentrant=False, **options)


class Loop(nn.Module):
    """A cell that is used at every step, as in a recurrent network or one that shares weights over depth.

    Args:
        inside: What a checkpoint is around: "the loop", "a step", "some steps", "both", "the cell alone".
        run: Runs a function in a checkpoint, or plainly.
    """

    def __init__(self, inside: str, run: Run = again) -> None:
        super().__init__()
        self.inside = inside
        self.run = run
        self.first = nn.Linear(3, 4)
        self.cell = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(4, 2)

    def step(self, h: Tensor) -> Tensor:
        cell = partial(self.run, self.cell) if self.inside == "the cell alone" else self.cell
        return h + self.norm(torch.tanh(cell(self.drop(h)) + self.cell(h.sin())))

    def loop(self, h: Tensor) -> Tensor:
        for i in range(3):
            inner = self.inside in ("a step", "both") or (self.inside == "some steps" and i % 2 == 0)
            h = self.run(self.step, h) if inner else self.step(h)
        return h

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.run(self.loop, h) if self.inside in ("the loop", "both") else self.loop(h))


def factors(
    model: nn.Module,
    call: Callable[[nn.Module, Tensor], Tensor],
    dtype: torch.dtype = DOUBLE,
    passes: int = 0,
    **options,
) -> list[Tensor]:
    """After two steps, of two micro-batches each, with so many passes of their own."""
    pre = exact(model, **options)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for _ in range(2):
        for size in (5, 3):
            half_square(call(model, torch.randn(size, 3, dtype=dtype, generator=generator))).backward()
        pre.steps = 1  # the inverses do not matter here
        pre.step()
        model.zero_grad()
    assert pre.capture.own_pass.count == passes
    pre.close()
    assert not saves_are_packed()
    states = [part.state(i) for part in pre.parts for i in range(len(part.layers))]
    return [tensor for state in states for tensors in state.values() for tensor in tensors]


def assert_same(found: list[Tensor], expected: list[Tensor], **tolerances: float) -> None:
    assert found
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, **{"rtol": 0, "atol": 1e-12, **tolerances})


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("inside", ["the loop", "a step", "some steps", "both", "the cell alone"])
def test_a_cell_that_is_used_at_every_step(inside: str, fisher: str, early_stop: bool) -> None:
    """Also with dropout, whose masks a checkpoint draws again."""
    model = Loop(inside).double()
    with set_checkpoint_early_stop(early_stop):
        found = factors(model, lambda net, x: net(x), fisher=fisher)
    model.run = plainly
    assert_same(found, factors(model, lambda net, x: net(x), fisher=fisher))


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("inside", ["nothing", "a step"])
def test_a_model_that_is_called_in_a_checkpoint_several_times(inside: str, fisher: str) -> None:
    model = Loop(inside).double()

    def twice(run: Run, net: nn.Module, x: Tensor) -> Tensor:
        return run(lambda z: net(z) - net(z.cos()), x) + run(net, x.sin())

    found = factors(model, partial(twice, again), fisher=fisher)
    model.run = plainly
    assert_same(found, factors(model, partial(twice, plainly), fisher=fisher))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("fisher", FISHERS)
def test_a_checkpoint_under_autocast(fisher: str, whole: bool) -> None:
    model = Loop("a step")

    def call(run: Run, net: nn.Module, x: Tensor) -> Tensor:
        x = x.bfloat16().float()  # in a checkpoint the batch itself is held, elsewhere what it was cast to
        with torch.autocast("cpu", torch.bfloat16):
            return (run(net, x) if whole else net(x)).float()

    found = factors(model, partial(call, again), torch.float32, fisher=fisher)
    model.run = plainly
    expected = factors(model, partial(call, plainly), torch.float32, fisher=fisher)
    assert_same(found, expected, rtol=1e-5, atol=1e-6)
    full = factors(model, lambda net, x: net(x), torch.float32, fisher=fisher)
    assert any(not torch.allclose(a, b, rtol=1e-4) for a, b in zip(found, full, strict=True))  # half precision shows


@contextlib.contextmanager
def packed_by_the_user() -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        yield


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("context", [torch.autograd.graph.save_on_cpu, packed_by_the_user])
def test_hooks_of_the_user_on_saved_tensors(context, fisher: str) -> None:
    model = Loop("nothing").double()

    def call(net: nn.Module, x: Tensor) -> Tensor:
        with context():
            return net(x)

    assert_same(factors(model, call, fisher=fisher), factors(model, lambda net, x: net(x), fisher=fisher))


@pytest.mark.parametrize("fisher", FISHERS)
def test_checkpoints_in_turn(fisher: str) -> None:
    class InTurn(nn.Sequential):
        run = True

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(self[:], 3, x, use_reentrant=False) if self.run else super().forward(x)

    model = InTurn(*(m for _ in range(4) for m in (nn.Linear(3, 3), nn.Tanh()))).double()
    found = factors(model, lambda net, x: net(x), fisher=fisher)
    model.run = False
    assert_same(found, factors(model, lambda net, x: net(x), fisher=fisher))


@pytest.mark.parametrize("fisher", FISHERS)
def test_selective_checkpoints_allow_one_backward_pass(fisher: str) -> None:
    def keep_products(context, op, *args, **kwargs) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE

    selective = partial(again, context_fn=partial(create_selective_checkpoint_contexts, keep_products))
    model = Loop("a step", selective).double().eval()
    if fisher == "exact":
        pre = exact(model)
        with pytest.raises(RuntimeError, match="fisher='mc' or 'empirical'"):
            half_square(model(torch.ones(5, 3, dtype=DOUBLE))).backward()
        pre.close()
        return
    found = factors(model, lambda net, x: net(x), passes=4 if fisher == "mc" else 0, fisher=fisher)
    model.run = plainly
    assert_same(found, factors(model, lambda net, x: net(x), fisher=fisher))


def test_two_optimizers_on_a_checkpointed_model() -> None:
    model = Loop("a step").double()
    alone = {fisher: factors(model, lambda net, x: net(x), fisher=fisher) for fisher in ("exact", "empirical")}
    other = exact(model, fisher="empirical")
    assert_same(factors(model, lambda net, x: net(x), fisher="exact"), alone["exact"])
    other.close()
    other = exact(model, fisher="exact")
    assert_same(factors(model, lambda net, x: net(x), fisher="empirical"), alone["empirical"])
    other.close()


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_layer_that_raises_inside_a_checkpoint_leaves_nothing_behind(fisher: str) -> None:
    model = Loop("a step").double()
    expected = factors(copy.deepcopy(model), lambda net, x: net(x), fisher=fisher)
    pre = exact(model, fisher=fisher)
    handle = model.norm.register_forward_pre_hook(lambda module, args: (args[0][:, :3],))
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.randn(5, 3, dtype=DOUBLE))
    assert not saves_are_packed()
    handle.remove()
    with pytest.raises(KeyboardInterrupt), torch.autograd.graph.saved_tensors_hooks(interrupt, lambda x: x):
        model(torch.randn(5, 3, dtype=DOUBLE))  # which no hook of a module sees
    pre.close()
    assert_same(factors(model, lambda net, x: net(x), fisher=fisher), expected)


def interrupt(x: Tensor) -> Tensor:
    raise KeyboardInterrupt


def test_a_backward_pass_to_some_parameters_only() -> None:
    """What the pass does not go through takes no part; the gradients that waited for it are gone."""
    model = Loop("the loop").double()
    x = torch.randn(5, 3, dtype=DOUBLE)
    pre = exact(model, fisher="empirical")
    torch.autograd.grad(half_square(model(x)), list(model.last.parameters()))
    pre.step()
    updates = {
        layer.name: bool(part.state(i)["updates"][0].any()) for part in pre.parts for i, layer in enumerate(part.layers)
    }
    assert updates == {"first": False, "cell": False, "norm": False, "last": True}


def test_a_compiled_model_with_checkpoints() -> None:
    torch._dynamo.reset()
    model = Loop("a step").double().eval()
    pre = exact(model)
    x = torch.randn(5, 3, dtype=DOUBLE)
    half_square(torch.compile(model, backend="aot_eager")(x)).backward()
    pre.steps = 1
    pre.step()
    found = pre.factors.running.data.clone()
    pre.close()
    plain: Preconditioner = exact(model)
    model.run = plainly
    half_square(model(x)).backward()
    plain.steps = 1
    plain.step()
    assert torch.allclose(found, plain.factors.running.data, rtol=0, atol=1e-12)
    torch._dynamo.reset()
