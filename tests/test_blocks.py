"""Which modules get which blocks: patterns, classes of one's own, ties, and the memory that all of it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fisher import exact_blocks, gather, kronecker_block, root_gaussian
from test_capture import half_square
from test_layers import DOUBLE
from torch import Tensor, nn

from kfac_fast import KFAC, Blocks, Preconditioner
from kfac_fast.layers import KroneckerBlock, KroneckerLayer, PooledLinearLayer
from kfac_fast.layers.base import _LAYERS, register
from kfac_fast.layers.linear import LinearLayer
from kfac_fast.ops import Gradient


def network() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def reasons(model: nn.Module, **options: Any) -> dict[str, str]:
    pre = Preconditioner(model, **options)
    pre.close()
    return {row.name: row.reason for row in pre.report()}


def test_include_and_exclude_by_pattern() -> None:
    assert set(reasons(network()).values()) == {""}
    found = reasons(network(), blocks=Blocks(exclude=["0"]))
    assert found.pop("0.weight") == "it is excluded (exclude='0')"
    assert set(found.values()) == {""}
    found = reasons(network(), blocks=Blocks(include=("2", "4"), exclude="4"))
    assert found["1.bias"] == "it is not included (include='2', '4')"
    assert found["4.weight"] == "it is excluded (exclude='4')"
    assert found["2.weight"] == ""


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"include": [3]}, TypeError, r"include must be a pattern or several, got \[3\]"),
        ({"classes": {"0": nn.Linear}}, TypeError, "classes must map patterns to Layer classes, got '0'"),
        ({"max_factor_bytes": 0}, ValueError, "max_factor_bytes must be an integer >= 1 or None, got max_factor_bytes"),
        ({"max_side": 0}, ValueError, "max_side must be an integer >= 1 or None, got max_side=0"),
    ],
)
def test_errors_of_blocks(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Blocks(**arguments)
    with pytest.raises(ValueError, match="include has 'hed', which matches no module; there are '', '0', '1'"):
        KFAC(network(), blocks=Blocks(include=["0", "hed"]))
    with pytest.raises(ValueError, match="exclude has '9', which matches no module"):
        KFAC(network(), blocks=Blocks(exclude="9"))
    with pytest.raises(ValueError, match="classes has '9', which matches no module"):
        KFAC(network(), blocks=Blocks(classes={"9": LinearLayer}))
    with pytest.raises(TypeError, match="blocks must be a Blocks or None, got str"):
        KFAC(network(), blocks="0")


# ---- classes of one's own -------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """The example of docs/layers.md: y = x (U V)ᵀ, two factors in one module."""

    def __init__(self, inputs: int, rank: int, outputs: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.randn(outputs, rank) / rank**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)


class LowRankLayer(KroneckerLayer):
    kinds = (LowRank,)
    needs_own_pass = True

    def make_blocks(self) -> Sequence[KroneckerBlock]:
        (rank, inputs), outputs = self.module.down.shape, len(self.module.up)
        return [KroneckerBlock(("down",), "down", inputs, rank), KroneckerBlock(("up",), "up", rank, outputs)]

    def matrices(self, values: Mapping[str, Tensor]) -> list[Gradient]:
        return [values["down"], values["up"]]

    def forward_in_parts(self, note: Any) -> Any:
        def forward(x: Tensor) -> Tensor:
            hidden = F.linear(x, self.module.down)
            note(0, x, hidden)
            y = F.linear(hidden, self.module.up)
            note(1, hidden, y)
            return y

        return forward


class Scaled(nn.Linear):
    """Computes something else than its base class."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class ScaledLayer(LinearLayer):
    def input_rows(self, inputs: Tensor, *rest: Any) -> Tensor:
        return 2 * super().input_rows(inputs)


@pytest.fixture
def low_rank() -> Any:
    register(LowRankLayer)
    yield LowRankLayer
    del _LAYERS[LowRank]


def test_a_registered_class_serves_its_modules(low_rank: type[KroneckerLayer]) -> None:
    model = nn.Sequential(LowRank(4, 2, 3), nn.Linear(3, 2)).double()
    x = torch.randn(6, 4, dtype=DOUBLE)
    pre = Preconditioner(model, fisher="exact", likelihood="gaussian")
    gather(pre, model, half_square, x)
    assert [row.kind for row in pre.report()][:2] == ["LowRankLayer", "LowRankLayer"]
    for block, exact in enumerate(exact_blocks(model, pre.layers[0], x, root_gaussian)):
        assert torch.allclose(kronecker_block(pre, 0, block), exact, atol=1e-12)


def test_a_class_for_a_name() -> None:
    """A subclass of a module type has no block of its own accord; one class for its name gives it one."""
    model = nn.Sequential(Scaled(4, 3, bias=False), nn.Linear(3, 2)).double()
    assert reasons(model)["0.weight"] == "no block for Scaled"
    x = torch.randn(6, 4, dtype=DOUBLE)
    pre = Preconditioner(model, fisher="exact", likelihood="gaussian", blocks=Blocks(classes={"0": ScaledLayer}))
    gather(pre, model, half_square, x)
    assert [row.kind for row in pre.report()] == ["ScaledLayer", "LinearLayer", "LinearLayer"]
    (exact,) = exact_blocks(model, pre.layers[0], x, root_gaussian)
    assert torch.allclose(kronecker_block(pre, 0), exact, atol=1e-12)


# ---- what is not covered says why -----------------------------------------------------------------------------------


