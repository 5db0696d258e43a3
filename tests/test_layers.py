"""Layers of plain Kronecker blocks: their Fisher where it is exact, and their gradients from rows, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fisher import exact_blocks, gather, kronecker_block, root_gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kfac_fast import Gaussian, Preconditioner
from kfac_fast.layers import Blocks, KroneckerLayer, PooledLinearLayer
from kfac_fast.layers.base import registered
from kfac_fast.ops import ConvRows

DOUBLE = torch.float64


def zero_loss(y: Tensor) -> Tensor:
    return Gaussian().loss(y, torch.zeros_like(y))


def layer_of(module: nn.Module) -> KroneckerLayer:
    found = registered(module)
    assert found is not None
    layer = found("layer", module)
    assert isinstance(layer, KroneckerLayer)
    return layer


def matrices(rows: Tensor | ConvRows) -> list[Tensor]:
    """The rows of every block, materialised."""
    return [rows.patches(group) for group in range(rows.groups)] if isinstance(rows, ConvRows) else [rows]


def check_gradients_from_rows(module: nn.Module, *args: Any, flip: bool = False) -> None:
    """Σ g aᵀ over the rows is the gradient of the weight that torch computes, for every block."""
    layer = layer_of(module)
    y = module(*args)
    sent = torch.randn_like(y)
    y.backward(sent)
    inputs = layer.inputs(args, {})
    a_rows, g_rows = matrices(layer.input_rows(*inputs)), matrices(layer.output_rows(sent, *inputs))
    gradients = layer.matrices({name: p.grad for name, p in layer.parameters.items()})
    assert len(a_rows) == len(g_rows) == len(gradients) == len(layer.blocks)
    for a, g, gradient, block in zip(a_rows, g_rows, gradients, layer.blocks, strict=True):
        weight, bias = gradient if isinstance(gradient, tuple) else (gradient, None)
        g = g.view(len(y) if y.ndim == module.weight.ndim else 1, -1, g.shape[1]).flip(1).flatten(0, 1) if flip else g
        assert torch.allclose(g.T @ a, weight.reshape(weight.shape[0], -1), atol=1e-12)
        assert (g.shape[1], a.shape[1] + block.bias) == (block.g, block.a)
        assert (bias is not None) == block.bias
        if bias is not None:
            assert torch.allclose(g.sum(0), bias, atol=1e-12)


# ---- linear layers --------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=4), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_linear_layers_take_any_leading_dimensions(lead: list[int], d_in: int, d_out: int, bias: bool) -> None:
    module = nn.Linear(d_in, d_out, bias=bias).double()
    check_gradients_from_rows(module, torch.randn(*lead, d_in, dtype=DOUBLE))


class Averaged(nn.Module):
    """A linear network that averages over positions between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).mean((1, 2)))


def test_pooled_positions_are_exact_where_a_linear_network_averages_over_them() -> None:
    model, x = Averaged().double(), torch.randn(5, 2, 3, 3, dtype=DOUBLE)
    blocks = Blocks(classes={"first": PooledLinearLayer})
    pre = Preconditioner(model, fisher="exact", likelihood="gaussian", blocks=blocks)
    gather(pre, model, zero_loss, x)
    for i, layer in enumerate(pre.layers):
        (expected,) = exact_blocks(model, layer, x, root_gaussian)
        assert torch.allclose(kronecker_block(pre, i), expected, atol=1e-12)
    apart = Preconditioner(model, fisher="exact", likelihood="gaussian")
    gather(apart, model, zero_loss, x)
    assert not torch.allclose(kronecker_block(apart, 0), kronecker_block(pre, 0), rtol=0.1)


# ---- convolutions ---------------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, stride, dilation = (tuple(draw(st.integers(1, n)) for _ in range(dims)) for n in (3, 3, 2))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    sides = [r + draw(st.integers(0, 2)) for r in reach]
    padding = draw(st.sampled_from(["same", "valid", None]))
    if padding == "same":
        stride = (1,) * dims
    elif padding is None:
        padding = tuple(draw(st.integers(0, min(2, side - 1))) for side in sides)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    module = kind(
        groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)), kernel, stride, padding, dilation, groups,
        draw(st.booleans()), draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    ).double()  # fmt: skip
    batch = (draw(st.integers(1, 2)),) if draw(st.booleans()) else ()
    return module, torch.randn(*batch, module.in_channels, *sides, dtype=DOUBLE)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_gradients_of_convolutions(case: tuple[nn.Module, Tensor]) -> None:
    check_gradients_from_rows(*case)


# ---- transposed convolutions ----------------------------------------------------------------------------------------


