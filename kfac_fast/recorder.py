"""`Recorder`: notes the calls of layers on the tape that is open in this thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from .hooks import Hook
from .kept import as_kept
from .layers import Inputs, Layer
from .passes import saves_are_packed
from .tape import Call, Tape


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
        # Layers whose inputs are held inside checkpoints: that these do not show them again was found out once.
        self.kept: set[int] = set()
        self._again: tuple[dict[tuple[int, int], Call], Callable[[Call], None]] | None = None

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
        else:
            if tape.kept is not None and args and len(self._layers[index].modules) == 1:
                tape.kept.note(self._layers[index].module, args[0])
            if not tape.notes or not isinstance(output, Tensor):
                return
        node = output.grad_fn
        if node is None:
            tape.hidden[index] = tape.hidden.get(index, 0) + 1
            return
        if tape.trace is not None:
            tape.trace.note(index, next(iter((*args, *kwargs.values()))), output)
            return
        inputs = partial(self._layers[index].inputs, args, kwargs)
        if tape.listens:
            tape.recomputes = tape.recomputes or saves_are_packed() is not False
            tape.user.uses.append((index, 0))
            output.register_hook(partial(self._from_user, tape, index, as_kept(inputs(), output)))
        else:
            self._add(tape, index, 0, inputs, GradientEdge(node, output.output_nr), output)

    def _note(self, index: int, block: int, inputs: Tensor, output: Tensor) -> None:
        """`layers.Note` of a layer."""
        tape = self.here.tape
        if tape is not None and output.requires_grad:
            self._add(tape, index, block, lambda: (inputs.detach(),), get_gradient_edge(output), output)
        elif tape is None:
            self._show(index, block, lambda: (inputs.detach(),))

    def _add(
        self, tape: Tape, index: int, block: int, inputs: Callable[[], Inputs], edge: GradientEdge, output: Tensor
    ) -> None:
        """Adds a call to a tape, without its inputs where a checkpoint will show them again."""
        packed = saves_are_packed()
        tape.recomputes = tape.recomputes or packed is not False
        if index in tape.missing:
            return
        awaits = packed is True and tape.packed is False and index not in self.kept
        before = tape.awaits.get((index, block))
        tape.awaits[index, block] = awaits
        if before is not None and (before or awaits):  # nothing would tell which of the calls a checkpoint shows
            tape.lose(index)
            return
        tape.elements += output.numel()
        tape.calls.append(Call(index, None if awaits else as_kept(inputs(), output), edge, block, awaits))

    def _before_layer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._show(index, 0, partial(self._layers[index].inputs, args, kwargs))

    def _show(self, index: int, block: int, inputs: Callable[[], Inputs]) -> None:
        """A checkpoint computes this again."""
        awaited, meet = self._again or ({}, None)
        call = awaited.get((index, block))
        if meet is not None and call is not None and not call.served:
            call.inputs = inputs()
            meet(call)

    @contextlib.contextmanager
    def shown_again(self, tape: Tape, meet: Callable[[Call], None]) -> Iterator[None]:
        """Inside, an extra pass, inputs that the tape awaits are looked for in what checkpoints compute.

        The hooks run before the layers: a checkpoint stops as soon as it has all it needs.

        Args:
            tape: What the pass goes to.
            meet: Called with a call whose inputs have come.
        """
        awaited = tape.awaited()
        handles = [
            module.register_forward_pre_hook(Hook(self, Recorder._before_layer, index), with_kwargs=True)
            for index in {layer for layer, _ in awaited}
            if self._layers[index].forward_in_parts(_note_nothing) is None
            for module in self._layers[index].modules
        ]
        self._again = (awaited, meet) if awaited else None
        try:
            yield
        finally:
            self._again = None
            for handle in handles:
                handle.remove()

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
