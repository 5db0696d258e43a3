"""`Stopwatch`: how long the parts of something take."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any


class Stopwatch:
    """Seconds of parts of a step; a part inside another is taken from it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._inner = [0.0]

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._open.append(name)
        self._inner.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._open.pop()
            self.seconds[name] += spent - self._inner.pop()
            self._inner[-1] += spent

    def wrap(self, owner: Any, method: str, name: str | None = None) -> Callable[[], None]:
        """Counts a method's time as a part; None: as "kernels" of the part it is called in. The result undoes it."""
        original, own = getattr(owner, method), method in vars(owner)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name or f"{self._open[-1]} kernels"):
                return original(*args, **kwargs)

        setattr(owner, method, timed)
        return lambda: setattr(owner, method, original) if own else delattr(owner, method)
