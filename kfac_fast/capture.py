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
4. When the user's backward pass has ended, the statistics count. Those of one that raised are dropped.

With fisher = "empirical" the gradients of the user's own pass are taken, by hooks on the modules' outputs.

*A pass of its own.* Where the user's passes do not show what is needed, only the model's inputs are noted in forward.
The model is run again when the user's backward pass has ended and its activations are free, with buffers and random
generators restored, under the same autocast, and with fused modules computed in parts (`Layer.forward_in_parts`). That
is so with a fraction below 1 (sec. 8 of the paper uses 1/8; statistics then cost that much of a pass instead of a whole
one) and for layers that need it. "empirical" then sends on the user's gradient of the outputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .chain import Trace
from .hooks import Hook
from .layers import Inputs, Layer
from .likelihoods import Likelihood
from .ops.native import read_if_free
from .passes import ModelInputs, autocast_now, unnoticed
from .tape import Batch, Call, Sender, Sink, Tape

FISHERS = ("mc", "exact", "empirical")


class _Here(threading.local):
    """What this thread is doing with one model."""

    tape: Tape | None = None  # of the forward pass that is running
    paused = False


class _Extra(threading.local):
    """Whether this thread is in an extra pass: of any capture, for a model may have several."""

    running = False


_extra = _Extra()


