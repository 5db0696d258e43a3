"""Attention and recurrent layers: their forward functions in parts, and the factors that come of them, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fisher import exact_blocks, gather, kronecker_block, root_categorical
from hypothesis import given, settings
from hypothesis import strategies as st
from recompute import moments
from test_layers import DOUBLE, layer_of, zero_loss
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.utils._pytree import tree_leaves

from kfac_fast import Categorical, Preconditioner


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, (tuple, list)):
        return [t for part in result for t in tensors(part)]
    return [result] if isinstance(result, Tensor) else []


def check_parts(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """In parts, a module computes the same; Σ g aᵀ over the noted uses is the gradient that torch computes."""
    layer = layer_of(module)
    uses: dict[int, list[tuple[Tensor, Tensor]]] = {block: [] for block in range(len(layer.blocks))}
    forward = layer.forward_in_parts(lambda block, a, y: uses[block].append((a.detach(), y)))
    assert forward is not None
    state = torch.get_rng_state()
    result = module(*args, **kwargs)
    torch.set_rng_state(state)
    in_parts = forward(*args, **kwargs)
    assert type(in_parts) is type(result)
    wanted, found = tensors(result), tensors(in_parts)
    assert [w.shape for w in wanted] == [f.shape for f in found]
    assert all(torch.allclose(w, f, atol=1e-12) for w, f in zip(wanted, found, strict=True))

    pairs = [(w, f, torch.randn_like(w)) for w, f in zip(wanted, found, strict=True) if w.requires_grad]
    wanted, found, sent = (list(column) for column in zip(*pairs, strict=True))
    torch.autograd.backward(wanted, sent)
    gradients = layer.matrices({name: p.grad for name, p in layer.parameters.items()})
    outputs = [y for block in uses.values() for _, y in block]
    arrived = iter(torch.autograd.grad(found, outputs, sent))
    for (index, own), gradient, block in zip(uses.items(), gradients, layer.blocks, strict=True):
        weight, bias = gradient if isinstance(gradient, tuple) else (gradient, None)
        rows = [(layer.input_rows(a), layer.output_rows(next(arrived), a)) for a, _ in own]
        assert rows, f"no use of block {index}"
        assert torch.allclose(sum(g.T @ a for a, g in rows), weight, atol=1e-10)
        assert (weight.shape[0], weight.shape[1] + block.bias) == (block.g, block.a)
        if bias is not None:
            assert torch.allclose(sum(g.sum(0) for _, g in rows), bias, atol=1e-10)


# ---- attention ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_attention_in_parts(data: st.DataObject) -> None:
    flags = {name: data.draw(st.booleans(), name) for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    heads = data.draw(st.integers(1, 2), "heads")
    width = 4 * heads
    kdim, vdim = (data.draw(st.sampled_from([None, 3]), name) for name in ("kdim", "vdim"))
    module = nn.MultiheadAttention(width, heads, 0.3, kdim=kdim, vdim=vdim, **flags).double()
    nn.init.normal_(module.in_proj_bias) if flags["bias"] else None
    module.train(data.draw(st.booleans(), "training"))
    n, target, source = (data.draw(st.integers(1, 3), name) for name in ("n", "target", "source"))

    def sequence(length: int, dim: int | None) -> Tensor:
        shape = (n, length) if flags["batch_first"] else (length, n)
        x = torch.randn(*shape, dim or width, dtype=DOUBLE)
        return x[0] if unbatched and flags["batch_first"] else x[:, 0] if unbatched else x

    unbatched = data.draw(st.booleans(), "unbatched")
    kwargs: dict[str, Any] = {"need_weights": data.draw(st.booleans(), "need_weights")}
    kwargs["average_attn_weights"] = data.draw(st.booleans(), "average")
    if data.draw(st.booleans(), "attn_mask"):
        kwargs["attn_mask"] = torch.randn(target, source, dtype=DOUBLE)
    if data.draw(st.booleans(), "key_padding_mask"):
        mask = torch.zeros(n, source, dtype=torch.bool)
        mask[:, 1:] = True
        kwargs["key_padding_mask"] = (mask[0] if unbatched else mask) if "attn_mask" not in kwargs else None
    check_parts(module, sequence(target, None), sequence(source, kdim), sequence(source, vdim), **kwargs)


def test_attention_of_one_sequence_to_itself_under_a_causal_mask() -> None:
    module = nn.MultiheadAttention(4, 2, batch_first=True).double()
    x = torch.randn(2, 5, 4, dtype=DOUBLE)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=DOUBLE)
    check_parts(copy.deepcopy(module), x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    check_parts(copy.deepcopy(module), x, x, x, attn_mask=mask < 0)


class OneToken(nn.Module):
    """Attention of a token to itself and to the learned key and value: every projection has one use."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True, **options)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        kv = {"kdim": x[..., :3], "vdim": x[..., :2]}
        key = kv["kdim"] if self.attention.kdim == 3 else x
        value = kv["vdim"] if self.attention.vdim == 2 else x
        return self.last(self.attention(x, key, value, need_weights=False)[0].squeeze(1))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 3, "vdim": 2}])
