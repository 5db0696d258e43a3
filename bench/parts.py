"""Where the time of a K-FAC step goes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kfac_fast import KFAC
from kfac_fast.ops import native

from .workloads import Workload

# Forward and backward pass as SGD has them; what the hooks add to them; running averages; inverses; natural gradients;
# clip, momentum and the new parameters.
PARTS = ("model", "capture", "factors", "inverses", "preconditioning", "update")
STEPS = 5  # of each kind


class Stopwatch:
    """Seconds by part, of calls; what is spent in a part inside another does not count for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[tuple[str, float]] = []  # names, and seconds spent in parts inside

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self._open.append((name, 0.0))
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            _, inside = self._open.pop()
            self.seconds[name] += spent - inside
            if self._open:
                outer, others = self._open[-1]
                self._open[-1] = (outer, others + spent)

    @property
    def current(self) -> str:
        return self._open[-1][0]

    def timed(self, call: Callable[..., Any], name: str | None = None, suffix: str = "") -> Callable[..., Any]:
        """The call, timed as a part; None is the part that it is in, and a suffix."""

        def wrapped(*arguments: Any, **named: Any) -> Any:
            with self.part(name or self.current + suffix):
                return call(*arguments, **named)

        return wrapped


@contextlib.contextmanager
def _watched(optimizer: KFAC, watch: Stopwatch) -> Iterator[None]:
    """Inside, the optimizer's work is timed by part, and the native calls apart from what is around them."""
    p, run = optimizer.preconditioner, native._run
    names = {"update_factors": "factors", "update_inverses": "inverses", "precondition": "preconditioning"}
    for method, name in names.items():
        setattr(p, method, watch.timed(getattr(p, method), name))
    native._run = watch.timed(run, suffix=" kernels")
    try:
        yield
    finally:
        native._run = run
        for method in names:
            delattr(p, method)


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
