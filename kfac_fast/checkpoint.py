"""State of a `Preconditioner` as plain tensors and numbers, per layer, and back: for `state_dict`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .preconditioner import Preconditioner


def layer_state(preconditioner: Preconditioner, index: int) -> dict[str, Tensor]:
    """Copies of everything kept for one layer."""
    state = {}
    for key, views in _matrix_views(preconditioner, index).items():
        state[key] = torch.stack(views)
    for key, values in _scalar_views(preconditioner, index).items():
        state[key] = torch.stack(values)
    return state


def load_layer_state(preconditioner: Preconditioner, index: int, state: dict[str, Any]) -> None:
    """Copies one layer's state back; `check_layer_state` has looked at it."""
    for key, views in _matrix_views(preconditioner, index).items():
        for view, block in zip(views, state[key], strict=True):
            view.copy_(block)
    for key, values in _scalar_views(preconditioner, index).items():
        for value, row in zip(values, state[key], strict=True):
            value.copy_(row)


def check_layer_state(preconditioner: Preconditioner, index: int, state: dict[str, Any]) -> None:
    """Refuses what would not fit, before anything is changed.

    Raises:
        ValueError: A missing entry or another shape; the message names the layer and the entry.
    """
    name = preconditioner.layers[index].name
    for views in (_matrix_views(preconditioner, index), _scalar_views(preconditioner, index)):
        for key, expected in views.items():
            value = state.get(key)
            shape = (len(expected), *expected[0].shape)
            if not isinstance(value, Tensor):
                raise ValueError(f"state_dict has no {key!r} for layer {name}: it is truncated or of another optimizer")
            if value.shape != shape:
                raise ValueError(
                    f"state_dict has {key!r} of shape {tuple(value.shape)} for layer {name}, expected {shape}"
                )


def counters(preconditioner: Preconditioner) -> dict[str, Any]:
    """Numbers and the sampler's state, kept with the parameter groups."""
    return {
        "step": preconditioner.steps,
        "inversions": preconditioner.inversions,
        "sampler": {str(device): g.get_state() for device, g in preconditioner.generators.items()},
    }


def load_counters(preconditioner: Preconditioner, values: dict[str, Any]) -> None:
    preconditioner.steps = values["step"]
    preconditioner.inversions = values["inversions"]
    for device, state in values["sampler"].items():
        preconditioner.generator(torch.device(device)).set_state(state.cpu())


def _matrix_views(preconditioner: Preconditioner, index: int) -> dict[str, list[Tensor]]:
    """Stacked to ``[blocks, n, n]``; a layer has several blocks only if its convolution is grouped."""
    blocks = preconditioner.factors.blocks_of(index)
    count = preconditioner.factors.count
    running, inverse = preconditioner.factors.running, preconditioner.inverses.inverse
    return {
        "a_factor": [running[i] for i in blocks],
        "g_factor": [running[count + i] for i in blocks],
        "a_inverse": [inverse[i] for i in blocks],
        "g_inverse": [inverse[count + i] for i in blocks],
    }


def _scalar_views(preconditioner: Preconditioner, index: int) -> dict[str, list[Tensor]]:
    """Stacked to ``[2, blocks]``: of the A, of the G."""
    blocks = preconditioner.factors.blocks_of(index)
    count = preconditioner.factors.count
    values = {
        "updates": preconditioner.factors.updates,
        "trace": preconditioner.factors.trace,
        "failures": preconditioner.inverses.failures,
        "inverted": preconditioner.inverses.inverted,
    }
    return {
        key: [v[blocks.start : blocks.stop], v[count + blocks.start : count + blocks.stop]] for key, v in values.items()
    }