def test_attention_with_one_use_of_every_projection_is_exact(options: dict[str, Any]) -> None:
    model = OneToken(**options).double()
    nn.init.normal_(model.attention.out_proj.weight)
    x = torch.randn(1, 1, 4, dtype=DOUBLE)
    pre = Preconditioner(model, fisher="exact")
    gather(pre, model, lambda y: Categorical().loss(y, torch.zeros(1, dtype=torch.long)), x)
    assert [type(layer).__name__ for layer in pre.layers] == ["AttentionLayer", "LinearLayer"]
    for i, layer in enumerate(pre.layers):
        exact = exact_blocks(model, layer, x, root_categorical)
        for block, matrix in enumerate(exact):
            assert matrix.abs().max() > 1e-6
            assert torch.allclose(kronecker_block(pre, i, block), matrix, atol=1e-12), layer.blocks[block].label


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


def test_factors_of_a_transformer_layer_are_the_moments_of_its_rows() -> None:
    """Against a recomputation that takes the attention apart by hand."""
    model = Encoder().double()
    x = torch.randn(2, 3, 4, dtype=DOUBLE)
    pre = Preconditioner(model, fisher="exact", likelihood="gaussian")
    gather(pre, model, zero_loss, x)
    attention = model.layer.self_attn
    projected = [
        torch.nn.functional.linear(x, w, b)
        for w, b in zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    ]
    q, k, v = (p.view(2, 3, 2, 2).transpose(1, 2) for p in projected)
    weights = (q @ k.transpose(-1, -2) / 2**0.5).softmax(-1)
    heads = (weights @ v).transpose(1, 2).reshape(2, 3, 4)
    attended = attention.out_proj(heads)
    hidden = model.layer.norm1(x + attended)
    inner = model.layer.linear1(hidden)
    outer = model.layer.linear2(inner.relu())
    y = model.head(model.layer.norm2(hidden + outer))
    assert torch.allclose(y, model(x))
    rows: list[list[Tensor]] = [[] for _ in range(4)]
    for term in range(6):
        for c in range(3):
            found = torch.autograd.grad(y.view(6, 3)[term, c], [*projected, attended], retain_graph=True)
            for into, g in zip(rows, found, strict=True):
                into.append(g)
    factors = pre.factors
    index = next(i for i, layer in enumerate(pre.layers) if layer.name == "layer.self_attn")
    for own, (a, g) in enumerate(zip([x, x, x, heads.detach()], rows, strict=True)):
        block = factors.first_block[index] + own
        assert torch.allclose(factors.running[block], moments([a], bias=True), atol=1e-12)
        assert torch.allclose(factors.running[factors.count + block], moments(g, terms=6), atol=1e-12)


