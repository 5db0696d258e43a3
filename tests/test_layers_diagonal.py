"""Layers with diagonal factors, tied tables, and units: their second moments and natural gradients, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fisher import exact_blocks, gather, root_categorical, root_gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layers import DOUBLE, layer_of
from torch import Tensor, nn

from kfac_fast import Gaussian, Preconditioner
from kfac_fast.approximations.diagonal import DiagonalFisher
from kfac_fast.approximations.tied import TiedFisher
from kfac_fast.approximations.units import UnitFisher
from kfac_fast.layers import Blocks, SquareSums


def loss(y: Tensor) -> Tensor:
    return Gaussian().loss(y, torch.full_like(y, 7.0))  # no residual is zero, which would not count


def preconditioner(model: nn.Module, **options: Any) -> Preconditioner:
    return Preconditioner(model, **{"fisher": "exact", "likelihood": "gaussian", "inverse_every": 1, **options})


def part_of(pre: Preconditioner, kind: type) -> Any:
    (part,) = [part for part in pre.parts if isinstance(part, kind)]
    return part


def sides(part: DiagonalFisher | TiedFisher, block: int) -> tuple[Tensor, Tensor]:
    """A and G of a block as matrices."""
    factors = part.factors
    views = factors.by_factor(factors.diagonals)
    a, g = (torch.diag(views[i]) if len(views[i]) else factors.running[i] for i in (block, factors.count + block))
    return a, g


def damped(matrix: Tensor, damping: Tensor | float) -> Tensor:
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)


def pi(a: Tensor, g: Tensor) -> Tensor:
    return ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()


# ---- embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_under_a_loss_per_token_is_exact(padding_idx: int | None) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx)).double()
    x = torch.tensor([[0, 1, 1, 2], [4, 2, 1, 0]])
    pre = preconditioner(model)
    gather(pre, model, loss, x)
    (exact,) = exact_blocks(model, pre.layers[0], x, root_gaussian)
    a, g = sides(part_of(pre, DiagonalFisher), 0)
    assert torch.allclose(torch.kron(g, a), exact, atol=1e-12)
    assert int(a.diagonal().count_nonzero()) == (4 if padding_idx is None else 3)


def test_embedding_of_one_token_is_exact() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x = torch.tensor([2])
    pre = preconditioner(model, likelihood="categorical")
    gather(pre, model, lambda y: F.cross_entropy(y, x), x)
    embedding = next(layer for layer in pre.layers if layer.name == "0")
    (exact,) = exact_blocks(model, embedding, x, root_categorical)
    a, g = sides(part_of(pre, DiagonalFisher), 0)
    assert torch.allclose(torch.kron(g, a), exact, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bags_are_exact_up_to_the_diagonal(data: st.DataObject) -> None:
    """A's diagonal and G, against the input rows of every bag made one by one with torch itself."""
    mode = data.draw(st.sampled_from(["sum", "mean"]), "mode")
    padding = data.draw(st.sampled_from([None, 1]), "padding_idx")
    last = data.draw(st.booleans(), "include_last_offset")
    module = nn.EmbeddingBag(4, 3, mode=mode, padding_idx=padding, include_last_offset=last).double()
    bags = data.draw(st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=4), "bags")
    weighted = mode == "sum" and data.draw(st.booleans(), "weighted")
    weights = [torch.rand(len(bag), dtype=DOUBLE) + 0.1 for bag in bags] if weighted else None
    ends = torch.tensor([0, *[len(bag) for bag in bags]]).cumsum(0)
    if data.draw(st.booleans(), "matrix") and len({len(bag) for bag in bags}) == 1 and bags[0]:
        args: tuple[Any, ...] = (torch.tensor(bags), None, torch.stack(weights) if weights else None)
    else:
        flat = torch.tensor([i for bag in bags for i in bag], dtype=torch.long)
        args = (flat, ends if last else ends[:-1], torch.cat(weights) if weights else None)
    layer = layer_of(module)
    y = module(*args)
    rows = torch.stack(  # the weight of every entry in a bag is what its output does with the entry's first element
        [torch.autograd.grad(out[0], module.weight, retain_graph=True)[0][:, 0] for out in y]
    )
    used = rows.any(1)
    inputs = layer.inputs(args, {})
    found = layer.input_rows(*inputs)
    assert isinstance(found, SquareSums)
    assert found.rows == len(bags)
    expected = rows.square().sum(0) * len(bags) / max(int(used.sum()), 1)
    assert torch.allclose(found.sums, expected, atol=1e-12)
    sent = torch.randn_like(y)
    assert torch.equal(layer.output_rows(sent, *inputs), sent * used.unsqueeze(1))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(4, 3, sparse=True), "its gradient is sparse (sparse=True)"),
        (nn.Embedding(4, 3, scale_grad_by_freq=True), "its gradient is rescaled (scale_grad_by_freq=True)"),
        (nn.EmbeddingBag(4, 3, mode="max"), "the maximum over a bag (mode='max') is not linear in the weight"),
    ],
)
def test_tables_that_are_left_out_say_why(module: nn.Module, reason: str) -> None:
    pre = Preconditioner(nn.Sequential(module, nn.Linear(3, 2)))
    assert [row.reason for row in pre.report()] == [reason, "", ""]


