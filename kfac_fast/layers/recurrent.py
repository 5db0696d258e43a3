"""RNN, LSTM and GRU, modules and cells: an input-to-hidden and a hidden-to-hidden block per layer and direction.

Rows are time steps, taken as independent (Martens, Ba & Johnson 2018, sec. 3). torch runs a whole sequence in one
call, so that the gradient at the hidden-to-hidden products is seen only when the recurrence is run step by step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..ops import Gradient
from .base import KroneckerBlock, KroneckerLayer, Note, register


class _Weights(NamedTuple):
    """Names of one layer's and direction's parameters; a bias or projection that the module does not have is None."""

    ih: str
    hh: str
    bias_ih: str | None
    bias_hh: str | None
    hr: str | None  # the LSTM's projection of its output


class _RecurrentLayer(KroneckerLayer):
    needs_own_pass = True

    @abstractmethod
    def _weights(self) -> list[_Weights]:
        """Of every layer and direction, in the order of the module's hidden states."""

    def _get(self, name: str | None) -> nn.Parameter | None:
        return None if name is None else getattr(self.module, name)

    def make_blocks(self) -> Sequence[KroneckerBlock]:
        blocks = []
        for names in self._weights():
            for weight, bias in ((names.ih, names.bias_ih), (names.hh, names.bias_hh), (names.hr, None)):
                if weight is None:
                    continue
                g, a = getattr(self.module, weight).shape
                covered = (weight,) if bias is None else (weight, bias)
                blocks.append(KroneckerBlock(covered, weight, a + (bias is not None), g, bias is not None))
        return blocks

    def matrices(self, values: Mapping[str, Tensor]) -> Sequence[Gradient]:
        given = [[values[name] for name in block.parameters] for block in self.blocks]
        return [(own[0], own[1]) if len(own) > 1 else own[0] for own in given]


# ---- one step -------------------------------------------------------------------------------------------------------

# From the input's and the hidden state's share of the gates and the state (h, and c of an LSTM) to the next state.
_Step = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _rnn_step(nonlinearity: str) -> _Step:
    function = torch.tanh if nonlinearity == "tanh" else torch.relu
    return lambda x, h, state: (function(x + h),)


def _lstm_step(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
    z = (xz + hz).sigmoid()
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return ((1 - z) * n + z * state[0],)


def _step_of(module: nn.Module) -> _Step:
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return _lstm_step
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        return _gru_step
    return _rnn_step(module.nonlinearity)  # type: ignore[arg-type]


# ---- cells ----------------------------------------------------------------------------------------------------------


@register
class RecurrentCellLayer(_RecurrentLayer):
    """``nn.RNNCell``, ``nn.LSTMCell``, ``nn.GRUCell``."""

    kinds = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)

    def _weights(self) -> list[_Weights]:
        names = ("bias_ih", "bias_hh") if self.module.bias else (None, None)
        return [_Weights("weight_ih", "weight_hh", names[0], names[1], None)]

    def forward_in_parts(self, note: Note) -> Callable[..., Any]:
        m = self.module
        step = _step_of(m)
        lstm = isinstance(m, nn.LSTMCell)

        def forward(input: Tensor, hx: Any = None) -> Any:  # torch's names
            if hx is None:
                zeros = input.new_zeros(*input.shape[:-1], m.hidden_size)
                hx = (zeros, zeros) if lstm else zeros
            state = tuple(hx) if lstm else (hx,)
            x = F.linear(input, m.weight_ih, m.bias_ih)
            h = F.linear(state[0], m.weight_hh, m.bias_hh)
            note(0, input, x)
            note(1, state[0], h)
            state = step(x, h, state)
            return state if lstm else state[0]

        return forward


# ---- modules over sequences -----------------------------------------------------------------------------------------


