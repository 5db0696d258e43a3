"""State of a `Preconditioner` as plain tensors and numbers, per layer, and back: for `state_dict`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .preconditioner import Preconditioner


def layer_state(preconditioner: Preconditioner, index: int) -> dict[str, Tensor]:
    """Copies of everything kept for one layer."""
    return {key: torch.stack(views) for key, views in _views(preconditioner, index).items()}


def load_layer_state(preconditioner: Preconditioner, index: int, state: dict[str, Any]) -> None:
    """Copies one layer's state back; `check_layer_state` has looked at it."""
    for key, views in _views(preconditioner, index).items():
        for view, saved in zip(views, state[key], strict=True):
            view.copy_(saved)


def check_layer_state(preconditioner: Preconditioner, index: int, state: dict[str, Any]) -> None:
    """Refuses what would not fit, before anything is changed.

    Raises:
        ValueError: A missing entry or another shape; the message names the layer and the entry.
    """
    name = preconditioner.layers[index].name
    for key, views in _views(preconditioner, index).items():
        value = state.get(key)
        shape = (len(views), *views[0].shape)
        if not isinstance(value, Tensor):
            raise ValueError(f"state_dict has no {key!r} for layer {name}: it is truncated or of another optimizer")
        if value.shape != shape:
            raise ValueError(f"state_dict has {key!r} of shape {tuple(value.shape)} for layer {name}, expected {shape}")


def counters(preconditioner: Preconditioner) -> dict[str, Any]:
    """Numbers and the sampler's state, kept with the parameter groups."""
    return {
        "step": preconditioner.steps,
        "inversions": preconditioner.inversions,
        "approximation": preconditioner.approximation.name,
        "sampler": {str(device): g.get_state() for device, g in preconditioner.generators.items()},
    }


def check_counters(preconditioner: Preconditioner, values: dict[str, Any]) -> None:
    """Refuses the state of another approximation.

    Raises:
        ValueError: It is of another one.
    """
    if values["approximation"] != preconditioner.approximation.name:
        raise ValueError(
            f"state_dict is of approximation={values['approximation']!r}, the optimizer has "
            f"approximation={preconditioner.approximation.name!r}"
        )


def load_counters(preconditioner: Preconditioner, values: dict[str, Any]) -> None:
    preconditioner.steps = values["step"]
    preconditioner.inversions = values["inversions"]
    for device, state in values["sampler"].items():
        preconditioner.generator(torch.device(device)).set_state(state.cpu())


def _views(preconditioner: Preconditioner, index: int) -> dict[str, list[Tensor]]:
    part, own = preconditioner.part_of(index)
    return part.state(own)
