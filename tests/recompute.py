"""Factors recomputed in the most straightforward way, in float64, and small models for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_fast import Gaussian, Preconditioner

DOUBLE = torch.float64


def moments(rows: list[Tensor], terms: int | None = None, *, bias: bool = False) -> Tensor:
    """Σ r rᵀ over all rows, divided by their number or by the number of loss terms."""
    x = torch.cat([r.reshape(-1, r.shape[-1]) for r in rows])
    if bias:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return x.T @ x / (len(x) if terms is None else terms)


def exact(model: nn.Module, **options) -> Preconditioner:
    return Preconditioner(model, **{"fisher": "exact", "likelihood": "gaussian", **options})


def half_square(y: Tensor) -> Tensor:
    return Gaussian().loss(y, torch.zeros_like(y))


def plain_factors(model: nn.Module, x: Tensor) -> Tensor:
    pre = exact(model)
    half_square(model(x)).backward()
    pre.step()
    pre.close()
    model.zero_grad()
    return pre.factors.running.data.clone()


class Net(nn.Module):
    def __init__(self, activation: nn.Module, *, checkpointed: str | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.activation = activation
        self.last = nn.Linear(4, 2)
        self.checkpointed = checkpointed

    def body(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.checkpointed == "reentrant")


def by_hand(net: Net, batches: list[Tensor], root: Callable[[Tensor], list[Tensor]] | None = None) -> list[Tensor]:
    """A and then G of both layers of a `Net` from all these batches together, without a hook.

    Args:
        net: With any differentiable activation.
        batches: Inputs.
        root: From the outputs to the gradients that are sent back; by default those of the exact Gaussian Fisher.
    """
    inputs: list[list[Tensor]] = [[], []]
    gradients: list[list[Tensor]] = [[], []]
    terms = 0
    for x in batches:
        before = nn.functional.linear(x, net.first.weight, net.first.bias)
        hidden = net.activation(before * 1)
        y = nn.functional.linear(hidden, net.last.weight, net.last.bias)
        inputs[0].append(x)
        inputs[1].append(hidden.detach())
        terms += len(x)
        for sent in (
            root(y.detach()) if root is not None else torch.eye(2, dtype=y.dtype).unsqueeze(1).expand(2, len(x), 2)
        ):
            for rows, gradient in zip(
                gradients, torch.autograd.grad(y, [before, y], sent, retain_graph=True), strict=True
            ):
                rows.append(gradient)
    return [moments(rows, bias=True) for rows in inputs] + [moments(rows, terms) for rows in gradients]


def same(pre: Preconditioner, expected: list[Tensor]) -> bool:
    found = list(pre.factors.running)
    return len(found) == len(expected) and all(
        torch.allclose(a, b, atol=1e-13) for a, b in zip(found, expected, strict=True)
    )


def assert_unnoticed(**options: Any) -> None:
    """Statistics that come from another pass leave buffers, gradients and random numbers as they would have been."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    twin = copy.deepcopy(model)
    pre = Preconditioner(model, likelihood="gaussian", **options)
    x = torch.randn(8, 3)
    for net in (model, twin):
        torch.manual_seed(5)
        half_square(net(x)).backward()
        net.noise = torch.rand(3)
    assert torch.equal(model.noise, twin.noise)
    assert all(torch.equal(b, c) for b, c in zip(model.buffers(), twin.buffers(), strict=True))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    pre.step()
    assert int(pre.factors.updates[0]) == 1