@st.composite
def transposed(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))

    def per_dim(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation, sides = per_dim(1, 3), per_dim(1, 3), per_dim(1, 2), per_dim(1, 4)
    padding = tuple(
        draw(st.integers(0, min(2, ((n - 1) * s + d * (k - 1)) // 2)))
        for n, s, d, k in zip(sides, stride, dilation, kernel, strict=True)
    )
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    module = kind(
        groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)), kernel, stride, padding, extra, groups,
        draw(st.booleans()), dilation,
    ).double()  # fmt: skip
    batch = (draw(st.integers(1, 2)),) if draw(st.booleans()) else ()
    x = torch.randn(*batch, module.in_channels, *sides, dtype=DOUBLE)
    return module, x


@settings(max_examples=60, deadline=None)
@given(transposed())
def test_gradients_of_transposed_convolutions(case: tuple[nn.Module, Tensor]) -> None:
    check_gradients_from_rows(*case, flip=True)


def test_transposed_convolution_with_an_output_size() -> None:
    module = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1).double()
    check_gradients_from_rows(module, torch.randn(2, 2, 4, 3, dtype=DOUBLE), [8, 5], flip=True)


class Positions(nn.Module):
    """A convolution whose every output position is a loss term."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x).movedim(1, -1)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_under_a_loss_per_position_is_exact(groups: int) -> None:
    """g of a position does not depend on the data: A ⊗ G is the block, group by group."""
    model = Positions(nn.ConvTranspose2d(4, 2, 3, 2, 1, 1, groups)).double()
    x = torch.randn(3, 4, 3, 2, dtype=DOUBLE)
    pre = Preconditioner(model, fisher="exact", likelihood="gaussian")
    gather(pre, model, zero_loss, x)
    for group, exact in enumerate(exact_blocks(model, pre.layers[0], x, root_gaussian)):
        assert torch.allclose(kronecker_block(pre, 0, group), exact, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_convolutions_agree_with_backpack() -> None:
    backpack = pytest.importorskip("backpack", reason="backpack-for-pytorch is a test extra")
    extensions = pytest.importorskip("backpack.extensions")
    for module, x in (
        (nn.Conv1d(2, 3, 3, 2, 1), torch.randn(4, 2, 6)),
        (nn.Conv2d(2, 3, 2, 1, 1, bias=False), torch.randn(4, 2, 3, 4)),
        (nn.Conv3d(2, 3, 2, 1, 1), torch.randn(2, 2, 2, 3, 2)),
        (nn.ConvTranspose1d(2, 3, 2, 2, 1), torch.randn(4, 2, 5)),
        (nn.ConvTranspose2d(2, 3, 3, 2, 1), torch.randn(4, 2, 3, 4)),
        (nn.ConvTranspose3d(2, 2, 2, 1, 0, bias=False), torch.randn(2, 2, 2, 3, 2)),
    ):
        module, x = backpack.extend(module.double()), x.double()
        flatten = backpack.extend(nn.Flatten())
        loss = backpack.extend(nn.MSELoss(reduction="sum"))
        y = flatten(module(x))
        with backpack.backpack(extensions.KFLR()):
            loss(y, torch.zeros_like(y)).backward()
        a_theirs, g_theirs = _sorted_by_size(module.weight.kflr)
        layer = layer_of(module)
        a = layer.input_rows(*layer.inputs((x,), {})).patches()
        assert a_theirs.shape[0] == a.shape[1]
        assert torch.allclose(a.T @ a / len(x), a_theirs, atol=1e-10)
        assert torch.allclose(g_theirs / g_theirs[0, 0], torch.eye(module.out_channels, dtype=DOUBLE), atol=1e-10)


def _sorted_by_size(factors: list[Tensor]) -> tuple[Tensor, Tensor]:
    first, second = factors
    return (first, second) if len(first) > len(second) else (second, first)


# ---- bilinear -------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(2, 3, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x[..., :2], input2=x[..., 2:])


@pytest.mark.parametrize("bias", [True, False])
def test_bilinear(bias: bool) -> None:
    """Linear in the outer product of its inputs: with a squared error the block is exact."""
    model = Pair(bias).double()
    x = torch.randn(6, 3, 5, dtype=DOUBLE)
    pre = Preconditioner(model, fisher="exact", likelihood="gaussian")
    gather(pre, model, zero_loss, x)
    (exact,) = exact_blocks(model, pre.layers[0], x, root_gaussian)
    assert torch.allclose(kronecker_block(pre, 0), exact, atol=1e-12)
    check_gradients_from_rows(nn.Bilinear(2, 3, 4, bias).double(), x[..., :2], x[..., 2:])
