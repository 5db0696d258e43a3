"""`OwnPass`: runs the model again for the statistics alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .chain import Trace
from .layers import Layer
from .passes import ModelInputs, unnoticed
from .recorder import Recorder
from .sender import Sender
from .sequence import Kept, Values
from .tape import REENTRANT, Tape

Shown = tuple[Tensor, set[int]]  # which loss terms of a part count, and the layers that a gradient came to


class OwnPass:
    """A forward pass over the batch or a part of it, and an extra backward pass; see `capture`.

    Args:
        model: What is run, eagerly.
        layers: Its layers.
        fraction: Of the examples of a batch, in (0, 1].
        find_outputs: Finds the output tensor in what the model returns.
        recorder: Notes the calls.
        sender: Makes the backward pass.

    Attributes:
        count: Passes made; chooses the part of the next batch.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        fraction: float,
        find_outputs: Callable[[Any], Tensor],
        recorder: Recorder,
        sender: Sender,
    ) -> None:
        self._model = model
        self._layers = layers
        self._weights = [layer.weight for layer in layers]
        self._fraction = fraction
        self._find_outputs = find_outputs
        self._recorder = recorder
        self._sender = sender
        self.count = 0

    def along(self, kept: Kept, inputs: ModelInputs, gradient: Tensor, counted: Tensor) -> Shown | None:
        """Sends the gradients along what the user's forward pass computed; None where that does not serve.

        Args:
            kept: Of that pass.
            inputs: Of that pass.
            gradient: The user's, of its outputs.
            counted: Which of its loss terms count.

        Returns:
            As `run`.
        """
        _, chosen = self._part(inputs)
        values = kept.rows(chosen, inputs.size)
        places = None if values is None else self._places(values)
        if values is None or places is None:
            return None
        self.count += 1
        self._sender.send_along(values, places, gradient[chosen], counted[chosen])
        return counted[chosen], set(range(len(self._layers)))

    def run(self, inputs: ModelInputs, gradient: Tensor, counted: Tensor, only: Collection[int] | None = None) -> Shown:
        """Runs the model and sends the gradients.

        Args:
            inputs: Of the user's forward pass.
            gradient: The user's, of its outputs.
            counted: Which of its loss terms count.
            only: Layers to take statistics of; None is all.

        Returns:
            Which loss terms of the part count, and the layers that a gradient came to.
        """
        if inputs.changed:
            raise RuntimeError(
                "the model's input was changed in place between the forward and the end of the backward pass, but "
                "K-FAC's statistics need it again: pass the model a copy"
            )
        inputs, chosen = self._part(inputs)
        self.count += 1
        gradient, counted = gradient[chosen], counted[chosen]
        return counted, self._once(inputs, gradient, counted, only)

    def _part(self, inputs: ModelInputs) -> tuple[ModelInputs, slice]:
        """The examples whose turn it is, and which ones they are."""
        if self._fraction == 1:
            return inputs, slice(None)
        if not inputs.divisible:
            raise ValueError(
                f"factor_fraction={self._fraction:g} needs a model input whose first dimension is the batch, like "
                f"the outputs' ({inputs.size}); pass factor_fraction=1"
            )
        with self._explained():
            return inputs.part(self._fraction, self.count)

    def _places(self, values: Values) -> dict[int, tuple[int, Layer]] | None:
        """Number and layer by position of the module, if all layers are there and `Values.pull_back` serves."""
        position = {id(module): i for i, module in enumerate(values.modules)}
        layers = {position.get(id(layer.module), -1): (i, layer) for i, layer in enumerate(self._layers)}
        fit = len(layers) == len(self._layers) and -1 not in layers and values.pulls_back
        alone = all(len(layer.modules) == 1 and not layer.needs_own_pass for layer in self._layers)
        return layers if layers and fit and alone else None

    def _once(self, inputs: ModelInputs, gradient: Tensor, counted: Tensor, only: Collection[int] | None) -> set[int]:
        """Layers that a gradient came to."""
        tape = Tape(inputs, statistics=True, notes=True)
        # To the end, since a checkpoint runs parts of the model once more in the backward pass.
        with unnoticed(self._model), self._recorder.in_parts():
            with torch.enable_grad(), self._recorder.onto(tape):
                outputs = self._outputs(inputs)
            self._recorder.look_for_other_uses(tape, outputs)
            called = set(tape.called())
            for i in tape.hidden:
                if i not in called and self._weights[i].grad is not None:
                    raise RuntimeError(REENTRANT)
            if only is not None:
                tape.calls = [call for call in tape.calls if call.layer in only]
            self._sender.send(tape, outputs, outputs.detach(), gradient, counted)
        return tape.reached

    def _outputs(self, inputs: ModelInputs) -> Tensor:
        """Of the model, for these inputs."""
        with self._explained():
            outputs = self._find_outputs(inputs.run(self._model))
            if len(outputs) != inputs.size:
                raise ValueError(f"there are {len(outputs)} outputs for {inputs.size} examples")
            return outputs

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Inside, what goes wrong with a part of the batch is raised with the remedy."""
        try:
            yield
        except Exception as error:
            if self._fraction == 1:
                raise
            raise RuntimeError(
                f"the model did not take the part of the batch that K-FAC's statistics come from "
                f"(factor_fraction={self._fraction:g}). Where examples depend on each other, or are not entries of "
                f"tensors, pass factor_fraction=1. The error was: {str(error)[:200]}"
            ) from error

    def trace(self, inputs: ModelInputs) -> Trace:
        """Runs the model to see how its layers feed each other."""
        trace = Trace()
        tape = Tape(inputs, statistics=False, notes=True, trace=trace)
        with unnoticed(self._model), torch.enable_grad(), self._recorder.onto(tape):
            trace.outputs = self._find_outputs(inputs.run(self._model, trace.inputs)).grad_fn
        return trace
