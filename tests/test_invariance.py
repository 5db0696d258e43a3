"""K-FAC does not see how a network is parametrised: affine maps of inputs, activations and pre-activations (sec. 10)."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from kfac_fast import KFAC, Gaussian

DOUBLE = torch.float64


class Fixed(nn.Module):
    """x ↦ M x + s, not trained; ``matrix`` is [M | s; 0 | 1]."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix[:-1, :-1].T + self.matrix[:-1, -1]


def affine(n: int) -> Tensor:
    """A well-conditioned invertible affine map of n numbers, ``[n + 1, n + 1]``."""
    matrix = torch.eye(n + 1, dtype=DOUBLE)
    matrix[:-1] += torch.randn(n, n + 1, dtype=DOUBLE) / (2 * n**0.5)
    matrix[:-1, :-1] *= 2
    return matrix


def linear(n: int) -> Tensor:
    matrix = affine(n)
    matrix[:-1, -1] = 0
    return matrix


def homogeneous(layer: nn.Linear) -> Tensor:
    return torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1)


def network_and_disguise(widths: list[int]) -> tuple[nn.Module, nn.Module]:
    """A network, and another of the same function whose signals are transformed between the layers.

    Inputs of layer i are mapped by Ω_{i−1}, its outputs mapped back by Φ_i, and W†_i = Φ_i⁻¹ W_i Ω_{i−1}⁻¹.
    """
    layers = [nn.Linear(i, o).double() for i, o in pairwise(widths)]
    plain: list[nn.Module] = []
    disguised: list[nn.Module] = []
    for layer in layers:
        omega, phi = affine(layer.in_features), linear(layer.out_features)
        other = nn.Linear(layer.in_features, layer.out_features).double()
        weight = torch.linalg.inv(phi)[:-1, :-1] @ homogeneous(layer) @ torch.linalg.inv(omega)
        with torch.no_grad():
            other.weight.copy_(weight[:, :-1])
            other.bias.copy_(weight[:, -1])
        plain += [layer, nn.Tanh()]
        disguised += [Fixed(omega), other, Fixed(phi), nn.Tanh()]
    return nn.Sequential(*plain[:-1]), nn.Sequential(*disguised[:-1])


def outputs_after(model: nn.Module, x: Tensor, **options) -> Tensor:
    optimizer = KFAC(model, lr=0.05, momentum=0.0, kl_clip=None, fisher="exact", likelihood="gaussian", **options)
    for _ in range(3):
        optimizer.zero_grad()
        Gaussian().loss(model(x), x[:, :3].sin()).backward()
        optimizer.step()
    return model(x).detach()


@pytest.mark.parametrize("approximation", ["block_diagonal", "block_tridiagonal"])
def test_training_does_not_see_affine_maps_as_damping_vanishes(approximation: str) -> None:
    x = torch.randn(80, 4, dtype=DOUBLE)
    plain, disguised = network_and_disguise([4, 5, 4, 3])
    start = plain(x).detach()
    assert torch.allclose(disguised(x), start, atol=1e-12)
    options = {"approximation": approximation, "damping": 1e-24}
    one, other = outputs_after(plain, x, **options), outputs_after(disguised, x, **options)
    change = (one - start).norm()
    assert (one - other).norm() < 1e-6 * change
    assert change > 0.1 * start.norm()


def test_plain_gradients_do_see_them() -> None:
    """So that the test above can fail: with large damping the same updates differ."""
    x = torch.randn(80, 4, dtype=DOUBLE)
    plain, disguised = network_and_disguise([4, 5, 4, 3])
    start = plain(x).detach()
    one, other = (outputs_after(m, x, damping=100.0) for m in (plain, disguised))
    assert (one - other).norm() > 0.1 * (one - start).norm()
