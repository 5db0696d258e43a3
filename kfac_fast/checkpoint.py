"""State of a `Preconditioner` as plain tensors and numbers, by layer, and back; checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .approximations import Approximation
from .capture import Capture
from .layers import Layer
from .sampler import Sampler
from .sharing import Sharing


class IncompatibleKeys(NamedTuple):
    """What ``load_state_dict(strict=False)`` left out, named as ``torch.nn.Module`` names it.

    Attributes:
        missing_keys: What is here and was not loaded, since it was not there or did not fit.
        unexpected_keys: What was there and is not here.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


class Saved(Protocol):
    """What this file needs of a `Preconditioner`."""

    layers: list[Layer]
    approximation: Approximation
    capture: Capture
    steps: int
    inversions: int
    refused: Tensor
    sampler: Sampler
    sharing: Sharing

    def part_of(self, layer: int) -> tuple[Approximation, int]: ...


# ---- one layer ------------------------------------------------------------------------------------------------------


def layer_states(preconditioner: Saved) -> list[dict[str, Tensor]]:
    """Copies of everything kept, layer by layer.

    Where ranks keep inverses that others do not have (`Distributed.share`), every rank must ask.
    """
    elsewhere = preconditioner.sharing.missing_state()
    return [
        {key: torch.stack(views) for key, views in _views(preconditioner, i).items()} | elsewhere.get(i, {})
        for i in range(len(preconditioner.layers))
    ]


def layer_keys(preconditioner: Saved, index: int) -> list[str]:
    """Of a layer's entry in `layer_states`."""
    return list(_views(preconditioner, index))


def load_layer_state(preconditioner: Saved, index: int, state: Mapping[str, Any]) -> None:
    """Copies one layer's state back; `check_layer_state` has looked at it."""
    for key, views in _views(preconditioner, index).items():
        for view, saved in zip(views, state[key], strict=True):
            view.copy_(saved)


def check_layer_state(preconditioner: Saved, index: int, state: Mapping[str, Any]) -> None:
    """Refuses what would not fit, before anything is changed.

    Raises:
        ValueError: A missing entry or another shape; the message names the layer and the entry.
    """
    name = preconditioner.layers[index].name
    for key, views in _views(preconditioner, index).items():
        check_tensor(state.get(key), key, (len(views), *views[0].shape), f"layer {name}")


def check_tensor(value: Any, key: str, shape: tuple[int, ...], owner: str) -> None:
    """Refuses what is not a tensor with content of this shape.

    Raises:
        ValueError: The message names the key and whose it is.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"state_dict has no {key!r} for {owner}: it is truncated or of another optimizer")
    if value.shape != shape:
        raise ValueError(f"state_dict has {key!r} of shape {tuple(value.shape)} for {owner}, expected {shape}")
    if value.is_meta:
        raise ValueError(f"state_dict has {key!r} without data (device meta) for {owner}")


def _views(preconditioner: Saved, index: int) -> dict[str, list[Tensor]]:
    part, own = preconditioner.part_of(index)
    return part.state(own)


# ---- the run as a whole ---------------------------------------------------------------------------------------------


def run_state(preconditioner: Saved) -> dict[str, Any]:
    """Counters and the sampler's seed: numbers, tensors and dicts of them."""
    order = preconditioner.approximation.order
    return {
        **({"order": order} if order else {}),  # sharded checkpoints lose empty dicts
        "step": preconditioner.steps,
        "inversions": preconditioner.inversions,
        "own_passes": preconditioner.capture.own_pass.count,
        "refused": preconditioner.refused.clone(),
        "approximation": {preconditioner.approximation.name: True},
        "sampler": preconditioner.sampler.seed,
    }


def check_run_state(preconditioner: Saved, state: Any) -> dict[str, Any]:
    """Refuses what is not a run's state, or of another approximation; gives back what it took.

    The approximation takes the order of the layers here, since the shapes of its state depend on it.

    Raises:
        ValueError: What is missing or different.
    """
    own = run_state(preconditioner)
    own.pop("order", None)
    missing = sorted(own) if not isinstance(state, dict) else sorted(set(own) - set(state))
    if missing:
        raise ValueError(f"state_dict has no {', '.join(map(repr, missing))}: it is truncated or not of a KFAC")
    for key in ("step", "inversions", "own_passes", "refused", "sampler"):
        if not (isinstance(state[key], (int, float)) or (isinstance(state[key], Tensor) and state[key].numel() == 1)):
            raise ValueError(f"state_dict must have a number as {key!r}, got {state[key]!r}")
    if set(state["approximation"]) != {preconditioner.approximation.name}:
        raise ValueError(
            f"state_dict is of approximation={next(iter(state['approximation']), None)!r}, the optimizer has "
            f"approximation={preconditioner.approximation.name!r}"
        )
    preconditioner.approximation.take_order(state.get("order", {}))
    return state


def load_run_state(preconditioner: Saved, state: Mapping[str, Any]) -> None:
    """Restores the counters and the sampler's seed."""
    preconditioner.steps = int(state["step"])
    preconditioner.inversions = int(state["inversions"])
    preconditioner.capture.own_pass.count = int(state["own_passes"])
    preconditioner.refused.copy_(state["refused"])
    preconditioner.sampler.seed = int(state["sampler"])


# ---- a preconditioner of its own ------------------------------------------------------------------------------------


def save(preconditioner: Saved) -> dict[str, Any]:
    """``{"layers": {name: …}, "run": …}``."""
    names = [layer.name for layer in preconditioner.layers]
    return {"layers": dict(zip(names, layer_states(preconditioner), strict=True)), "run": run_state(preconditioner)}


def load(preconditioner: Saved, state: Mapping[str, Any], strict: bool) -> IncompatibleKeys:
    """Restores what `save` gave; see `Preconditioner.load_state_dict`."""
    if not (isinstance(state, Mapping) and {"layers", "run"} <= set(state)):
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"state_dict must have 'layers' and 'run', got {found}")
    check_run_state(preconditioner, state["run"])
    own = {layer.name for layer in preconditioner.layers}
    unexpected = sorted(set(state["layers"]) - own)
    missing, fitting = [], []
    for i, layer in enumerate(preconditioner.layers):
        try:
            check_layer_state(preconditioner, i, state["layers"].get(layer.name, {}))
            fitting.append(i)
        except ValueError:
            if strict:
                raise
            missing.append(layer.name)
    if strict and unexpected:
        raise ValueError(f"state_dict has layers that are not in the model: {', '.join(unexpected)}")
    for i in fitting:
        load_layer_state(preconditioner, i, state["layers"][preconditioner.layers[i].name])
    load_run_state(preconditioner, state["run"])
    return IncompatibleKeys(missing, unexpected)
