"""How layers feed each other, read from the autograd graph of one forward pass, and whether they are a chain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge


@dataclass(frozen=True)
class TracedCall:
    """One call of a layer.

    Attributes:
        layer: Its number.
        shape: Of its input.
        source: Where its input comes from; None if from nothing that requires a gradient.
        output: Where its output comes from.
    """

    layer: int
    shape: tuple[int, ...]
    source: Node | None
    output: Node


@dataclass
class Trace:
    """The calls of one forward pass whose inputs required gradients, in order.

    Attributes:
        inputs: The model's floating-point inputs, leaves of the graph.
        calls: Of the layers.
        outputs: Where the model's outputs come from.
    """

    inputs: list[Tensor] = field(default_factory=list)
    calls: list[TracedCall] = field(default_factory=list)
    outputs: Node | None = None

    def note(self, layer: int, inputs: Tensor, output: Tensor) -> None:
        """Called right after a layer, before anything can work in place on its output."""
        source = get_gradient_edge(inputs).node if inputs.requires_grad else None
        self.calls.append(TracedCall(layer, tuple(inputs.shape), source, get_gradient_edge(output).node))


class NotAChainError(ValueError):
    """The layers are not a chain; the message says where."""


def chain_of(trace: Trace, names: Sequence[str]) -> list[int]:
    """The layers in the order in which each is fed by the one before.

    Args:
        trace: Of the model.
        names: Of the layers by their number; calls of later ones are looked through.

    Raises:
        NotAChainError: A layer was called not once, has another source than one layer, feeds several, has other
            positions than the next one, or the outputs depend on more than the last.
    """
    calls = [call for call in trace.calls if call.layer < len(names)]
    uses = Counter(call.layer for call in calls)
    for layer, name in enumerate(names):
        if uses[layer] != 1:
            times = "not called" if not uses[layer] else f"called {uses[layer]} times"
            raise NotAChainError(f"layer {name} was {times} in the forward pass")
    inputs = {id(x) for x in trace.inputs}
    layer_of = {call.output: call.layer for call in calls}
    order: list[int] = []
    for call in calls:
        name = names[call.layer]
        sources, fed_by_input = _sources(call.source, layer_of, inputs)
        if not order:  # no layer came before, so it can have no layer as source
            order.append(call.layer)
            continue
        feeders = [names[i] for i in sorted(sources)] + (["the model's input"] if fed_by_input else [])
        if sources != {order[-1]} or fed_by_input:
            raise NotAChainError(
                f"layer {name} is fed by {' and '.join(feeders) or 'no other layer'}, not by {names[order[-1]]} alone"
            )
        order.append(call.layer)
    for before, after in pairwise(calls):
        if before.shape[:-1] != after.shape[:-1]:
            raise NotAChainError(
                f"layer {names[before.layer]} has inputs of shape {before.shape}, layer {names[after.layer]} of shape "
                f"{after.shape}: their rows do not belong together"
            )
    at_outputs, _ = _sources(trace.outputs, layer_of, inputs)
    if order and at_outputs != {order[-1]}:
        feeders = [names[i] for i in sorted(at_outputs)]
        raise NotAChainError(f"the outputs depend on {' and '.join(feeders)}, not on {names[order[-1]]} alone")
    return order


def _sources(start: Node | None, layer_of: dict[Node, int], inputs: Iterable[int]) -> tuple[set[int], bool]:
    """The layers whose outputs are reached first on the way back from a node, and whether a model input is reached."""
    found: set[int] = set()
    fed_by_input = False
    seen: set[Any] = set()
    stack = [] if start is None else [start]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in layer_of:
            found.add(layer_of[node])
            continue
        variable = getattr(node, "variable", None)  # of a leaf
        fed_by_input |= variable is not None and id(variable) in inputs
        stack += [following for following, _ in node.next_functions if following is not None]
    return found, fed_by_input