def test_reasons() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
            self.spectral = nn.utils.spectral_norm(nn.Linear(3, 3))
            self.frozen = nn.Linear(3, 3)
            self.frozen.weight.requires_grad_(False)
            self.own = nn.Parameter(torch.zeros(3))
            self.prelu = nn.PReLU()
            self.fine = nn.Linear(3, 2)

    found = reasons(Odd())
    assert found["parametrized.bias"] == "the weight is computed from it (parametrized)"
    assert found["parametrized.parametrizations.weight.original0"] == "the weight is computed from it (parametrized)"
    assert found["spectral.weight_orig"] == "the weight is computed from it, not a parameter"
    assert found["frozen.weight"] == "it is frozen"
    assert found["frozen.bias"] == "its layer is frozen, in whole or in part (requires_grad=False)"
    assert found["own"] == "no block for Odd"
    assert found["prelu.weight"] == "no block for PReLU"
    assert found["fine.weight"] == found["fine.bias"] == ""


def test_adapters_of_low_rank_beside_a_frozen_layer() -> None:
    """LoRA as it is usually written: two Linear modules, whose sum with a frozen one is used."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(4, 3).requires_grad_(False)
            self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    model = Adapted()
    optimizer = KFAC(model)
    rows = {row.name: row for row in optimizer.report()}
    assert [rows[name].covered for name in ("base.weight", "down.weight", "up.weight")] == [False, True, True]
    before = model.base.weight.clone()
    F.cross_entropy(model(torch.randn(5, 4)), torch.zeros(5, dtype=torch.long)).backward()
    optimizer.step()
    assert torch.equal(model.base.weight, before)
    assert optimizer.preconditioner.factors.updates.tolist() == [1] * 4


def test_ties_that_cannot_be_pooled_say_why() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 2))
    model[1].weight = model[0].weight
    found = reasons(model)
    assert found["0.weight"] == "it is shared with a module that differs in kind, settings or other parameters"
    assert found["0.bias"].startswith("the other parameter of its layer: it is shared")
    assert found["2.weight"] == ""

    class Plain(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model.add_module("plain", Plain(model[0].weight))
    assert reasons(model)["0.weight"] == "it is shared with a module that has no block"


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_is_known_before_the_first_step(dtype: torch.dtype) -> None:
    """What is promised is what is kept, to the last number: factors, sums and inverses without their alignment."""
    model = network()
    model.add_module("attention", nn.MultiheadAttention(4, 2))
    model.to(dtype)
    optimizer = KFAC(model, blocks=Blocks(max_side=5))
    e = dtype.itemsize
    expected = {
        "EmbeddingLayer": 3 * e * (9 + 4 * 4),
        "LayerNormLayer": 3 * e * 3 * 4,
        "LinearLayer": 3 * e * (5 * 5 + 5 * 5 + 6 + 3 * 3),
        "AttentionLayer": 3 * e * 4 * (5 * 5 + 4 * 4),
    }
    memory = optimizer.memory()
    assert {kind: memory[kind] for kind in expected} == expected
    covered = sum(p.numel() for p in model.parameters())
    assert memory["natural gradients"] == memory["momentum"] == e * covered
    assert sum(row.bytes for row in optimizer.report()) == sum(expected.values()) == optimizer.report().bytes


def test_a_vocabulary_is_no_surprise() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(50_000, 8), nn.Linear(8, 50_000)

    model = Language()
    optimizer = KFAC(model)
    rows = {row.name: row for row in optimizer.report()}
    assert rows["table.weight"].bytes == 3 * 4 * (50_000 + 8 * 8)
    assert rows["head.weight"].bytes == 3 * 4 * (9 * 9 + 50_000)
    line = next(line for line in str(optimizer.report()).splitlines() if line.startswith("table.weight"))
    assert line.split() == ["table.weight", "50000×8", "EmbeddingLayer", "50000", "8²", "587", "KiB"]
    with pytest.raises(
        ValueError,
        match=r"would need 27.9 GiB \(30000601740 bytes\), more than max_factor_bytes=1000000000: LinearLayer 27.9 GiB, "
        r"EmbeddingLayer 587 KiB; most of all head with 27.9 GiB\. Leave layers out with",
    ):
        KFAC(model, blocks=Blocks(max_side=None, max_factor_bytes=10**9))
    total = sum(v for k, v in optimizer.memory().items() if k.endswith("Layer"))
    KFAC(model, blocks=Blocks(max_factor_bytes=total))
    with pytest.raises(ValueError, match="most of all"):
        KFAC(model, blocks=Blocks(max_factor_bytes=total - 1))


# ---- calls that are unusual -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:layer .* has a gradient but no curvature statistics")
def test_empty_batches_and_skipped_layers_commit_nothing_wrong() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    model.add_module("never", nn.LSTM(4, 4))
    forward = model.forward
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    assert forward is not model.forward
    optimizer = KFAC(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    F.cross_entropy(
        model(torch.zeros(0, dtype=torch.long)), torch.zeros(0, dtype=torch.long), reduction="sum"
    ).backward()
    optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    x = torch.randint(9, (6,))
    F.cross_entropy(model(x), x % 3).backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert changed == {"0.weight", "1.weight", "1.bias", "2.weight", "2.bias"}
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_class_that_does_not_fit_the_module_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(TypeError, match=r"blocks: the class for '0' does not fit a Conv2d: .*in_features"):
        KFAC(model, blocks=Blocks(classes={"0": PooledLinearLayer}))
    assert not model[0]._forward_hooks
