"""What a forward pass of the model leaves behind, and the extra pass that sends gradients to it from the outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .chain import Trace
from .layers import Inputs
from .likelihoods import Likelihood
from .passes import ModelInputs


@dataclass(eq=False)
class Pass:
    """One gradient sent through the network: what it brings to different layers belongs to the same examples.

    Attributes:
        layers: The layer of every call in the forward pass, in order; a module called twice is there twice.
        examples: Their number, the first dimension of the outputs.
        first: Whether no other gradient was sent through the same forward pass before, so that the inputs are new.
    """

    layers: list[int]
    examples: int = 0
    first: bool = True


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
    """

    layer: int
    inputs: Inputs
    edge: GradientEdge | None
    block: int = 0


@dataclass(eq=False)
class Tape:
    """The calls of one forward pass of the model.

    Attributes:
        inputs: What the model was called with.
        statistics: Whether statistics are taken from this pass.
        notes: Whether calls are noted.
        calls: In the order in which the layers ran.
        sent: How many gradients were sent to the calls so far.
        user: The user's own backward pass, for the empirical Fisher.
        counted: Loss terms that backward passes so far have counted; None before the first.
        closed: Later backward passes are not looked at.
        trace: Notes where inputs and outputs come from; calls are then not noted.
    """

    inputs: ModelInputs
    statistics: bool
    notes: bool
    calls: list[Call] = field(default_factory=list)
    sent: int = 0
    user: Pass = field(default_factory=lambda: Pass([]))
    counted: Tensor | None = None
    closed: bool = False
    trace: Trace | None = None

    def close(self) -> None:
        """Forgets the calls."""
        self.closed = True
        self.calls = []

    def cut_own_edges(self, outputs: Tensor) -> None:
        """Marks calls whose output is what the outputs' gradient is sent to: they get that gradient itself.

        A hook must not hold the edge of the tensor it is on: that cycle runs through C++ and is never collected.
        """
        for call in self.calls:
            if call.edge is not None and call.edge.node is outputs.grad_fn:
                call.edge = None


@dataclass(frozen=True)
class Batch:
    """A forward pass that was followed by a backward pass.

    Attributes:
        inputs: Of the model.
        counted: Which loss terms count, in the shape of the likelihood's terms.
        outputs: Detached.
        gradient: Of the user's loss with respect to the outputs.
    """

    inputs: ModelInputs
    counted: Tensor
    outputs: Tensor
    gradient: Tensor

    def plus(self, other: Batch) -> Batch:
        """With another backward pass from the same outputs."""
        return Batch(self.inputs, self.counted | other.counted, self.outputs, self.gradient + other.gradient)


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

    def send(
        self, tape: Tape, source: Tensor | GradientEdge, outputs: Tensor, gradient: Tensor, counted: Tensor
    ) -> None:
        """The extra pass: from the outputs to the output edge of every call.

        Args:
            tape: Where to.
            source: The outputs, or their edge, in the graph of the tape's calls.
            outputs: Their values.
            gradient: The user's, of the outputs; used by "empirical" alone.
            counted: Which loss terms count.
        """
        calls = tape.calls
        layers = [call.layer for call in calls]
        edges = [call.edge for call in calls if call.edge is not None]
        mask = self._likelihood.spread(counted)
        for root in self._roots(outputs, gradient):
            root = torch.where(mask, root, torch.zeros_like(root))
            found = iter(
                torch.autograd.grad(source, edges, root, retain_graph=True, allow_unused=True) if edges else ()
            )
            sent = Pass(layers, len(outputs), first=tape.sent == 0)
            tape.sent += 1
            for call in calls:
                arrived = root if call.edge is None else next(found)
                if arrived is not None:  # None: the outputs do not depend on this call
                    self._sink.add_rows(call.layer, call.inputs, arrived, sent, call.block)

    def _roots(self, outputs: Tensor, gradient: Tensor) -> Iterator[Tensor]:
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
