"""Scale and shift of normalisation layers: second moments and natural gradients by unit, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fisher import exact_blocks, gather, root_categorical, root_gaussian
from test_layers import DOUBLE
from test_layers_diagonal import damped, loss, part_of, preconditioner
from torch import Tensor, nn

from kfac_fast.approximations.units import UnitFisher


class Normalised(nn.Module):
    """A normalisation between layers, in the middle of positions that influence each other."""

    def __init__(self, norm: nn.Module, shape: tuple[int, ...], channels: int | None) -> None:
        super().__init__()
        self.norm = norm
        self.mix = nn.Linear(torch.Size(shape).numel(), 3)
        self.channels = channels
        nn.init.normal_(norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.tanh(self.norm(x)).flatten(1))


NORMS = [
    (nn.LayerNorm(4), (3, 4)),
    (nn.LayerNorm(4, bias=False), (4,)),
    (nn.LayerNorm((3, 4)), (2, 3, 4)),
    (nn.RMSNorm(4), (3, 4)),
    (nn.GroupNorm(2, 4), (4, 3)),
    (nn.GroupNorm(2, 4), (4, 2, 3)),
    (nn.BatchNorm1d(4).eval(), (4,)),
    (nn.BatchNorm1d(4).eval(), (4, 3)),
    (nn.BatchNorm2d(4).eval(), (4, 2, 3)),
    (nn.BatchNorm3d(2).eval(), (2, 2, 1, 3)),
    (nn.InstanceNorm1d(4, affine=True), (4, 3)),
    (nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(), (4, 2, 3)),
    (nn.InstanceNorm3d(2, affine=True), (2, 2, 1, 3)),
]


@pytest.mark.parametrize(("norm", "shape"), NORMS, ids=lambda value: str(value).split("(")[0])
@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
def test_moments_of_units_are_the_exact_blocks(norm: nn.Module, shape: tuple[int, ...], likelihood: str) -> None:
    model = Normalised(norm, shape, None).double()
    x = torch.randn(5, *shape, dtype=DOUBLE)
    if hasattr(norm, "running_mean") and norm.running_mean is not None:
        norm.running_mean.copy_(torch.randn(4 if len(norm.weight) == 4 else 2))
    pre = preconditioner(model, likelihood=likelihood)
    target = torch.zeros(5, dtype=torch.long)
    gather(pre, model, loss if likelihood == "gaussian" else lambda y: F.cross_entropy(y, target), x)
    part = part_of(pre, UnitFisher)
    (exact,) = exact_blocks(model, part.layers[0], x, root_gaussian if likelihood == "gaussian" else root_categorical)
    scale, both, shift = part.moments.running
    if norm.weight.numel() == len(exact):  # no shift
        assert torch.allclose(scale, exact.diagonal(), atol=1e-12)
        assert not both.any()
        assert not shift.any()
    else:
        assert torch.allclose(scale, exact.diagonal()[::2], atol=1e-12)
        assert torch.allclose(shift, exact.diagonal()[1::2], atol=1e-12)
        assert torch.allclose(both, exact.diagonal(1)[::2], atol=1e-12)


def test_batch_norm_in_training_uses_the_statistics_of_the_batch() -> None:
    model = Normalised(nn.BatchNorm1d(4), (4,), None).double()
    x = torch.randn(6, 4, dtype=DOUBLE)
    pre = preconditioner(model)
    gather(pre, model, loss, x)
    normal = (x - x.mean(0)) / (x.var(0, correction=0) + model.norm.eps).sqrt()
    hidden = (normal * model.norm.weight + model.norm.bias).detach().requires_grad_()
    y = model.mix(torch.tanh(hidden))
    moments = torch.zeros(3, 4, dtype=DOUBLE)
    for c in range(3):
        (g,) = torch.autograd.grad(y[:, c].sum(), hidden, retain_graph=True)
        moments += torch.stack([(g * normal).square().sum(0), (g * g * normal).sum(0), g.square().sum(0)]) / 6
    assert torch.allclose(part_of(pre, UnitFisher).moments.running, moments, atol=1e-12)


def test_examples_in_the_second_dimension() -> None:
    """Positions first, as recurrent networks have them: sums over an example's positions all the same."""

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.norm(x.transpose(0, 1))).sum(0)

    model = TimeFirst().double()
    x = torch.randn(5, 3, 4, dtype=DOUBLE)
    pre = preconditioner(model)
    gather(pre, model, loss, x)
    (exact,) = exact_blocks(model, pre.layers[0], x, root_gaussian)
    assert torch.allclose(part_of(pre, UnitFisher).moments.running[0], exact.diagonal()[::2], atol=1e-12)


def test_natural_gradient_of_units_is_the_dense_one() -> None:
    model = nn.Sequential(
        nn.LayerNorm(4), nn.Linear(4, 3), nn.LayerNorm(3, bias=False), nn.Unflatten(1, (3, 1)), nn.GroupNorm(1, 3),
        nn.Flatten(), nn.RMSNorm(3), nn.Linear(3, 2),
    ).double()  # fmt: skip
    x = torch.randn(5, 4, dtype=DOUBLE)
    pre = preconditioner(model)
    loss(model(x)).backward()
    gradients = {id(p): p.grad.clone() for p in model.parameters()}
    dots = pre.natural_gradients(0.04)
    part = part_of(pre, UnitFisher)
    assert [layer.name for layer in part.layers] == ["0", "2", "4", "6"]
    results = dict(zip(map(id, pre.covered), pre.results, strict=True))
    unit = 0
    for index, layer in enumerate(part.layers):
        weight, bias = layer.module.weight, getattr(layer.module, "bias", None)
        dot = torch.zeros((), dtype=DOUBLE)
        for j in range(len(weight)):
            s11, s12, s22 = part.moments.running[:, unit]
            unit += 1
            own = [weight] if bias is None else [weight, bias]
            v = torch.stack([gradients[id(p)][j] for p in own])
            block = torch.stack([torch.stack([s11, s12]), torch.stack([s12, s22])])[: len(v), : len(v)]
            u = torch.linalg.solve(damped(block, 0.04), v)
            assert torch.allclose(torch.stack([results[id(p)][j] for p in own]), u, atol=1e-10)
            dot += u @ v
        assert torch.allclose(dots[len(dots) - 4 + index], dot, atol=1e-10)
