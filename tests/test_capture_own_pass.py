"""Statistics in a pass of their own: fused modules computed in parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recompute import DOUBLE, half_square, moments
from torch import Tensor, nn

from kfac_fast.capture import Capture
from kfac_fast.factors import Factors
from kfac_fast.layers import KroneckerBlock, KroneckerLayer, Note
from kfac_fast.layers.linear import LinearLayer
from kfac_fast.likelihoods import Gaussian
from kfac_fast.models import Original
from kfac_fast.ops import Gradient
from kfac_fast.statistics import Statistics
from kfac_fast.tape import Pass


class Fused(nn.Module):
    """tanh(x W₁ᵀ) W₂ᵀ with W₂ of two blocks, in one call that shows nothing inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 3, dtype=DOUBLE))
        self.packed = nn.Parameter(torch.randn(10, 4, dtype=DOUBLE))
        self.drop = 0.0
        self.calls = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, str]:
        self.calls += 1
        hidden = F.dropout(torch.tanh(x @ self.first.T), self.drop, self.training)
        q, k = F.linear(hidden, self.packed).chunk(2, -1)
        return scale * (q + k.sin()), "and more"


class FusedLayer(KroneckerLayer):
    needs_own_pass = True

    def make_blocks(self) -> list[KroneckerBlock]:
        return [KroneckerBlock(("first",), "first", 3, 4), *(KroneckerBlock(("packed",), part, 4, 5) for part in "qk")]

    def matrices(self, values: Mapping[str, Tensor]) -> list[Gradient]:
        return [values["first"], *values["packed"].chunk(2)]

    def forward_in_parts(self, note: Note) -> Callable[..., Any]:
        module = self.module

        def forward(x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, str]:
            before = x @ module.first.T
            note(0, x, before)
            hidden = F.dropout(torch.tanh(before), module.drop, module.training)
            parts = [F.linear(hidden, weight) for weight in module.packed.chunk(2)]
            for block, output in enumerate(parts, start=1):
                note(block, hidden, output)
            q, k = parts
            return scale * (q + k.sin()), "and more"

        return forward


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fused = Fused()
        self.head = nn.Linear(5, 2, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fused(x, scale=0.5)[0])


class Recorder:
    """A sink of its own: `Factors` and what one step adds to them."""

    def __init__(self, model: Net, fisher: str, fraction: float = 1.0) -> None:
        layers = [FusedLayer("fused", model.fused), LinearLayer("head", model.head)]
        self.factors = Factors(layers, 0.0, DOUBLE, torch.device("cpu"), empirical_mean=fisher == "empirical")
        self.statistics = Statistics([self.factors])
        self.add_terms, self.drop = self.statistics.add_terms, self.statistics.reset
        generators = {torch.device("cpu"): torch.Generator().manual_seed(0)}
        self.capture = Capture(
            Original(model, layers, ()), model, layers, Gaussian(), fisher, fraction, self, None, generators.__getitem__
        )

    def begin(self) -> None: ...

    def wants_statistics(self) -> bool:
        return True

    def add_rows(self, layer: int, inputs: Any, gradient: Tensor, sent: Pass, block: int = 0) -> None:
        self.factors.add_rows(layer, inputs, gradient, block, first=sent.first)

    def check(self, expected: list[Tensor]) -> None:
        self.statistics.commit()
        assert len(self.factors.running) == len(expected)
        for found, matrix in zip(self.factors.running, expected, strict=True):
            assert torch.allclose(found, matrix, atol=1e-13)


def by_hand(model: Net, x: Tensor, roots: list[Tensor]) -> list[Tensor]:
    """Rows of every block: A of first, q, k and head, then their G, from the gradients sent at the outputs."""
    fused = model.fused
    before = x @ fused.first.T
    hidden = F.dropout(torch.tanh(before), fused.drop, fused.training)
    q, k = (F.linear(hidden, w) for w in fused.packed.chunk(2))
    attended = 0.5 * (q + k.sin())
    y = model.head(attended)
    ones = torch.ones(len(x), 1, dtype=DOUBLE)
    rows = [x, hidden, hidden, torch.cat([attended, ones], 1)]
    gradients = [torch.autograd.grad(y, [before, q, k, y], root, retain_graph=True) for root in roots]
    return [moments([r.detach()]) for r in rows] + [
        moments(list(g), terms=len(x)) for g in zip(*gradients, strict=True)
    ]


def unit_roots(n: int) -> list[Tensor]:
    return [torch.eye(2, dtype=DOUBLE)[c].expand(n, 2) for c in range(2)]


def test_a_fused_module_is_computed_in_parts() -> None:
    model, x = Net(), torch.randn(6, 3, dtype=DOUBLE)
    recorder = Recorder(model, "exact")
    half_square(model(x)).backward()
    assert model.fused.calls == 1
    assert "forward" not in vars(model.fused)
    recorder.check(by_hand(model, x, unit_roots(6)))


def test_in_parts_on_a_fraction() -> None:
    model, x = Net(), torch.randn(8, 3, dtype=DOUBLE)
    recorder = Recorder(model, "exact", 0.5)
    half_square(model(x)).backward()
    recorder.check(by_hand(model, x[::2], unit_roots(4)))


def test_empirical_sends_on_the_users_gradient() -> None:
    model, x = Net(), torch.randn(6, 3, dtype=DOUBLE)
    recorder = Recorder(model, "empirical")
    y = model(x)
    half_square(y).backward()
    recorder.check(by_hand(model, x, [y.detach()]))


def test_the_users_own_forward_comes_back() -> None:
    model, x = Net(), torch.randn(6, 3, dtype=DOUBLE)
    theirs = lambda x, scale: Fused.forward(model.fused, x, scale=scale)
    model.fused.forward = theirs
    recorder = Recorder(model, "exact")
    half_square(model(x)).backward()
    assert model.fused.forward is theirs
    recorder.check(by_hand(model, x, unit_roots(6)))


def test_an_error_in_the_pass_puts_everything_back() -> None:
    model, x = Net(), torch.randn(6, 3, dtype=DOUBLE)
    recorder = Recorder(model, "exact")
    y = model(x)
    model.head.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("as asked")))
    with pytest.raises(KeyError):
        half_square(y).backward()
    model.head._forward_hooks.popitem()
    assert "forward" not in vars(model.fused)
    half_square(model(x)).backward()
    recorder.check(by_hand(model, x, unit_roots(6)))
