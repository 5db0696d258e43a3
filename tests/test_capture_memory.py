"""Memory that statistics need beside what autograd keeps anyway."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from recompute import half_square
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from kfac_fast import Preconditioner, factors, sender
from kfac_fast.layers.linear import LinearLayer

DEPTH, WIDTH, BATCH = 24, 32, 2048
ACTIVATION = 4 * WIDTH * BATCH  # bytes: 256 KiB
BUDGET = 4 * ACTIVATION


def peak(function: Callable[[], object]) -> int:
    """The most bytes of CPU tensors, beyond those before, that are alive at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def deep() -> nn.Sequential:
    return nn.Sequential(*[m for _ in range(DEPTH) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())])


def again(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=False)


class Checkpointed(nn.Module):
    """`deep`, or one of its layers at every depth, of which autograd keeps a few activations.

    Args:
        how: "parts", "nested" (in halves of halves), "whole" (called inside a checkpoint), "shared" (one layer, a checkpoint
            for every use), "autocast" (parts of them, in half precision).
        parts: Checkpoints beside each other, where there are several.
    """

    def __init__(self, how: str, parts: int = 6) -> None:
        super().__init__()
        self.how = how
        self.layers = deep()
        self.parts = parts
        if how == "shared":
            self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def run(self, start: int, stop: int, x: Tensor) -> Tensor:
        return self.layers[start:stop](x)

    def halves(self, start: int, stop: int, x: Tensor) -> Tensor:
        if stop - start <= 4:
            return self.run(start, stop, x)
        middle = (start + stop) // 2
        x = again(partial(self.halves, start, middle), x)
        return again(partial(self.halves, middle, stop), x)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "whole":
            return self.layers(x)
        if self.how == "nested":
            return self.halves(0, 2 * DEPTH, x)
        if self.how == "shared":
            for _ in range(DEPTH):
                x = again(self.layers, x)
            return x
        size = 2 * DEPTH // self.parts
        with torch.autocast("cpu", torch.bfloat16, enabled=self.how == "autocast"):
            for start in range(0, 2 * DEPTH, size):
                x = again(partial(self.run, start, start + size), x)
        return x.float()


class Mixed(nn.Sequential):
    """Under autocast, with layers that get float32: autograd keeps what they cast it to."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            for layer in self:
                x = layer(x).float()
        return x


@pytest.fixture(autouse=True)
def _small_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "QUEUE_BYTES", BUDGET)
    monkeypatch.setattr(sender, "ELEMENTS_AT_ONCE", BUDGET // 4)


def extra_bytes(model: nn.Module, x: Tensor, **options) -> tuple[int, int]:
    """What a forward and backward pass needs at its peak, and how much more with statistics."""

    def run() -> None:
        y = again(model, x) if getattr(model, "how", "") == "whole" else model(x)
        half_square(y).backward()

    run()  # gradients are there from now on
    plain = peak(run)
    pre = Preconditioner(model, likelihood="gaussian", **options)
    for _ in range(2):  # what is found out in the first pass is known in the second
        run()
        pre.step()
    return plain, peak(run) - plain


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_deep_network_needs_the_budget_and_no_more(fisher: str) -> None:
    plain, extra = extra_bytes(deep(), torch.randn(BATCH, WIDTH), fisher=fisher)
    assert plain > DEPTH * ACTIVATION
    assert extra < BUDGET + 4 * ACTIVATION


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("how", ["parts", "nested", "whole", "shared", "autocast"])
def test_inputs_inside_checkpoints_are_not_kept(how: str, fisher: str) -> None:
    _, extra = extra_bytes(Checkpointed(how), torch.randn(BATCH, WIDTH), fisher=fisher)
    assert extra < BUDGET + 4 * ACTIVATION


def test_a_pass_of_its_own_does_not_keep_them_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearLayer, "needs_own_pass", True)
    plain, extra = extra_bytes(Checkpointed("parts"), torch.randn(BATCH, WIDTH))
    assert plain < 0.7 * DEPTH * ACTIVATION
    assert extra < BUDGET + 4 * ACTIVATION


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_inputs_under_autocast_are_kept_as_autograd_keeps_them(fisher: str) -> None:
    plain, extra = extra_bytes(Mixed(*deep()), torch.randn(BATCH, WIDTH), fisher=fisher)
    assert plain > DEPTH * ACTIVATION
    assert extra < BUDGET + 4 * ACTIVATION


def test_a_pass_of_its_own_comes_after_the_users_activations_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearLayer, "needs_own_pass", True)
    plain, extra = extra_bytes(deep(), torch.randn(BATCH, WIDTH))
    assert plain > DEPTH * ACTIVATION
    assert extra < BUDGET + 4 * ACTIVATION


def test_nothing_is_kept_between_backward_and_step() -> None:
    model, x = deep(), torch.randn(BATCH, WIDTH)
    pre = Preconditioner(model, likelihood="gaussian")
    losses: list[Tensor] = []

    def run() -> None:
        losses.append(half_square(model(x)))
        losses[-1].backward()

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    kept = sum(e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    assert kept < BUDGET + 2 * ACTIVATION  # rows that wait for the next call
    pre.close()
