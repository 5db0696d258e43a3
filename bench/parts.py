"""Where the time of a K-FAC step goes."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from kfac_fast import KFAC
from kfac_fast.ops import native

from .stopwatch import Stopwatch
from .workloads import Workload

# Forward and backward pass as SGD has them; what the hooks add to them; running averages; inverses; natural gradients;
# clip, momentum and the new parameters.
PARTS = ("model", "capture", "factors", "inverses", "preconditioning", "update")
STEPS = 2  # of each kind


@contextlib.contextmanager
def _watched(optimizer: KFAC, watch: Stopwatch) -> Iterator[None]:
    """Inside, the optimizer's work is timed by part, and the native calls apart from what is around them."""
    p = optimizer.preconditioner
    methods = {"update_factors": "factors", "update_inverses": "inverses", "precondition": "preconditioning"}
    undo = [watch.wrap(p, method, name) for method, name in methods.items()] + [watch.wrap(native, "_run")]
    try:
        yield
    finally:
        for one in undo:
            one()


def split(
    workload: Workload, optimizer: KFAC, kinds: dict[int, float], sgd: torch.optim.Optimizer, models: tuple[Any, Any]
) -> dict[str, float]:
    """Milliseconds of a step by part, kinds of steps by their frequency; "kernels" and "python" of them.

    "python" is what optimizer.step() spends outside the kernels, without the part "update", which is torch's.

    Args:
        workload: The network and its batch.
        optimizer: After steps that have warmed it up.
        kinds: Number of a step of each kind, and its frequency.
        sgd: Rival, whose passes through the model are what K-FAC's are compared with.
        models: K-FAC's and SGD's.
    """
    watch, total = Stopwatch(), defaultdict(float)
    with _watched(optimizer, watch):
        for number, frequency in kinds.items():
            watch.seconds.clear()
            for _ in range(STEPS):
                with watch.part("plain"):
                    sgd.zero_grad()
                    workload.backward(models[1])
                sgd.step()
                optimizer.preconditioner.steps = number
                with watch.part("model"):
                    optimizer.zero_grad()
                    workload.backward(models[0])
                with watch.part("update"):
                    optimizer.step()
            for name, seconds in watch.seconds.items():
                total[name] += 1e3 * frequency * seconds / STEPS
    kernels = {name.removesuffix(" kernels"): x for name, x in total.items() if name.endswith(" kernels")}
    in_step = ("factors", "inverses", "preconditioning")
    return {
        "model": total["plain"],
        "capture": total["model"] - total["plain"],
        "factors": total["factors"] + kernels.get("factors", 0.0) + kernels.get("model", 0.0),
        "inverses": total["inverses"] + kernels.get("inverses", 0.0),
        "preconditioning": total["preconditioning"] + kernels.get("preconditioning", 0.0),
        "update": total["update"],
        "kernels": sum(kernels.values()),
        "python": sum(total[name] for name in in_step),
    }
