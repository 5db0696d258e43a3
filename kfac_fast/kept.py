"""Which tensor autograd keeps for a layer's input: what is taken from there need not be held.

Where a non-reentrant checkpoint, or hooks of the user, pack what autograd saves, an input that is held would be there
in spite of them. `Watch` notes there what is saved for a layer, whose inputs are `Awaited`: they come whenever
a backward pass goes through the layer, which unpacks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge, saved_tensors_hooks

from .layers import Inputs
from .passes import packing, saves_are_packed

# Where operations of torch.nn's layers keep their input.
_NAMES = {
    "AddmmBackward0": "_saved_mat1",
    "MmBackward0": "_saved_self",
    "ConvolutionBackward0": "_saved_input",
    "NativeLayerNormBackward0": "_saved_input",
    "NativeGroupNormBackward0": "_saved_input",
    "NativeBatchNormBackward0": "_saved_input",
    "CudnnBatchNormBackward0": "_saved_input",
}
_SHAPES = ("ViewBackward0", "UnsafeViewBackward0", "SqueezeBackward1", "UnsqueezeBackward0", "TransposeBackward0")
# What leaves the elements and their order as they were.
_COPIES = {
    "CloneBackward0",
    "SqueezeBackward1",
    "ToCopyBackward0",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
}


def as_kept(inputs: Inputs, output: Tensor) -> Inputs:
    """Inputs of a use, the first of them in the form in which autograd keeps it for the backward pass.

    Looked for under autocast only, right above the output; where it is not found, the inputs are returned as they are.

    Args:
        inputs: As `Layer.inputs` gives them.
        output: Of the same use, with a graph.
    """
    first, *others = inputs
    # Looking at what a checkpoint has packed would run it again.
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type) or saves_are_packed():
        return inputs
    node = output.grad_fn
    while node is not None and node.name() in _SHAPES:
        node = node.next_functions[0][0]
    saved = getattr(node, _NAMES.get(node.name(), ""), None) if node is not None else None
    if saved is None or saved.dtype == first.dtype or saved.numel() != first.numel():
        return inputs
    return (saved.detach().view(first.shape), *others)


class Awaited:
    """Inputs of a use, some of which come whenever a backward pass goes through the module.

    Args:
        inputs: As `Layer.inputs` gives them, without the awaited tensors.
        shapes: Of the awaited tensors, by their place in ``inputs``.
        below: Where the gradients of the awaited tensors go; a pass to there goes through the module.
    """

    def __init__(self, inputs: Inputs, shapes: dict[int, torch.Size], below: list[GradientEdge]) -> None:
        self.below = below
        self._inputs = inputs
        self._shapes = shapes
        self._came: dict[int, Tensor] = {}
        self._then: Callable[[Inputs], None] | None = None

    def then(self, function: Callable[[Inputs], None]) -> None:
        """Calls the function with the inputs as soon as they come. What comes while nobody waits is not looked at."""
        self._came, self._then = {}, function

    def receive(self, place: int, value: Tensor) -> None:
        """A tensor has come."""
        if self._then is None:
            return
        self._came[place] = value.detach().reshape(self._shapes[place])
        if len(self._came) == len(self._shapes):
            function, inputs = self._then, tuple(self._came.get(i, x) for i, x in enumerate(self._inputs))
            self.give_up()
            function(inputs)

    @property
    def waits(self) -> bool:
        return self._then is not None

    def give_up(self) -> None:
        """Stops waiting."""
        self._came, self._then = {}, None


@dataclass
class _Saved:
    """A tensor that autograd saves: as it was packed, what unpacks it, and who awaits it at which place."""

    packed: Any
    unpack: Callable[[Any], Tensor]
    awaited: list[tuple[Awaited, int]] = field(default_factory=list)


class Watch:
    """While it lasts, notes what autograd saves, which is packed as it would have been.

    Args:
        pack: The hooks that are there.
        unpack: The same.
    """

    def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        self._pack = pack
        self._unpack = unpack
        self._noted: list[tuple[Tensor, _Saved]] = []
        self._hooks = saved_tensors_hooks(self._note, _unpack)
        self._hooks.__enter__()

    @classmethod
    def begin(cls) -> Watch | None:
        """None where nothing is packed: there autograd holds a layer's input itself."""
        hooks = packing()
        return None if hooks is None else cls(*hooks)

    def end(self) -> None:
        self._noted.clear()
        self._hooks.__exit__()

    def inputs(self, inputs: Inputs, arguments: Iterable[Any]) -> Inputs | Awaited:
        """The inputs of a use that has just been made, without the tensors that autograd saved for it.

        Args:
            inputs: As `Layer.inputs` gives them.
            arguments: Of the use, with their graph. One without a graph is held: it is the user's, as a rule.
        """
        given = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
        found: dict[int, tuple[GradientEdge, _Saved]] = {}
        for place, x in enumerate(inputs):
            argument = next((a for a in given if isinstance(x, Tensor) and _is_same(a, x)), None)
            if argument is not None:
                edge = get_gradient_edge(argument)
                saved = next((s for t, s in self._noted if t.numel() == x.numel() and _is_copy(t, edge)), None)
                if saved is not None:
                    found[place] = edge, saved
        if not found:
            return inputs
        awaited = Awaited(
            tuple(None if i in found else x for i, x in enumerate(inputs)),
            {i: inputs[i].shape for i in found},
            [edge for edge, _ in found.values()],
        )
        for place, (_, saved) in found.items():
            saved.awaited.append((awaited, place))
        return awaited

    def _note(self, tensor: Tensor) -> _Saved:
        saved = _Saved(self._pack(tensor), self._unpack)
        self._noted.append((tensor, saved))
        return saved


def _unpack(saved: _Saved) -> Tensor:
    value = saved.unpack(saved.packed)
    for awaited, place in saved.awaited:
        awaited.receive(place, value)
    return value


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same place."""
    return one.layout == other.layout == torch.strided and one.device == other.device and one.is_set_to(other)


def _is_copy(tensor: Tensor, edge: GradientEdge) -> bool:
    """Whether a tensor is, or was made as a copy, view or cast of, the tensor whose gradient goes to the edge."""
    if not tensor.requires_grad:
        return False
    node: Node | None
    node, number = get_gradient_edge(tensor)[:2]
    while node is not None and (node is not edge.node or number != edge.output_nr):
        if node.name() not in _COPIES:
            return False
        node, number = node.next_functions[0]
    return node is not None