# ---- factors kept as diagonals --------------------------------------------------------------------------------------


class Wide(nn.Module):
    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, 3, stride=2, padding=(1, 2), groups=2, padding_mode="circular", bias=bias)
        self.head = nn.Linear(4, 7, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.convolution(x)).mean((2, 3)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("max_side", [1, 4, 5, 8])
def test_a_large_factor_keeps_its_diagonal(max_side: int, bias: bool) -> None:
    model = Wide(bias=bias).double()
    x = torch.randn(5, 2, 6, 5, dtype=DOUBLE)
    whole = preconditioner(model)
    gather(whole, model, loss, x)
    whole.close()
    pre = preconditioner(model, blocks=Blocks(max_side=max_side))
    gather(pre, model, loss, x)
    part = part_of(pre, DiagonalFisher)
    names = [layer.name for layer in part.layers]
    assert ("convolution" in names) == (9 + bias > max_side)
    assert "head" in names or max_side == 8
    block = 0
    for layer in part.layers:
        first = whole.factors.first_block[[own.name for own in whole.layers].index(layer.name)]
        for i, kept in enumerate(layer.blocks):
            for found, index, diagonal in zip(
                sides(part, block), (first + i, whole.factors.count + first + i), (kept.a_diagonal, kept.g_diagonal),
                strict=True,
            ):  # fmt: skip
                full = whole.factors.running[index]
                assert diagonal == (len(full) > max_side)
                assert torch.allclose(found, torch.diag(full.diagonal()) if diagonal else full, atol=1e-12)
            block += 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("max_side", [1, 4, 5])
def test_natural_gradient_with_diagonals_is_the_dense_one(max_side: int, bias: bool) -> None:
    """U = (G̃ ⊗ Ã)⁻¹ V with the damped factors as dense matrices."""
    model = Wide(bias=bias).double()
    pre = preconditioner(model, damping=0.09, blocks=Blocks(max_side=max_side))
    loss(model(torch.randn(5, 2, 6, 5, dtype=DOUBLE))).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    dots = pre.natural_gradients(0.09)
    part = part_of(pre, DiagonalFisher)
    block = 0
    for layer in part.layers:
        result = dict(zip(map(id, pre.covered), pre.results, strict=True))
        before = layer.matrices({name: gradients[f"{layer.name}.{name}"] for name in layer.parameters})
        after = layer.matrices({name: result[id(p)] for name, p in layer.parameters.items()})
        for v, u in zip(before, after, strict=True):
            v, u = (
                torch.cat([m[0].flatten(1), m[1][:, None]], 1) if isinstance(m, tuple) else m.flatten(1) for m in (v, u)
            )
            a, g = sides(part, block)
            p = pi(a, g)
            expected = torch.linalg.solve(damped(g, 0.3 / p), v) @ torch.linalg.inv(damped(a, 0.3 * p))
            assert torch.allclose(u, expected, atol=1e-10)
            offset = sum(len(own.blocks) for own in pre.layers if own not in part.layers)
            assert torch.allclose(dots[offset + block], (u * v).sum(), atol=1e-10)
            block += 1


# ---- tied weights ---------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.head = nn.Linear(3, 6, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)))


@pytest.mark.parametrize("bias", [True, False])
def test_tied_embedding_and_head(bias: bool) -> None:
    """U solves the sum of both uses' damped blocks, made dense, for the gradient of the one weight."""
    model = Tied(bias=bias).double()
    x = torch.tensor([[0, 1, 1], [5, 2, 1]])
    pre = preconditioner(model, likelihood="categorical", damping=0.09)
    F.cross_entropy(model(x).flatten(0, 1), x.flip(1).flatten()).backward()
    v = model.embedding.weight.grad.clone()
    dots = pre.natural_gradients(0.09)
    part = part_of(pre, TiedFisher)
    assert len(pre.covered) == 1 + bias
    (d1, g), (a, d2) = sides(part, 0), sides(part, 1)
    gamma = 0.3 / 2**0.5
    p1, p2 = pi(d1, g), pi(a, d2)
    d1, g = damped(d1, gamma * p1), damped(g, gamma / p1)
    a, d2 = damped(a, gamma * p2), damped(d2, gamma / p2)
    dense = torch.kron(d1, g) + torch.kron(d2, a[:3, :3])  # over the rows of the weight
    expected = torch.linalg.solve(dense, v.flatten()).view_as(v)
    u = pre.results[0]
    assert torch.allclose(u, expected, atol=1e-10)
    assert torch.allclose(dots[0], (u * v).sum(), atol=1e-10)
    if bias:
        b = model.head.bias.grad
        assert torch.allclose(pre.results[1], b / d2.diagonal(), atol=1e-10)
        assert torch.allclose(dots[1], (b * b / d2.diagonal()).sum(), atol=1e-10)
    rows = {row.name: row for row in pre.report()}
    assert rows["embedding.weight"].kind == "EmbeddingLayer + LinearLayer"
    assert rows["embedding.weight"].bytes == part.memory(0) + part.memory(1)


def test_moments_of_a_tied_weight_are_those_of_both_uses_apart() -> None:
    model = Tied(bias=True).double()
    twin = Tied(bias=True).double()
    twin.load_state_dict(model.state_dict())
    twin.head.weight = nn.Parameter(twin.head.weight.detach().clone())
    x = torch.tensor([[0, 1, 1], [5, 2, 1]])
    tied, untied = preconditioner(model, likelihood="categorical"), preconditioner(twin, likelihood="categorical")
    for pre, net in ((tied, model), (untied, twin)):
        F.cross_entropy(net(x).flatten(0, 1), x.flip(1).flatten()).backward()
        pre.step()
    (d1, g), (a, d2) = (sides(part_of(tied, TiedFisher), i) for i in (0, 1))
    other_d1, other_g = sides(part_of(untied, DiagonalFisher), 0)
    assert torch.allclose(d1, other_d1)
    assert torch.allclose(g, other_g)
    assert torch.allclose(a, untied.factors.running[0])
    assert torch.allclose(d2.diagonal(), untied.factors.running[1].diagonal())


def test_tied_linear_modules_pool_their_rows() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight, self.second.bias = self.first.weight, self.first.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    class Twice(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(torch.tanh(self.first(x)))

    x = torch.randn(5, 3, dtype=DOUBLE)
    model, twin = Two().double(), Twice().double()
    twin.load_state_dict(model.state_dict())
    found = []
    for net in (model, twin):
        pre = preconditioner(net)
        gather(pre, net, loss, x)
        assert len(pre.layers) == 1
        assert all(row.covered for row in pre.report())
        found.append(pre.factors.running.data)
    assert torch.equal(found[0], found[1])


# ---- together -------------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.positions = nn.Embedding(3, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x) + self.positions(torch.arange(x.shape[1]).expand_as(x))
        return self.head(torch.tanh(self.inner(self.norm(h))))


def everything() -> tuple[Everything, Tensor]:
    return Everything().double(), torch.randint(6, (4, 3))


def token_loss(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), x.flip(1).flatten(), **options)


def moments_of(pre: Preconditioner) -> list[Tensor]:
    return [
        view.clone()
        for part in pre.parts
        for i in range(len(part.layers))
        for v in part.state(i).values()
        for view in v
    ]


def test_micro_batches_and_scale_do_not_matter() -> None:
    model, x = everything()
    whole = preconditioner(model, likelihood="categorical")
    token_loss(model, x).backward()
    whole.step()
    whole.close()
    cut = preconditioner(model, likelihood="categorical")
    for part in x.split([1, 3]):
        token_loss(model, part, reduction="sum").backward()
    cut.step()
    for a, b in zip(moments_of(whole), moments_of(cut), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-12)


def test_a_batch_that_is_not_finite_changes_no_moments() -> None:
    model, x = everything()
    pre = preconditioner(model, likelihood="categorical")
    token_loss(model, x).backward()
    pre.step()
    before = moments_of(pre)
    handle = model.norm.register_forward_pre_hook(lambda module, args: (args[0] * torch.inf,))
    token_loss(model, x).backward()
    handle.remove()
    pre.update_factors()
    for a, b in zip(before, moments_of(pre), strict=True):
        assert torch.equal(a, b)


def test_empirical_moments_are_those_of_the_gradients_of_the_loss() -> None:
    model, x = everything()
    pre = preconditioner(model, likelihood="categorical", fisher="empirical")
    token_loss(model, x).backward()
    pre.step()
    scale = torch.zeros(4, dtype=DOUBLE)
    for example in x:
        model.zero_grad()
        token_loss(model, example.unsqueeze(0), reduction="sum").backward()
        scale += model.norm.weight.grad.square() / x.numel()
    assert torch.allclose(part_of(pre, UnitFisher).moments.running[0], scale, atol=1e-12)
