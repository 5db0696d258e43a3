"""`Sender`: the extra backward pass, from the outputs to the output of every call on a tape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .kept import Awaited
from .layers import Layer
from .likelihoods import Likelihood
from .sequence import Values
from .tape import ONCE, Call, Pass, Sink, Tape

# With more elements than this in the gradients of all calls (32 MB in float32), they are not kept until all are there.
ELEMENTS_AT_ONCE = 2**23


class Sender:
    """Sends output gradients whose second moment is the Fisher of the outputs to the calls of a tape.

    Args:
        likelihood: What the outputs mean.
        fisher: "mc", "exact" or "empirical".
        sink: Receives the rows.
        generators: Called with a device, gives the generator for sampled targets.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        fisher: str,
        sink: Sink,
        generators: Callable[[torch.device], torch.Generator],
    ) -> None:
        self._likelihood = likelihood
        self._fisher = fisher
        self._sink = sink
        self._generators = generators
        # Calls that had to be asked for, since no other one is below: layer, block, and number among its calls.
        self._lowest: set[tuple[int, int, int]] = set()

    def send(
        self, tape: Tape, source: Tensor | GradientEdge, outputs: Tensor, gradient: Tensor, counted: Tensor
    ) -> None:
        """Sends all of them.

        Args:
            tape: Where to.
            source: The outputs, or their edge, in the graph of the tape's calls.
            outputs: Their values.
            gradient: The user's, of the outputs; used by "empirical" alone.
            counted: Which loss terms count.
        """
        uses = [(call.layer, call.block) for call in tape.calls]
        awaits = any(isinstance(call.inputs, Awaited) for call in tape.calls)
        for root in self._roots(outputs, gradient, counted):
            if tape.once and tape.sent > 0:
                raise RuntimeError(ONCE)
            sent = Pass(uses, len(outputs), first=tape.sent == 0)
            tape.sent += 1
            for call in tape.calls:
                if call.edge is None:
                    self._add(call, sent, root)
            below = [call for call in tape.calls if call.edge is not None or isinstance(call.inputs, Awaited)]
            if below and tape.elements <= ELEMENTS_AT_ONCE and not awaits:
                self._collect(below, source, root, sent)
            elif below:
                self._stream(below, source, root, sent, all_at_once=tape.once)
        tape.reached |= {call.layer for call in tape.calls if call.reached}

    @torch.no_grad()
    def send_along(
        self, values: Values, layers: Mapping[int, tuple[int, Layer]], gradient: Tensor, counted: Tensor
    ) -> None:
        """Sends all of them along a sequence of modules, for which no graph is needed.

        Args:
            values: What the modules computed.
            layers: Number and layer, by position of its module.
            gradient: As in `send`.
            counted: As in `send`.
        """
        uses = [(layers[position][0], 0) for position in sorted(layers)]
        inputs = {position: layer.inputs((values[position],), {}) for position, (_, layer) in layers.items()}
        for number, root in enumerate(self._roots(values.outputs, gradient, counted)):
            sent = Pass(uses, len(root), first=number == 0)
            for position, own in values.pull_back(root, min(layers)):
                if position in layers:
                    self._sink.add_rows(layers[position][0], inputs[position], own, sent)

    def _add(self, call: Call, sent: Pass, gradient: Tensor | None) -> None:
        if gradient is None:  # the outputs do not depend on this call
            return
        call.reached = True
        if isinstance(call.inputs, Awaited):
            call.inputs.then(lambda inputs: self._sink.add_rows(call.layer, inputs, gradient, sent, call.block))
        else:
            self._sink.add_rows(call.layer, call.inputs, gradient, sent, call.block)

    def _collect(self, calls: list[Call], source: Tensor | GradientEdge, root: Tensor, sent: Pass) -> None:
        """All gradients at once: the least work per call."""
        edges = [call.edge for call in calls if call.edge is not None]
        found = torch.autograd.grad(source, edges, root, retain_graph=True, allow_unused=True)
        for call, gradient in zip(calls, found, strict=True):
            self._add(call, sent, gradient)

    def _stream(
        self, calls: list[Call], source: Tensor | GradientEdge, root: Tensor, sent: Pass, *, all_at_once: bool
    ) -> None:
        """Every gradient when the pass comes by, so that no more of them are alive than in any backward pass.

        autograd keeps what it is asked for until the end, so only the lowest calls are asked for. Which these are is
        found out once: nothing is below the earliest of the calls that a pass did not come by. A pass brings the
        inputs that a call awaits when it goes through the module: there what is below is asked for.
        """
        passed_by = {i for i, call in enumerate(calls) if call.edge is None}

        def add(position: int, gradient: Tensor | None) -> None:
            if position not in passed_by:
                passed_by.add(position)
                self._add(calls[position], sent, gradient)

        def come_by(position: int, number: int, gradients: tuple[Tensor | None, ...]) -> None:
            add(position, gradients[number])

        handles = [
            call.edge.node.register_prehook(partial(come_by, i, call.edge.output_nr))
            for i, call in enumerate(calls)
            if call.edge is not None
        ]
        keys = _keys(calls)
        asked = [i for i, key in enumerate(keys) if i == 0 or key in self._lowest or all_at_once]
        left = list(range(len(calls)))
        try:
            while asked:
                pairs = [(i, edge) for i in asked for edge in _targets(calls[i])]
                edges = [edge for _, edge in pairs]
                found = torch.autograd.grad(source, edges, root, retain_graph=True, allow_unused=True)
                for (i, edge), gradient in zip(pairs, found, strict=True):
                    if edge is calls[i].edge:
                        add(i, gradient)
                if len(asked) == 1 and any(gradient is not None for gradient in found):
                    self._lowest.add(keys[asked[0]])
                left = [i for i in left if i not in asked and (i not in passed_by or _waits(calls[i]))]
                asked = left[:1]
            if any(map(_waits, calls)):
                raise RuntimeError("a backward pass did not unpack the input of a layer that it went through")
        finally:
            for handle in handles:
                handle.remove()
            for call in calls:
                if isinstance(call.inputs, Awaited):
                    call.inputs.give_up()

    def _roots(self, outputs: Tensor, gradient: Tensor, counted: Tensor) -> Iterator[Tensor]:
        """`_all_roots`, zero where a loss term does not count."""
        mask = self._likelihood.spread(counted)
        for root in self._all_roots(outputs, gradient):
            yield torch.where(mask, root, torch.zeros_like(root))

    def _all_roots(self, outputs: Tensor, gradient: Tensor) -> Iterator[Tensor]:
        """Output gradients whose outer products sum (exact) or average (mc) to the Fisher of the outputs."""
        if self._fisher == "empirical":
            yield gradient
            return
        if self._fisher == "mc":
            yield self._likelihood.sample_gradient(outputs, self._generators(outputs.device))
            return
        # Positions of one example (pixels, tokens) may share rows below, where their gradients must not mix: one at a
        # time. Examples do not mix.
        shape = self._likelihood.terms_shape(outputs)
        positions = torch.Size(shape[1:]).numel()
        for v in self._likelihood.fisher_root(outputs):
            for position in range(positions):
                if positions == 1:
                    yield v
                    continue
                only = torch.zeros(positions, dtype=torch.bool, device=v.device)
                only[position] = True
                only = only.view(shape[1:]).expand(shape)
                yield torch.where(self._likelihood.spread(only), v, torch.zeros_like(v))


def _keys(calls: list[Call]) -> list[tuple[int, int, int]]:
    """What tells the calls of a forward pass apart: layer, block, and number among the calls of these."""
    seen: Counter[tuple[int, int]] = Counter()
    keys = []
    for call in calls:
        own = call.layer, call.block
        keys.append((*own, seen[own]))
        seen[own] += 1
    return keys


def _targets(call: Call) -> list[GradientEdge]:
    """What is asked for so that a pass brings what a call needs."""
    if isinstance(call.inputs, Awaited):
        return call.inputs.below
    assert call.edge is not None
    return [call.edge]


def _waits(call: Call) -> bool:
    return isinstance(call.inputs, Awaited) and call.inputs.waits
