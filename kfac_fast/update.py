"""The update rule: momentum, decoupled weight decay, and the new parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def update_parameters(
    group: dict[str, Any],
    parameters: list[Tensor],
    directions: list[Tensor],
    buffers: list[Tensor],
    gate: Tensor | None,
) -> None:
    """One step of a parameter group, in place: b ← μb + d, w ← (1 − lr·wd) w − lr·(d + μb, or b without Nesterov).

    Args:
        group: Its ``lr``, ``momentum``, ``nesterov``, ``weight_decay`` and ``maximize``.
        parameters: w.
        directions: d, natural or plain gradients; zeros where ``gate`` is False.
        buffers: b, one per parameter, or none where ``momentum`` is 0.
        gate: With one that is False on the device nothing changes; None is a step that the host knows to be good.
    """
    lr, momentum = float(group["lr"]), group["momentum"]
    if group["weight_decay"]:
        shrink = 1 - lr * group["weight_decay"]
        torch._foreach_mul_(parameters, shrink if gate is None else torch.where(gate, shrink, 1.0))
    if group["maximize"]:
        lr = -lr
    entries = list(zip(parameters, directions, buffers or directions, strict=True))
    fused = [gate is None and _fits_one_pass(*entry) for entry in entries]
    together = [entry for entry, fits in zip(entries, fused, strict=True) if fits]
    if together:
        w, d, b = map(list, zip(*together, strict=True))
        torch._fused_sgd_(
            w, d, b if momentum else [], weight_decay=0.0, momentum=momentum, lr=lr, dampening=0.0,
            nesterov=group["nesterov"] and momentum > 0, maximize=False, is_first_step=False,
        )  # fmt: skip
        torch.autograd.graph.increment_version(w)  # the fused operation does not
    rest = [entry for entry, fits in zip(entries, fused, strict=True) if not fits]
    if rest:
        w, d, b = map(list, zip(*rest, strict=True))
        if momentum:
            # A skipped step must not decay the buffer either.
            torch._foreach_mul_(b, momentum if gate is None else torch.where(gate, momentum, 1.0))
            torch._foreach_add_(b, d)
            d = list(torch._foreach_add(d, b, alpha=momentum)) if group["nesterov"] else b
        if gate is not None:
            d = list(torch._foreach_mul(d, gate.to(d[0].dtype.to_real())))
        torch._foreach_add_(w, d, alpha=-lr)


def _fits_one_pass(w: Tensor, d: Tensor, b: Tensor) -> bool:
    """Whether torch's fused operation on the CPU is right for these: it goes through memory as that lies.

    There it is three to five times as fast as one operation at a time. On a GPU these run in few launches anyway.
    """
    return (
        w.device.type == "cpu"
        and w.dtype == d.dtype == b.dtype
        and not w.is_complex()
        and w.is_contiguous()
        and d.is_contiguous()
        and b.is_contiguous()
    )
