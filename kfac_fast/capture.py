"""The only hooks of the package: pairs the inputs of every supported module with its output gradients.

How one forward and backward pass is seen (fisher = "mc" or "exact"):

1. Forward hooks on the supported modules note each call's input and the *gradient edge* of its output. An edge stays
   right when an activation later works in place, and a module that is called twice simply has two calls.
2. The model's own forward hook finds the output tensor and asks for its gradient. If no backward pass comes, nothing
   more happens and the notes die with the graph.
3. When the user's backward pass reaches the outputs, before anything below them is freed, the gradient of the
   log-likelihood at *sampled* targets is sent from there to all noted edges: an extra pass that touches no parameter
   gradient, whatever the scale of the user's loss. Loss terms with an exactly zero gradient were ignored by the user's
   loss and do not count.

With a fraction below 1 only the model's inputs are noted in forward, and step 3 runs the model again on that part of
the batch (sec. 8 of the paper uses 1/8), with buffers and random generators restored: statistics then cost a fraction
of a pass instead of a whole one.

With fisher = "empirical" the gradients of the user's own pass are taken, by hooks on the modules' outputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .layers import Layer
from .likelihoods import Likelihood
from .passes import ModelInputs, unnoticed

FISHERS = ("mc", "exact", "empirical")


@dataclass(eq=False)
class Pass:
    """One gradient sent through the network: what it brings to different layers belongs to the same examples.

    Attributes:
        layers: The layer of every call in the forward pass, in order; a module called twice is there twice.
        first: Whether no other gradient was sent through the same forward pass before, so that the inputs are new.
    """

    layers: list[int]
    first: bool = True


class Sink(Protocol):
    """What receives the statistics."""

    def wants_statistics(self) -> bool:
        """Whether the coming forward pass should be looked at."""

    def add_rows(self, layer: int, inputs: Tensor, gradient: Tensor, sent: Pass) -> None:
        """One call of a layer: its inputs, and the gradient that a pass sent to its output."""

    def add_terms(self, terms: Tensor) -> None:
        """The number of loss terms, a 0-d tensor, of the gradients that were just given."""


@dataclass
class _Call:
    layer: int
    inputs: Tensor
    edge: GradientEdge | None  # None: its gradient is the one that is sent


@dataclass(eq=False)
class _Tape:
    """The calls of one forward pass of the model."""

    inputs: ModelInputs
    statistics: bool
    calls: list[_Call] = field(default_factory=list)
    sent: Pass = field(default_factory=lambda: Pass([]))  # the user's own backward pass, for the empirical Fisher
    used: bool = False  # a supported module took part


class Capture:
    """Registers the hooks and turns what they see into rows for a `Sink`.

    Args:
        model: The module whose outputs the loss is computed from.
        layers: Supported modules of the model.
        likelihood: What the outputs mean.
        fisher: "mc", "exact" or "empirical".
        fraction: Of the examples of a batch that statistics are taken from, in (0, 1].
        sink: Receives the rows.
        outputs: Finds the output tensor in what the model returns; None accepts a tensor, ``.logits``,
            ``["logits"]`` and a sequence with exactly one floating-point tensor.
        generators: Called with a device, gives the generator for sampled targets.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        likelihood: Likelihood,
        fisher: str,
        fraction: float,
        sink: Sink,
        outputs: Callable[[Any], Tensor] | None,
        generators: Callable[[torch.device], torch.Generator],
    ) -> None:
        self._model = model
        self.likelihood = likelihood
        self._fisher = fisher
        self._fraction = fraction
        self._passes = 0  # made on a fraction of a batch
        self._sink = sink
        self.find_outputs = outputs or _find_outputs
        self._generators = generators
        self._open: _Tape | None = None  # of the forward pass that is running
        self._tapes: weakref.WeakSet[_Tape] = weakref.WeakSet()
        self._in_extra_pass = False
        self._checked_gradient = False
        # Inputs and counted loss terms of the forward passes since `forget` that were followed by a backward pass.
        self.keep_batches = False
        self.batches: list[tuple[ModelInputs, Tensor]] = []
        self._handles = [
            model.register_forward_pre_hook(_Hook(self, Capture._before_model), with_kwargs=True),
            *(
                layer.module.register_forward_hook(_Hook(self, Capture._after_layer, index), with_kwargs=True)
                for index, layer in enumerate(layers)
            ),
            model.register_forward_hook(_Hook(self, Capture._after_model), always_call=True),
        ]

    def close(self) -> None:
        """Removes every hook; forward passes already made are no longer looked at."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    @property
    def closed(self) -> bool:
        return not self._handles

    def forget(self) -> None:
        """Drops the calls of forward passes whose backward pass never came."""
        for tape in list(self._tapes):
            tape.calls.clear()
            tape.used = False
        self._open = None
        self.batches = []

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, forward and backward passes of the model are not looked at."""
        before, self._in_extra_pass = self._in_extra_pass, True
        try:
            yield
        finally:
            self._in_extra_pass = before

    # ---- forward ----------------------------------------------------------------------------------------------------

    def _before_model(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._in_extra_pass:
            return
        self._open = None
        wanted = self._sink.wants_statistics()
        if torch.is_grad_enabled() and (wanted or self.keep_batches):
            self._open = _Tape(ModelInputs(args, kwargs, 0), wanted)

    def _after_layer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tape = self._open
        if tape is None or not (isinstance(output, Tensor) and output.requires_grad):
            return
        tape.used = True
        if not self._in_extra_pass and (self._fraction < 1 or not tape.statistics):
            return
        inputs = args[0] if args else kwargs["input"]
        call = _Call(index, inputs.detach(), get_gradient_edge(output))
        tape.calls.append(call)
        if self._fisher == "empirical":
            rows, sent = call.inputs, tape.sent
            sent.layers.append(index)
            output.register_hook(lambda gradient: self._from_user(index, rows, gradient, sent))

    def _after_model(self, index: int, args: Any, result: Any) -> None:
        if self._in_extra_pass:
            return  # `_run_part` opened the tape and closes it
        tape, self._open = self._open, None
        if tape is None or not tape.used or result is None:
            return
        outputs = self.find_outputs(result)
        self.likelihood.check(outputs)
        if not outputs.requires_grad:
            return
        self._tapes.add(tape)
        tape.inputs = dataclasses.replace(tape.inputs, size=len(outputs))
        number, values = outputs.output_nr, outputs.detach()
        _cut_own_edges(tape.calls, outputs)
        outputs.register_hook(lambda gradient: self._at_outputs(tape, number, values, gradient))

    # ---- backward ---------------------------------------------------------------------------------------------------

    def _from_user(self, layer: int, inputs: Tensor, gradient: Tensor, sent: Pass) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError(_CREATE_GRAPH)
        self._sink.add_rows(layer, inputs, gradient.detach(), sent)

    def _at_outputs(self, tape: _Tape, number: int, outputs: Tensor, gradient: Tensor) -> None:
        if self._in_extra_pass or not tape.used:
            return
        if torch.is_grad_enabled():
            raise RuntimeError(_CREATE_GRAPH)
        gradient = gradient.detach()
        if not self._checked_gradient:
            self._check_gradient(outputs, gradient)
        counted = self._counted(outputs, gradient)
        calls, tape.calls, tape.used = tape.calls, [], False
        if self.keep_batches:
            self.batches.append((tape.inputs, counted))
        if not tape.statistics:
            return
        if self._fisher != "empirical":
            self._in_extra_pass = True
            try:
                if self._fraction < 1:
                    counted = self._run_part(tape.inputs, counted)
                else:
                    self._send(calls, GradientEdge(torch._C._current_autograd_node(), number), outputs, counted)
            finally:
                self._in_extra_pass = False
        self._sink.add_terms(counted.sum())

    def _run_part(self, inputs: ModelInputs, counted: Tensor) -> Tensor:
        """Runs the model on part of the batch and sends the gradients there; which loss terms of it count."""
        if not inputs.divisible:
            raise ValueError(
                f"factor_fraction={self._fraction:g} needs a model input whose first dimension is the batch, like the "
                f"outputs' ({inputs.size}); pass factor_fraction=1"
            )
        part, chosen = inputs.part(self._fraction, self._passes)
        self._passes += 1
        tape = _Tape(part, statistics=True)
        with unnoticed(self._model), torch.enable_grad():
            self._open = tape
            try:
                outputs = self.find_outputs(self._model(*part.args, **part.kwargs))
            finally:
                self._open = None
            _cut_own_edges(tape.calls, outputs)
            counted = counted[chosen]
            self._send(tape.calls, outputs, outputs.detach(), counted)
        return counted

    def _counted(self, outputs: Tensor, gradient: Tensor) -> Tensor:
        """Which loss terms count, in the shape of the terms."""
        used = self.likelihood.per_term((gradient != 0).to(torch.uint8)) != 0
        return used | self.likelihood.determined(outputs)

    def _send(self, calls: list[_Call], source: Tensor | GradientEdge, outputs: Tensor, counted: Tensor) -> None:
        """The extra pass: from the outputs to the output edge of every call."""
        edges = [call.edge for call in calls if call.edge is not None]
        mask = self.likelihood.spread(counted)
        layers = [call.layer for call in calls]
        first = True
        for root in self._roots(outputs):
            sent = Pass(layers, first)
            root = torch.where(mask, root, torch.zeros_like(root))
            found = iter(
                torch.autograd.grad(source, edges, root, retain_graph=True, allow_unused=True) if edges else ()
            )
            for call in calls:
                gradient = root if call.edge is None else next(found)
                if gradient is not None:  # None: the outputs do not depend on this call
                    self._sink.add_rows(call.layer, call.inputs, gradient, sent)
            first = False

    def _roots(self, outputs: Tensor) -> Iterator[Tensor]:
        """Output gradients whose outer products sum (exact) or average (mc) to the Fisher of the outputs."""
        if self._fisher == "mc":
            yield self.likelihood.sample_gradient(outputs, self._generators(outputs.device))
            return
        # Positions of one example (pixels, tokens) may share rows below, where their gradients must not mix: one at a
        # time. Examples do not mix.
        shape = self.likelihood.terms_shape(outputs)
        positions = torch.Size(shape[1:]).numel()
        for v in self.likelihood.fisher_root(outputs):
            for position in range(positions):
                if positions == 1:
                    yield v
                    continue
                only = torch.zeros(positions, dtype=torch.bool, device=v.device)
                only[position] = True
                only = only.view(shape[1:]).expand(shape)
                yield torch.where(self.likelihood.spread(only), v, torch.zeros_like(v))

    def _check_gradient(self, outputs: Tensor, gradient: Tensor) -> None:
        if not bool(gradient.isfinite().all()):
            return  # says nothing; the next one will
        self._checked_gradient = True
        fits = self.likelihood.gradient_fits(outputs, gradient)
        if fits is not None and not bool(fits):
            raise ValueError(
                f"the loss is not the negative log-likelihood of {self.likelihood!r}: its gradient with respect to "
                f"outputs of shape {tuple(outputs.shape)} does not sum to zero over the classes. Pass "
                "likelihood=Categorical(class_dim=…) if the classes are elsewhere, likelihood='bernoulli' for binary "
                "targets, 'gaussian' for regression"
            )


def _cut_own_edges(calls: list[_Call], outputs: Tensor) -> None:
    """Marks calls whose output is what the outputs' gradient is sent to: they get that gradient itself.

    A hook must not hold the edge of the tensor it is on: that cycle runs through C++ and is never collected.
    """
    for call in calls:
        if call.edge is not None and call.edge.node is outputs.grad_fn:
            call.edge = None


class _Hook:
    """A hook that dies with its `Capture`, and that copies of the model do not carry on.

    A deepcopied or unpickled model (EMA, SWA) has modules that are not the optimizer's; the copy of the hook removes
    itself when it is first called.
    """

    __slots__ = ("_capture", "_handler", "_index")

    def __init__(self, capture: Capture | None, handler: Callable[..., None] | None = None, index: int = -1) -> None:
        self._capture = None if capture is None else weakref.ref(capture)
        self._handler = handler
        self._index = index

    def __call__(self, module: nn.Module, *arguments: Any) -> None:
        capture = None if self._capture is None else self._capture()
        if capture is None:
            self._remove_from(module)
        elif self._handler is not None:
            self._handler(capture, self._index, *arguments)

    def _remove_from(self, module: nn.Module) -> None:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> Any:
        return _Hook, (None,)


_CREATE_GRAPH = (
    "K-FAC statistics cannot be gathered in a backward pass with create_graph=True. Take higher-order gradients in a "
    "forward pass of their own, on a step without statistics (factor_every > 1) or after opt.close()"
)


def _find_outputs(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    logits = result.get("logits") if isinstance(result, dict) else getattr(result, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(result, (tuple, list)):
        tensors = [r for r in result if isinstance(r, Tensor) and r.is_floating_point()]
        if len(tensors) == 1:
            return tensors[0]
    raise TypeError(
        f"found no output tensor in the {type(result).__name__} that the model returned; pass outputs=, a function "
        "from what the model returns to the tensor that the loss is computed from"
    )
