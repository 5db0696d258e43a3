"""Memory that statistics need beside what autograd keeps anyway."""

from __future__ import annotations

from collections.abc import Callable

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


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            x = checkpoint(part, x, use_reentrant=False)
        return x


def checkpointed(parts: int = 8) -> Checkpointed:
    """`deep` in parts of which autograd keeps the inputs alone."""
    layers = list(deep())
    size = len(layers) // parts
    return Checkpointed(*(nn.Sequential(*layers[i : i + size]) for i in range(0, len(layers), size)))


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
        half_square(model(x)).backward()

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


@pytest.mark.parametrize("own_pass", [False, True])
def test_inputs_inside_a_checkpoint_are_not_kept(own_pass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearLayer, "needs_own_pass", own_pass)
    plain, extra = extra_bytes(checkpointed(), torch.randn(BATCH, WIDTH))
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
