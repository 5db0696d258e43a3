"""Checks of arguments; the messages name the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_GROUP_BOUNDS = {
    "momentum": {"at_least": 0.0, "below": 1.0},
    "damping": {"above": 0.0},
    "weight_decay": {"at_least": 0.0},
}


def check_range(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Raises a ValueError that names the argument unless the number is in range."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    low = above is None or (number and value > above)
    least = at_least is None or (number and value >= at_least)
    high = below is None or (number and value < below)
    most = at_most is None or (number and value <= at_most)
    if not (number and low and least and high and most):
        bounds = [f"> {above:g}"] if above is not None else []
        bounds += [f">= {at_least:g}"] if at_least is not None else []
        bounds += [f"< {below:g}"] if below is not None else []
        bounds += [f"<= {at_most:g}"] if at_most is not None else []
        raise ValueError(f"{name} must be a number {' and '.join(bounds) or 'that is finite'}, got {name}={value!r}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {name}={value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {name}={value!r}")


def check_group(group: Mapping[str, Any]) -> None:
    """The options of a parameter group of `KFAC`."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor with one element, got shape {tuple(lr.shape)}")
    else:
        check_range("lr", lr, at_least=0.0)
    for name, bounds in _GROUP_BOUNDS.items():
        check_range(name, group[name], **bounds)
    if group["kl_clip"] is not None:
        check_range("kl_clip", group["kl_clip"], above=0.0)
    if "highest_lr" in group:
        check_range("highest_lr", group["highest_lr"], at_least=0.0)
