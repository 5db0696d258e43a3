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
The model is run again when the user's backward pass has ended and its activations are free, eagerly, with buffers and
generators restored, under the same autocast, with fused modules computed in parts. That is so with a fraction below 1
(sec. 8 of the paper uses 1/8), for layers that need it, and where layers have a gradient but were never seen, as in a
compiled model. A plain sequence of linear layers and pointwise functions is not run: gradients of a part of the batch
are sent along what the user's pass computed (see `Kept`), before the backward pass frees it.
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
from torch.autograd.graph import GradientEdge, Node

from .chain import Trace
from .graph import is_released
from .hooks import EagerHook, Hook
from .kept import Awaited
from .layers import Inputs, Layer
from .likelihoods import Likelihood
from .models import Original, has_compiled_parts, outputs_in
from .ops.native import read_if_free
from .own_pass import OwnPass, Shown
from .passes import ModelInputs, Surroundings, shards_as_before, unnoticed
from .recorder import Recorder
from .sender import Sender
from .sequence import Kept
from .tape import Batch, Sink, Tape

FISHERS = ("mc", "exact", "empirical")


class _Extra(threading.local):
    """Whether this thread is in an extra pass: of any capture, for a model may have several."""

    running = False


_extra = _Extra()


class Capture:
    """Registers the hooks and turns what they see into rows for a `Sink`.

    Args:
        original: The model, as it is when the hooks are set: the module whose outputs the loss is computed from.
        called: What the user calls: the model, or what ``torch.compile`` made of it.
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
        original: Original,
        called: nn.Module,
        layers: list[Layer],
        likelihood: Likelihood,
        fisher: str,
        fraction: float,
        sink: Sink,
        outputs: Callable[[Any], Tensor] | None,
        generators: Callable[[torch.device], torch.Generator],
    ) -> None:
        model = original.model
        self._model = model
        self._original = original
        self._weights = [layer.weight for layer in layers]
        self.likelihood = likelihood
        self._fisher = fisher
        self._sink = sink
        self._sender = Sender(likelihood, fisher, sink, generators)
        self.find_outputs = outputs or outputs_in
        self._sharded = [module for module in model.modules() if hasattr(module, "unshard")]  # by FSDP2
        self._recorder = Recorder(layers, self._from_user)
        self.own_pass = OwnPass(model, layers, fraction, self.find_outputs, self._recorder, self._sender)
        self._runs_again = fraction < 1 or any(layer.needs_own_pass for layer in layers)
        # Layers that neither the user's own passes have shown nor a pass of its own has failed to show.
        self._unknown = set(range(len(layers)))
        self._looked_for_compiled_parts = False
        self._seen: set[int] = set()  # layers, since the last step
        self._failed = False  # a backward pass did, since the last step
        self._devices = frozenset(p.device for p in model.parameters())
        self._tapes: weakref.WeakSet[Tape] = weakref.WeakSet()
        self._unfinished: dict[Tape, int] = {}  # backward pass under way or failed; the thread it is or was on
        self._checked_outputs = False
        self._checked_gradient = False
        self.on_trace: Callable[[Trace], None] | None = None  # once; what it raises, the model's forward pass raises
        # Since `forget`.
        self.keep_batches = False
        self.keep_outputs = False  # in the batches: with them large buffers stay in use from step to step
        self.batches: list[Batch] = []
        self._handles = []
        for module in dict.fromkeys((called, model)):
            # A compiled model whose wrapper has the hooks must not be cut by hooks inside.
            hook = EagerHook if module is called else Hook
            self._handles += [
                module.register_forward_pre_hook(hook(self, Capture._before_model), with_kwargs=True),
                module.register_forward_hook(hook(self, Capture._after_model), always_call=True),
            ]
        self._handles += self._recorder.register()

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
        self._recorder.start(None)
        self.batches = []

    def look_again(self) -> None:
        """Looks for compiled parts of the model, whose graphs show nothing and may refuse an extra backward pass."""
        self._looked_for_compiled_parts = True
        self._runs_again = self._runs_again or has_compiled_parts(self._model)

    @property
    def used_elsewhere(self) -> list[int]:
        """Layers whose weights a forward pass used outside of their modules too, as far as is known."""
        return self._recorder.used_elsewhere or []

    def take_unseen(self) -> list[int]:
        """Layers that have a gradient, though no backward pass since the last call of this came by them."""
        seen, self._seen = self._seen, set()
        failed, self._failed = self._failed, False
        if failed or self.closed or len(seen) == len(self._weights):
            return []
        return [i for i, p in enumerate(self._weights) if p.grad is not None and i not in seen]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, forward passes of the model in this thread are not looked at."""
        here = self._recorder.here
        before, here.paused = here.paused, True
        try:
            yield
        finally:
            here.paused = before

    # ---- forward ----------------------------------------------------------------------------------------------------

    def _before_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        here = self._recorder.here
        if _extra.running or here.paused:
            return
        self._recorder.start(None)
        # Inside a backward pass this is a checkpoint that computes the model again.
        if self._unfinished and torch._C._current_graph_task_id() == -1:
            self._drop_unfinished(threading.get_ident())
        wanted = self._sink.wants_statistics()
        if not torch.is_grad_enabled() or not (wanted or self.keep_batches) or not self._is_the_model_itself():
            return
        listens = self._fisher == "empirical" and not self._runs_again
        may_run_again = self._runs_again or bool(self._unknown)
        # Only to repeat the user's own pass must the random numbers be the same.
        around = Surroundings.now(self._devices, generators=self._fisher == "empirical" and may_run_again)
        inputs = ModelInputs(args, kwargs, 0, around).versioned()
        if self.on_trace is not None:
            with _extra_pass():
                self.on_trace(self.own_pass.trace(inputs))
            self.on_trace = None
        kept = Kept.of(self._model, inputs) if self.keep_batches or (wanted and self._runs_again) else None
        self._recorder.start(Tape(inputs, wanted, notes=wanted and not self._runs_again, listens=listens, kept=kept))

    def _is_the_model_itself(self) -> bool:
        """Whether its own parameters are in place and no functorch transform is under way.

        ``torch.func.functional_call`` puts others there, whose statistics are not the model's.
        """
        return torch._C._functorch.peek_interpreter_stack() is None and self._original.in_place()

    def _after_model(self, args: Any, result: Any) -> None:
        here = self._recorder.here
        if _extra.running or here.paused:
            return
        tape, here.tape = here.tape, None
        if tape is None or result is None:
            return
        outputs = self.find_outputs(result)
        if not self._checked_outputs and self.find_outputs(result) is not outputs:
            raise ValueError(_COMPUTED)
        self._checked_outputs = True
        self.likelihood.check(outputs)
        if not outputs.requires_grad:
            return
        if tape.notes and not self._looked_for_compiled_parts:
            self.look_again()
        self._runs_again = self._runs_again or (tape.once and not tape.listens)
        if self._runs_again:
            tape.notes, tape.calls = False, []
        self._recorder.look_for_other_uses(tape, outputs)
        self._tapes.add(tape)
        tape.inputs = dataclasses.replace(tape.inputs, size=len(outputs))
        tape.user.examples = len(outputs)
        tape.cut_own_edges(outputs)
        if tape.kept is not None and result is outputs:
            tape.kept.note(None, outputs)
        number, values = outputs.output_nr, outputs.detach()
        outputs.register_hook(lambda gradient: self._at_outputs(tape, number, values, gradient))

    # ---- backward ---------------------------------------------------------------------------------------------------

    def _from_user(self, tape: Tape, layer: int, inputs: Inputs | Awaited, gradient: Tensor) -> None:
        if _extra.running or tape.closed or not tape.notes:
            return
        if torch.is_grad_enabled():
            raise RuntimeError(_CREATE_GRAPH)
        self._begin(tape)
        tape.reached.add(layer)
        gradient = gradient.detach()
        if isinstance(inputs, Awaited):
            tape.awaiting.append(inputs)
            inputs.then(lambda inputs: self._sink.add_rows(layer, inputs, gradient, tape.user))
        else:
            self._sink.add_rows(layer, inputs, gradient, tape.user)

    @torch.compiler.disable  # also where the user's whole training step is compiled
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
            values = (outputs, gradient) if self.keep_outputs else ()
            self._keep(Batch(tape.inputs, counted, tape.kept, *values))
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
        node = torch._C._current_autograd_node()
        if tape.notes and not tape.listens:
            source = GradientEdge(node, number)
            recomputed = unnoticed(self._model) if tape.recomputes else contextlib.nullcontext()
            with _extra_pass(), recomputed, shards_as_before(self._sharded):
                self._sender.send(tape, source, outputs, gradient, counted)
        served = None
        if tape.kept is not None and not tape.notes:
            with _extra_pass():
                served = self.own_pass.along(tape.kept, tape.inputs, gradient, counted)
            tape.kept = None  # from here on the backward pass frees what it holds
        self._recorder.recomputing = tape if tape.hidden else None
        finish = partial(self._finish, tape, node, gradient, counted, served)
        torch.autograd.Variable._execution_engine.queue_callback(finish)

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

    @torch.compiler.disable
    def _finish(self, tape: Tape, node: Node, gradient: Tensor, counted: Tensor, served: Shown | None) -> None:
        """The backward pass of a tape has ended; `served` is what `OwnPass.along` gave."""
        self._recorder.recomputing = None
        tape.give_up()
        if tape not in self._unfinished:
            return
        if not tape.notes:
            if served is None:
                with _extra_pass():
                    served = self.own_pass.run(tape.inputs, gradient, counted)
            counted, reached = served
            self._seen |= reached
        else:
            self._seen |= tape.reached
            if self._unknown:
                self._unknown -= self._seen
                self._fill_in(tape, gradient, counted)
        # Not finite where the loss is not, so that what finite outputs gave is not committed either.
        finite = 0 * gradient.sum(dtype=torch.promote_types(gradient.dtype, torch.float32)).double()
        self._sink.add_terms(counted.sum() + finite)
        if is_released(node, tape.recomputes):
            tape.close()
        del self._unfinished[tape]

    def _fill_in(self, tape: Tape, gradient: Tensor, counted: Tensor) -> None:
        """Takes statistics of layers that have a gradient but were not seen, once, to find out whether that helps."""
        unseen = {i for i in self._unknown if self._weights[i].grad is not None}
        if not unseen:
            return
        with _extra_pass():
            _, reached = self.own_pass.run(tape.inputs, gradient, counted, only=unseen)
        self._seen |= reached
        self._unknown -= unseen
        self._runs_again = self._runs_again or bool(unseen & reached)

    def _drop_unfinished(self, thread: int | None = None) -> None:
        """After a backward pass that raised (on this thread, if one is named), drops all that waits for the step."""
        if self._unfinished and (thread is None or thread in self._unfinished.values()):
            for tape in self._unfinished:
                tape.give_up()
            self._unfinished.clear()
            self._failed = True
            self._recorder.recomputing = None
            self._sink.drop()

    def _check_gradient(self, outputs: Tensor, gradient: Tensor) -> None:
        if not bool(gradient.any()) or not bool(gradient.isfinite().all()):
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


_SECOND_BACKWARD = "fisher='empirical' takes one backward pass per forward pass of the model: add up the losses first"

_COMPUTED = (
    "outputs= computed a new tensor, on which the loss does not depend. It must pick out the tensor that the loss is "
    "computed from; where the loss needs several, let the model return them as one (torch.cat, torch.stack)"
)

_CREATE_GRAPH = (
    "K-FAC statistics cannot be gathered in a backward pass with create_graph=True. Take higher-order gradients in a "
    "forward pass of their own, on a step without statistics (factor_every > 1) or after opt.close()"
)
