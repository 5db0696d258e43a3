"""A small model and the loop that trains it, for tests of what surrounds a step."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fast import Preconditioner

DOUBLE = torch.float64


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def backward(model: nn.Module, step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator).to(next(model.parameters()).dtype)
    y = torch.randint(3, (16,), generator=generator)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one, two, strict=True))


def natural_gradient(pre: Preconditioner, layer: int, damping: float, weight: Tensor, bias: Tensor) -> Tensor:
    """G⁻¹ V A⁻¹ of a linear layer, solved from the running factors."""
    a, g = pre.factors.running[layer], pre.factors.running[pre.factors.count + layer]
    pi = math.sqrt(float(a.trace() / len(a)) / float(g.trace() / len(g)))
    gamma = math.sqrt(damping)
    v = torch.cat([weight, bias[:, None]], 1)
    left = torch.linalg.solve(g + gamma / pi * torch.eye(len(g), dtype=g.dtype), v)
    return torch.linalg.solve(a + pi * gamma * torch.eye(len(a), dtype=a.dtype), left.T).T