class Capture:
    """Registers the hooks and turns what they see into rows for a `Sink`.

    Args:
        model: The module whose outputs the loss is computed from.
        layers: Supported layers of the model.
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
        self._layers = layers
        self.likelihood = likelihood
        self._fisher = fisher
        self._fraction = fraction
        self._own_pass = fraction < 1 or any(layer.needs_own_pass for layer in layers)
        self.own_passes = 0  # chooses the next part of a batch
        self._sink = sink
        self._sender = Sender(likelihood, fisher, sink, generators)
        self.find_outputs = outputs or _find_outputs
        self._device_types = tuple(sorted({p.device.type for p in model.parameters()}))
        self._here = _Here()
        self._tapes: weakref.WeakSet[Tape] = weakref.WeakSet()
        self._unfinished: dict[Tape, int] = {}  # backward pass under way or failed; the thread it is or was on
        self._checked_gradient = False
        self.on_trace: Callable[[Trace], None] | None = None  # once; what it raises, the model's forward pass raises
        # Since `forget`.
        self.keep_batches = False
        self.batches: list[Batch] = []
        self._handles = [
            model.register_forward_pre_hook(Hook(self, Capture._before_model), with_kwargs=True),
            *(
                module.register_forward_hook(Hook(self, Capture._after_layer, index), with_kwargs=True)
                for index, layer in enumerate(layers)
                if layer.forward_in_parts(_note_nothing) is None
                for module in layer.modules
            ),
            model.register_forward_hook(Hook(self, Capture._after_model), always_call=True),
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
        """Drops forward passes whose backward pass never came, and all statistics since the last step if one failed."""
        for tape in list(self._tapes):
            tape.close()
        self._drop_unfinished()
        self._here.tape = None
        self.batches = []

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, forward passes of the model in this thread are not looked at."""
        before, self._here.paused = self._here.paused, True
        try:
            yield
        finally:
            self._here.paused = before

    # ---- forward ----------------------------------------------------------------------------------------------------

    def _before_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        here = self._here
        if _extra.running or here.paused:
            return
        here.tape = None
        # Inside a backward pass this is a checkpoint that computes the model again.
        if self._unfinished and torch._C._current_graph_task_id() == -1:
            self._drop_unfinished(threading.get_ident())
        wanted = self._sink.wants_statistics()
        if torch.is_grad_enabled() and (wanted or self.keep_batches):
            inputs = ModelInputs(args, kwargs, 0, autocast_now(self._device_types))
            if self.on_trace is not None:
                self.on_trace(self._trace(inputs))
                self.on_trace = None
            here.tape = Tape(inputs, wanted, notes=wanted and not self._own_pass)

    def _after_layer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tape = self._here.tape
        if tape is None or not tape.notes or not isinstance(output, Tensor):
            return
        node = output.grad_fn
        if node is None:
            return
        if tape.trace is not None:
            tape.trace.note(index, next(iter((*args, *kwargs.values()))), output)
            return
        inputs = self._layers[index].inputs(args, kwargs)
        tape.calls.append(Call(index, inputs, GradientEdge(node, output.output_nr)))
        if self._fisher == "empirical" and not self._own_pass:
            tape.user.layers.append(index)
            output.register_hook(partial(self._from_user, tape, index, inputs))

    def _note(self, index: int, block: int, inputs: Tensor, output: Tensor) -> None:
        """`layers.Note` of a layer, for the pass that is running."""
        tape = self._here.tape
        if tape is not None and output.requires_grad:
            tape.calls.append(Call(index, (inputs.detach(),), get_gradient_edge(output), block))

    def _after_model(self, args: Any, result: Any) -> None:
        here = self._here
        if _extra.running or here.paused:
            return  # `_run_again` opened the tape and closes it
        tape, here.tape = here.tape, None
        if tape is None or result is None or (tape.notes and not tape.calls and not self.keep_batches):
            return
        outputs = self.find_outputs(result)
        self.likelihood.check(outputs)
        if not outputs.requires_grad:
            return
        self._tapes.add(tape)
        tape.inputs = dataclasses.replace(tape.inputs, size=len(outputs))
        tape.user.examples = len(outputs)
        tape.cut_own_edges(outputs)
        number, values = outputs.output_nr, outputs.detach()
        outputs.register_hook(lambda gradient: self._at_outputs(tape, number, values, gradient))

    def _trace(self, inputs: ModelInputs) -> Trace:
        """Runs the model once more, unnoticed, to see how its layers feed each other."""
        trace = Trace()
        with _extra_pass(), unnoticed(self._model), torch.enable_grad():
            self._here.tape = Tape(inputs, statistics=False, notes=True, trace=trace)
            try:
                trace.outputs = self.find_outputs(inputs.run(self._model, trace.inputs)).grad_fn
            finally:
                self._here.tape = None
        return trace

    # ---- backward ---------------------------------------------------------------------------------------------------

    def _from_user(self, tape: Tape, layer: int, inputs: Inputs, gradient: Tensor) -> None:
        if _extra.running or tape.closed:
            return
        if torch.is_grad_enabled():
            raise RuntimeError(_CREATE_GRAPH)
        self._begin(tape)
        self._sink.add_rows(layer, inputs, gradient.detach(), tape.user)

    def _at_outputs(self, tape: Tape, number: int, outputs: Tensor, gradient: Tensor) -> None:
        if _extra.running or tape.closed:
            return
        if torch.is_grad_enabled():
            raise RuntimeError(_CREATE_GRAPH)
        gradient = gradient.detach()
        if not self._checked_gradient:
            self._check_gradient(outputs, gradient)
        counted = self.likelihood.counted(outputs, gradient)
        if self.keep_batches:
            self._keep(Batch(tape.inputs, counted, outputs, gradient))
        if tape.counted is None:
            tape.counted = counted
        else:  # another backward pass through the same outputs: of losses on other terms, perhaps
            if tape.statistics and self._fisher == "empirical":
                raise RuntimeError(_SECOND_BACKWARD)
            counted = counted & ~tape.counted
            if read_if_free(counted.any()) is False:
                return
            tape.counted |= counted
        if not tape.statistics:
            return
        self._begin(tape)
        if not self._own_pass and self._fisher != "empirical":
            source = GradientEdge(torch._C._current_autograd_node(), number)
            with _extra_pass():
                self._sender.send(tape, source, outputs, gradient, counted)
        elif tape.calls:
            tape.calls = []
        torch.autograd.Variable._execution_engine.queue_callback(partial(self._finish, tape, gradient, counted))

    def _keep(self, batch: Batch) -> None:
        for i, other in enumerate(self.batches):
            if other.inputs is batch.inputs:  # the sum of two losses of the same outputs
                self.batches[i] = other.plus(batch)
                return
        self.batches.append(batch)

    def _begin(self, tape: Tape) -> None:
        if not self._unfinished:
            self._sink.begin()
        self._unfinished[tape] = threading.get_ident()

    def _finish(self, tape: Tape, gradient: Tensor, counted: Tensor) -> None:
        """The backward pass of a tape has ended."""
        if tape not in self._unfinished:
            return
        if self._own_pass:
            counted = self._run_again(tape.inputs, gradient, counted)
        # Not finite where the loss is not, so that what finite outputs gave is not committed either.
        self._sink.add_terms(counted.sum() + 0 * gradient.sum(dtype=torch.float64))
        del self._unfinished[tape]

    def _run_again(self, inputs: ModelInputs, gradient: Tensor, counted: Tensor) -> Tensor:
        """A pass of its own on the batch or a part of it; which loss terms of that count."""
        chosen = slice(None)
        if self._fraction < 1:
            if not inputs.divisible:
                raise ValueError(
                    f"factor_fraction={self._fraction:g} needs a model input whose first dimension is the batch, like "
                    f"the outputs' ({inputs.size}); pass factor_fraction=1"
                )
            inputs, chosen = inputs.part(self._fraction, self.own_passes)
        self.own_passes += 1
        gradient, counted = gradient[chosen], counted[chosen]
        tape = Tape(inputs, statistics=True, notes=True)
        with _extra_pass(), unnoticed(self._model), torch.enable_grad(), self._in_parts():
            self._here.tape = tape
            try:
                outputs = self.find_outputs(inputs.run(self._model))
            finally:
                self._here.tape = None
            tape.cut_own_edges(outputs)
            self._sender.send(tape, outputs, outputs.detach(), gradient, counted)
        return counted

    @contextlib.contextmanager
    def _in_parts(self) -> Iterator[None]:
        """Inside, fused modules compute in parts that are noted."""
        replaced: list[tuple[nn.Module, Any]] = []
        try:
            for index, layer in enumerate(self._layers):
                forward = layer.forward_in_parts(partial(self._note, index))
                if forward is not None:
                    replaced.append((layer.module, layer.module.__dict__.get("forward")))
                    layer.module.__dict__["forward"] = forward
            yield
        finally:
            for module, before in replaced:
                if before is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = before

    def _drop_unfinished(self, thread: int | None = None) -> None:
        """After a backward pass that raised (on this thread, if one is named), drops all that waits for the step."""
        if self._unfinished and (thread is None or thread in self._unfinished.values()):
            self._unfinished.clear()
            self._sink.drop()

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


@contextlib.contextmanager
def _extra_pass() -> Iterator[None]:
    """Inside, the hooks of every capture ignore what this thread does but for a tape that is open."""
    before, _extra.running = _extra.running, True
    try:
        yield
    finally:
        _extra.running = before


def _note_nothing(block: int, inputs: Tensor, output: Tensor) -> None:
    """A `layers.Note` to ask with whether a layer has parts."""


_SECOND_BACKWARD = "fisher='empirical' takes one backward pass per forward pass of the model: add up the losses first"

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
