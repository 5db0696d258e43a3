"""`Recorder`: notes the calls of layers on the tape that is open in this thread."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from .graph import uses_of
from .hooks import Hook
from .kept import Awaited, Watch, as_kept
from .layers import Inputs, Layer
from .passes import is_selective_checkpoint, saves_are_packed
from .tape import Call, Tape


class _Here(threading.local):
    """What this thread is doing with one model."""

    def __init__(self) -> None:
        self.tape: Tape | None = None  # of the forward pass that is running
        self.paused = False
        self.watches: list[tuple[int, Watch]] = []  # by layer, of those that are running


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

    def __init__(
        self, layers: Sequence[Layer], from_user: Callable[[Tape, int, Inputs | Awaited, Tensor], None]
    ) -> None:
        self._layers = layers
        self._from_user = from_user
        self.here = _Here()
        # Of the backward pass that is under way, if layers ran unseen in its forward pass.
        self.recomputing: Tape | None = None
        # Layers whose weights a forward pass uses outside of their modules too; None: not looked for yet.
        self.used_elsewhere: list[int] | None = None

    def register(self) -> list[RemovableHandle]:
        """Sets the hooks, those after a layer before the user's, which may change the output."""
        handles: list[RemovableHandle] = []
        for index, layer in enumerate(self._layers):
            if layer.forward_in_parts(_note_nothing) is None:
                before, after = Hook(self, Recorder._before_layer, index), Hook(self, Recorder._after_layer, index)
                for module in layer.modules:
                    handles += [
                        module.register_forward_pre_hook(before, with_kwargs=True),
                        module.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True),
                    ]
        return handles

    def start(self, tape: Tape | None) -> None:
        """Opens a tape in this thread, or none; what an interrupted forward pass has left is cleared away."""
        self.here.tape = tape
        while self.here.watches:
            self.here.watches.pop()[1].end()

    def _before_layer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tape = self.here.tape
        if tape is None or not tape.notes or tape.trace is not None or _extra.recorder not in (None, self):
            return
        watch = Watch.begin()
        if watch is not None:
            self.here.watches.append((index, watch))
            tape.once = tape.once or is_selective_checkpoint()

    def _end_watch(self, index: int) -> None:
        watches = self.here.watches
        if watches and watches[-1][0] == index:
            watches.pop()[1].end()

    def _after_layer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        try:
            self._look_at(index, args, kwargs, output)
        finally:
            self._end_watch(index)

    def _look_at(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """At a layer's output; None where the layer raised."""
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
        arguments = (*args, *kwargs.values())
        inputs = self._inputs(index, self._layers[index].inputs(args, kwargs), arguments, output)
        tape.recomputes = tape.recomputes or saves_are_packed() is not False
        if tape.listens:
            tape.user.uses.append((index, 0))
            output.register_hook(partial(self._from_user, tape, index, inputs))
        else:
            self._add(tape, Call(index, inputs, GradientEdge(node, output.output_nr)), output)

    def _note(self, index: int, block: int, inputs: Tensor, output: Tensor) -> None:
        """`layers.Note` of a layer."""
        tape = self.here.tape
        if tape is None or not output.requires_grad:
            return
        tape.recomputes = tape.recomputes or saves_are_packed() is not False
        kept = self._inputs(index, (inputs.detach(),), (inputs,), output)
        self._add(tape, Call(index, kept, get_gradient_edge(output), block), output)

    def _add(self, tape: Tape, call: Call, output: Tensor) -> None:
        tape.elements += output.numel()
        tape.calls.append(call)

    def _inputs(self, index: int, inputs: Inputs, arguments: Iterable[Any], output: Tensor) -> Inputs | Awaited:
        """Of a use of a layer, nothing that autograd does not hold too."""
        watches = self.here.watches
        if watches and watches[-1][0] == index:
            return watches[-1][1].inputs(inputs, arguments)
        return as_kept(inputs, output)

    def look_for_other_uses(self, tape: Tape, outputs: Tensor) -> None:
        """Finds `used_elsewhere`, once, from a forward pass that has just been noted on a tape."""
        if self.used_elsewhere is not None or not tape.notes or outputs.grad_fn is None:
            return
        weights = {
            i: layer.weight
            for i, layer in enumerate(self._layers)
            if layer.forward_in_parts(_note_nothing) is None  # these use their weights in parts
            and all(type(module).__module__.startswith("torch.nn.") for module in layer.modules)
        }
        called = Counter(id(weights[i]) for i in tape.called() if i in weights)
        uses = uses_of(outputs.grad_fn, list(weights.values()))
        self.used_elsewhere = [i for i, weight in weights.items() if uses[id(weight)] > called[id(weight)] > 0]

    @contextlib.contextmanager
    def onto(self, tape: Tape) -> Iterator[None]:
        """Inside, an extra pass of the model, calls in this thread are noted on a tape, and on no other."""
        before, _extra.recorder = _extra.recorder, self
        self.start(tape)
        try:
            yield
        finally:
            self.start(None)
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
                    layer.module.__dict__["forward"] = partial(self._run_in_parts, index, forward)
            yield
        finally:
            for module, before in replaced:
                if before is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = before

    def _run_in_parts(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._before_layer(index, args, kwargs)
        try:
            return forward(*args, **kwargs)
        finally:
            self._end_watch(index)


def _note_nothing(block: int, inputs: Tensor, output: Tensor) -> None:
    """A `layers.Note` to ask with whether a layer has parts."""
