"""`Recorder`: notes the calls of layers on the tape that is open in this thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from .hooks import Hook
from .layers import Inputs, Layer
from .tape import Call, Tape


def _saved_tensors_hooks() -> bool:
    """Whether someone packs what autograd saves, as non-reentrant checkpoints do; yes where torch can't tell (2.6)."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


class _Here(threading.local):
    """What this thread is doing with one model."""

    tape: Tape | None = None  # of the forward pass that is running
    paused = False


class _Extra(threading.local):
    """Whose extra pass this thread is in: a model may have several recorders, with tapes of their own open."""

    recorder: Recorder | None = None


_extra = _Extra()


class Recorder:
    """The hooks on layers.

    Args:
        layers: Numbered as the calls are.
        from_user: Called with a tape, a layer, its inputs and the gradient of its output in the user's own backward
            pass, where the tape listens to that.
    """

    def __init__(self, layers: Sequence[Layer], from_user: Callable[[Tape, int, Inputs, Tensor], None]) -> None:
        self._layers = layers
        self._from_user = from_user
        self.here = _Here()
        # Of the backward pass that is under way, if layers ran unseen in its forward pass.
        self.recomputing: Tape | None = None

    def register(self) -> list[RemovableHandle]:
        """Sets the hooks, before those of the user, which may change the output."""
        return [
            module.register_forward_hook(Hook(self, Recorder._after_layer, index), prepend=True, with_kwargs=True)
            for index, layer in enumerate(self._layers)
            if layer.forward_in_parts(_note_nothing) is None
            for module in layer.modules
        ]

    def _after_layer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tape = self.here.tape
        if _extra.recorder is not None and _extra.recorder is not self:
            return
        if tape is None:
            tape = self.recomputing
            if tape is None or not tape.take_hidden(index, output):
                return
        elif not tape.notes or not isinstance(output, Tensor):
            return
        node = output.grad_fn
        if node is None:
            tape.hidden[index] = tape.hidden.get(index, 0) + 1
            return
        if tape.trace is not None:
            tape.trace.note(index, next(iter((*args, *kwargs.values()))), output)
            return
        if _saved_tensors_hooks():
            tape.recomputes = True
        inputs = self._layers[index].inputs(args, kwargs)
        if tape.listens:
            tape.user.uses.append((index, 0))
            output.register_hook(partial(self._from_user, tape, index, inputs))
        else:
            tape.elements += output.numel()
            tape.calls.append(Call(index, inputs, GradientEdge(node, output.output_nr)))

    def _note(self, index: int, block: int, inputs: Tensor, output: Tensor) -> None:
        """`layers.Note` of a layer."""
        tape = self.here.tape
        if tape is not None and output.requires_grad:
            tape.elements += output.numel()
            tape.calls.append(Call(index, (inputs.detach(),), get_gradient_edge(output), block))

    @contextlib.contextmanager
    def onto(self, tape: Tape) -> Iterator[None]:
        """Inside, an extra pass of the model, calls in this thread are noted on a tape, and on no other."""
        before, _extra.recorder = _extra.recorder, self
        self.here.tape = tape
        try:
            yield
        finally:
            self.here.tape = None
            _extra.recorder = before

    @contextlib.contextmanager
    def in_parts(self) -> Iterator[None]:
        """Inside, fused modules compute in parts, which can be noted."""
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


def _note_nothing(block: int, inputs: Tensor, output: Tensor) -> None:
    """A `layers.Note` to ask with whether a layer has parts."""