@register
class RecurrentLayer(_RecurrentLayer):
    """``nn.RNN``, ``nn.LSTM`` with or without projection, ``nn.GRU``; any depth, both directions, packed sequences."""

    kinds = (nn.RNN, nn.LSTM, nn.GRU)

    def _weights(self) -> list[_Weights]:
        m = self.module
        result = []
        for layer in range(m.num_layers):
            for direction in ("", "_reverse")[: 1 + m.bidirectional]:
                end = f"_l{layer}{direction}"
                names = [f"{name}{end}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")]
                ih, hh, bias_ih, bias_hh, hr = names
                result.append(
                    _Weights(
                        ih, hh, bias_ih if m.bias else None, bias_hh if m.bias else None, hr if m.proj_size else None
                    )
                )
        return result

    def forward_in_parts(self, note: Note) -> Callable[..., Any]:
        m = self.module

        def forward(input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:  # torch's names
            sequence = _Sequence(input, m.batch_first)
            states = self._first_states(sequence, hx)
            x = sequence.data
            last: list[tuple[Tensor, ...]] = []
            directions = 1 + m.bidirectional
            for layer in range(m.num_layers):
                outputs = []
                for direction in range(directions):
                    index = layer * directions + direction
                    y, end = self._run(index, x, sequence.sizes, states[index], direction == 1, note)
                    outputs.append(y)
                    last.append(end)
                x = torch.cat(outputs, -1)
                if layer < m.num_layers - 1:
                    x = F.dropout(x, m.dropout, m.training)
            stacked = tuple(sequence.restore_states(torch.stack(parts)) for parts in zip(*last, strict=True))
            return sequence.restore(x), stacked if isinstance(m, nn.LSTM) else stacked[0]

        return forward

    def _first_states(self, sequence: _Sequence, hx: Any) -> list[tuple[Tensor, ...]]:
        m = self.module
        count = m.num_layers * (1 + m.bidirectional)
        lstm = isinstance(m, nn.LSTM)
        if hx is None:
            sizes = (m.proj_size or m.hidden_size, m.hidden_size) if lstm else (m.hidden_size,)
            return [tuple(sequence.data.new_zeros(sequence.sizes[0], size) for size in sizes)] * count
        given = [sequence.order_states(h) for h in (hx if lstm else (hx,))]
        return [tuple(h[i] for h in given) for i in range(count)]

    def _run(
        self, index: int, x: Tensor, sizes: list[int], state: tuple[Tensor, ...], reverse: bool, note: Note
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One layer in one direction over a packed sequence: its outputs, and the last state of every example."""
        names = self._weights()[index]
        block = index * (2 if names.hr is None else 3)
        weight_hh, bias_hh, weight_hr = self._get(names.hh), self._get(names.bias_hh), self._get(names.hr)
        assert weight_hh is not None
        step = _step_of(self.module)
        gates = F.linear(x, self._get(names.ih), self._get(names.bias_ih))  # type: ignore[arg-type]
        note(block, x, gates)
        # One tensor of zeros, added step by step, has the gradients of all steps' products.
        probe = gates.new_zeros(len(x), len(weight_hh), requires_grad=True)
        projected = None if weight_hr is None else gates.new_zeros(len(x), len(weight_hr), requires_grad=True)
        times = range(len(sizes))
        gates_at, probe_at = gates.split(sizes), probe.split(sizes)
        projected_at = () if projected is None else projected.split(sizes)
        first = state
        size = sizes[-1] if reverse else sizes[0]
        state = tuple(s[:size] for s in first)
        outputs: dict[int, Tensor] = {}
        inputs: dict[int, Tensor] = {}  # of the hidden-to-hidden product
        hidden: dict[int, Tensor] = {}  # before the projection
        ended: list[tuple[Tensor, ...]] = []  # states of sequences that are over, the shortest first
        for t in reversed(times) if reverse else times:
            if sizes[t] > size:  # backwards, the longest sequences are there first
                state = tuple(torch.cat([s, f[size : sizes[t]]]) for s, f in zip(state, first, strict=True))
            elif sizes[t] < size:
                ended.append(tuple(s[sizes[t] :] for s in state))
                state = tuple(s[: sizes[t]] for s in state)
            size = sizes[t]
            inputs[t] = state[0]
            state = step(gates_at[t], F.linear(state[0], weight_hh, bias_hh) + probe_at[t], state)
            if weight_hr is not None:
                hidden[t] = state[0]
                state = (F.linear(state[0], weight_hr) + projected_at[t], *state[1:])
            outputs[t] = state[0]
        ended.append(state)
        note(block + 1, torch.cat([inputs[t] for t in times]), probe)
        if projected is not None:
            note(block + 2, torch.cat([hidden[t] for t in times]), projected)
        end = tuple(torch.cat(parts) for parts in zip(*reversed(ended), strict=True))
        return torch.cat([outputs[t] for t in times]), end


class _Sequence:
    """A recurrent module's input in packed form: the examples that reach time t, for t = 0, 1, …, one after another."""

    def __init__(self, given: Tensor | PackedSequence, batch_first: bool) -> None:
        self._given = given
        self._batch_first = batch_first
        if isinstance(given, PackedSequence):
            self.data = given.data
            self.sizes: list[int] = given.batch_sizes.tolist()
            return
        x = given.unsqueeze(1) if given.ndim == 2 else given.transpose(0, 1) if batch_first else given
        self.sizes = [x.shape[1]] * x.shape[0]
        self.data = x.reshape(-1, x.shape[-1])

    def restore(self, data: Tensor) -> Tensor | PackedSequence:
        """Outputs in the form of the input."""
        given = self._given
        if isinstance(given, PackedSequence):
            return PackedSequence(data, given.batch_sizes, given.sorted_indices, given.unsorted_indices)
        y = data.view(len(self.sizes), self.sizes[0], data.shape[-1])
        return y.squeeze(1) if given.ndim == 2 else y.transpose(0, 1) if self._batch_first else y

    def order_states(self, h: Tensor) -> Tensor:
        """States ``[…, N, d]`` as given, in the order of the packed examples."""
        if not isinstance(self._given, PackedSequence):
            return h.unsqueeze(1) if h.ndim == 2 else h
        return h if self._given.sorted_indices is None else h.index_select(1, self._given.sorted_indices)

    def restore_states(self, h: Tensor) -> Tensor:
        """The other way."""
        if not isinstance(self._given, PackedSequence):
            return h.squeeze(1) if self._given.ndim == 2 else h
        return h if self._given.unsorted_indices is None else h.index_select(1, self._given.unsorted_indices)
