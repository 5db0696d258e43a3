"""What a forward pass of the model leaves behind, and what receives the statistics."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from torch.autograd.graph import GradientEdge

from .chain import Trace
from .kept import Awaited
from .layers import Inputs
from .passes import ModelInputs
from .sequence import Kept


@dataclass(eq=False)
class Pass:
    """One gradient sent through the network: what it brings to different layers belongs to the same examples.

    Attributes:
        uses: Layer and block of every call in the forward pass, in order; a module called twice is there twice.
        examples: Their number, the first dimension of the outputs.
        first: Whether no other gradient was sent through the same forward pass before, so that the inputs are new.
    """

    uses: list[tuple[int, int]]
    examples: int = 0
    first: bool = True

    def count(self, layer: int, block: int) -> int:
        """How often a block was used."""
        return self._counts[layer, block]

    @functools.cached_property
    def _counts(self) -> Counter[tuple[int, int]]:
        return Counter(self.uses)


class Sink(Protocol):
    """What receives the statistics."""

    def begin(self) -> None:
        """The user's backward pass begins to bring statistics."""

    def wants_statistics(self) -> bool:
        """Whether the coming forward pass should be looked at."""

    def add_rows(self, layer: int, inputs: Inputs, gradient: Tensor, sent: Pass, block: int = 0) -> None:
        """One call of a layer: its inputs, and the gradient that a pass sent to its output.

        ``block`` is the first of the layer's blocks that the rows are for.
        """

    def add_terms(self, terms: Tensor) -> None:
        """The number of loss terms, a 0-d tensor, of the gradients that were just given."""

    def drop(self) -> None:
        """Forgets all rows and terms that have not been committed."""


@dataclass
class Call:
    """One use of a layer.

    Attributes:
        layer: Its number.
        inputs: What the layer's rows are made from.
        edge: Where the gradient of its output arrives; None: its gradient is the one that is sent.
        block: The first of the layer's blocks that the rows are for.
        reached: Whether a gradient came.
    """

    layer: int
    inputs: Inputs | Awaited
    edge: GradientEdge | None
    block: int = 0
    reached: bool = False


@dataclass(eq=False)
class Tape:
    """The calls of one forward pass of the model.

    Attributes:
        inputs: What the model was called with.
        statistics: Whether statistics are taken from this pass.
        notes: Whether calls are noted.
        listens: Whether gradients are taken from the user's own backward pass (the empirical Fisher).
        calls: In the order in which the layers ran; empty where it listens.
        elements: Of all outputs in ``calls``.
        hidden: Calls of every layer without a graph: frozen in passing, or inside a reentrant checkpoint.
        recomputes: Whether a backward pass may run parts of the model again (non-reentrant checkpoints).
        once: Whether the graph allows a single backward pass (selective checkpoints).
        reached: Layers that gradients came to.
        awaiting: Inputs that the user's own backward pass, where it listens, has brought a gradient for.
        user: The user's own backward pass, where it listens.
        sent: How many gradients were sent to the calls so far.
        counted: Loss terms that backward passes so far have counted; None before the first.
        closed: Later backward passes are not looked at.
        trace: Notes where inputs and outputs come from; calls are then not noted.
        kept: What modules computed, where that saves another pass.
    """

    inputs: ModelInputs
    statistics: bool
    notes: bool
    listens: bool = False
    calls: list[Call] = field(default_factory=list)
    elements: int = 0
    hidden: dict[int, int] = field(default_factory=dict)
    recomputes: bool = False
    once: bool = False
    reached: set[int] = field(default_factory=set)
    awaiting: list[Awaited] = field(default_factory=list)
    user: Pass = field(default_factory=lambda: Pass([]))
    sent: int = 0
    counted: Tensor | None = None
    closed: bool = False
    trace: Trace | None = None
    kept: Kept | None = None

    def called(self) -> list[int]:
        """The layer of every call that was noted."""
        return [call.layer for call in self.calls] + [layer for layer, _ in self.user.uses]

    def give_up(self) -> None:
        """Stops waiting for inputs: the user's pass has ended, and what it did not go through takes no part in it."""
        for inputs in self.awaiting:
            inputs.give_up()
        self.awaiting.clear()

    def close(self) -> None:
        """Forgets the calls and what was kept."""
        self.closed = True
        self.calls = []
        self.kept = None

    def cut_own_edges(self, outputs: Tensor) -> None:
        """Marks calls whose output is what the outputs' gradient is sent to: they get that gradient itself.

        A hook must not hold the edge of the tensor it is on: that cycle runs through C++ and is never collected.
        """
        kept = []
        for call in self.calls:
            if call.edge is not None and call.edge.node is outputs.grad_fn:
                if call.edge.output_nr != outputs.output_nr:
                    continue  # another result of the last operation, which the outputs do not depend on
                call.edge = None
            kept.append(call)
        self.calls = kept

    def take_hidden(self, layer: int, output: Any) -> bool:
        """Whether this is a call without a graph that is made again, with one, by the user's backward pass.

        Raises:
            RuntimeError: It is, and no extra pass can reach it.
        """
        if not self.hidden.get(layer) or not isinstance(output, Tensor) or output.grad_fn is None:
            return False
        if not self.listens:
            raise RuntimeError(REENTRANT)
        self.hidden[layer] -= 1
        return True


@dataclass(frozen=True)
class Batch:
    """A forward pass that was followed by a backward pass.

    Attributes:
        inputs: Of the model.
        counted: Which loss terms count, in the shape of the likelihood's terms.
        kept: What modules computed, where that saves another pass.
        outputs: Detached; None where nobody will look at them.
        gradient: Of the user's loss with respect to the outputs; None with them.
    """

    inputs: ModelInputs
    counted: Tensor
    kept: Kept | None = None
    outputs: Tensor | None = None
    gradient: Tensor | None = None

    def plus(self, other: Batch) -> Batch:
        """With another backward pass from the same outputs."""
        both = None if self.gradient is None or other.gradient is None else self.gradient + other.gradient
        return Batch(self.inputs, self.counted | other.counted, self.kept, self.outputs, both)


ONCE = (
    "selective activation checkpointing (context_fn) allows one backward pass through a forward pass, and "
    "fisher='exact' needs several: take fisher='mc' or 'empirical'"
)

REENTRANT = (
    "reentrant activation checkpointing runs layers where no extra backward pass can reach them: pass "
    "use_reentrant=False to torch.utils.checkpoint, or take fisher='empirical'"
)