# ---- recurrence -----------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_recurrent_modules_in_parts(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([nn.RNN, nn.LSTM, nn.GRU]), "kind")
    options: dict[str, Any] = {
        name: data.draw(st.booleans(), name) for name in ("bias", "batch_first", "bidirectional")
    } | {"num_layers": data.draw(st.integers(1, 2), "layers")}
    if kind is nn.LSTM:
        options["proj_size"] = data.draw(st.sampled_from([0, 2]), "proj_size")
    if kind is nn.RNN:
        options["nonlinearity"] = data.draw(st.sampled_from(["tanh", "relu"]), "nonlinearity")
    module = kind(3, 4, **options).double()
    form = data.draw(st.sampled_from(["batch", "single", "sorted", "unsorted"]), "form")
    if form in ("batch", "single"):
        n, time = data.draw(st.integers(1, 3), "n"), data.draw(st.integers(1, 4), "time")
        x: Any = torch.randn(*((n, time) if options["batch_first"] else (time, n)), 3, dtype=DOUBLE)
        x = x if form == "batch" else x.flatten(0, 1)
    else:
        lengths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4), "lengths")
        n = len(lengths)
        if form == "sorted":
            x = pack_sequence([torch.randn(t, 3, dtype=DOUBLE) for t in sorted(lengths, reverse=True)])
        else:
            padded = torch.randn(n, max(lengths), 3, dtype=DOUBLE)
            x = pack_padded_sequence(padded, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    hx = None
    if data.draw(st.booleans(), "hx"):
        count = options["num_layers"] * (1 + options["bidirectional"])
        batch = () if form == "single" else (n,)
        h = torch.randn(count, *batch, options.get("proj_size") or 4, dtype=DOUBLE)
        hx = (h, torch.randn(count, *batch, 4, dtype=DOUBLE)) if kind is nn.LSTM else h
    check_parts(module, x, hx)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_recurrent_cells_in_parts(kind: type[nn.Module], bias: bool, batch: tuple[int, ...]) -> None:
    module = kind(3, 4, bias).double()
    x, h = torch.randn(*batch, 3, dtype=DOUBLE), torch.randn(*batch, 4, dtype=DOUBLE)
    state = (h, torch.randn_like(h)) if kind is nn.LSTMCell else h
    check_parts(module, x, state)
    check_parts(copy.deepcopy(module), x)


class Sequences(nn.Module):
    """A recurrent network with outputs at every time step, or at the last alone."""

    def __init__(self, kind: type[nn.RNNBase], *, last: bool = False) -> None:
        super().__init__()
        self.recurrent = kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y = self.recurrent(x)[0]
        return self.head(y[:, -1] if self.last else y)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_one_step_of_one_sequence_is_exact(kind: type[nn.RNNBase]) -> None:
    class OneStep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.head = kind(3, 4), nn.Linear(4, 3)
            self.h = torch.randn(1, 1, 4, dtype=DOUBLE)

        def forward(self, x: Tensor) -> Tensor:
            hx = (self.h, self.h + 1) if kind is nn.LSTM else self.h
            return self.head(self.recurrent(x.unsqueeze(0), hx)[0][0])

    model = OneStep().double()
    x = torch.randn(1, 3, dtype=DOUBLE)
    pre = Preconditioner(model, fisher="exact")
    gather(pre, model, lambda y: Categorical().loss(y, torch.zeros(1, dtype=torch.long)), x)
    for i, layer in enumerate(pre.layers):
        for block, exact in enumerate(exact_blocks(model, layer, x, root_categorical)):
            assert torch.allclose(kronecker_block(pre, i, block), exact, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("last", [True, False])
def test_factors_of_a_recurrent_layer_against_an_unrolled_network(kind: type[nn.RNNBase], last: bool) -> None:
    """Every time step gets weights of its own: the gradient of a step's bias for one example is that step's row."""
    n, time = 2, 3
    model = Sequences(kind, last=last).double()
    x = torch.randn(n, time, 3, dtype=DOUBLE)
    pre = Preconditioner(model, fisher="exact", likelihood="gaussian")
    gather(pre, model, zero_loss, x)
    steps = [copy.deepcopy(model.recurrent) for _ in range(time)]
    g_ih: list[Tensor] = []
    g_hh: list[Tensor] = []
    hidden: list[Tensor] = []
    for example in range(n):
        state, outputs = None, []
        for t, step in enumerate(steps):
            h = torch.zeros(4, dtype=DOUBLE) if state is None else tree_leaves(state)[0].flatten()
            hidden.append(h.detach())
            y, state = step(x[example, t].unsqueeze(0), state)
            outputs.append(model.head(y[0]))
        for output in outputs[-1:] if last else outputs:
            for c in range(2):
                biases = [b for step in steps for b in (step.bias_ih_l0, step.bias_hh_l0)]
                found = torch.autograd.grad(output[c], biases, retain_graph=True, allow_unused=True)
                g_ih += [g for g in found[::2] if g is not None]
                g_hh += [g for g in found[1::2] if g is not None]
    terms = n if last else n * time
    factors = pre.factors
    assert torch.allclose(factors.running[0], moments([x], bias=True), atol=1e-12)
    assert torch.allclose(factors.running[1], moments(hidden, bias=True), atol=1e-12)
    assert torch.allclose(factors.running[factors.count], moments(g_ih, terms=terms), atol=1e-12)
    assert torch.allclose(factors.running[factors.count + 1], moments(g_hh, terms=terms), atol=1e-12)
