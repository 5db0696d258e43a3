"""Tests whose body runs in several processes at once, as the ranks of one gloo group.

``@on_ranks(2)`` turns a function ``f(rank, size)`` into a test: its body runs in every rank, and what a rank raises
fails the test. The processes of a size are started once and serve all tests; every wait has a time limit, and ranks
that exceed it are killed and started anew for the next test.
"""

from __future__ import annotations

import atexit
import datetime
import importlib
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
START_SECONDS = 90  # importing torch on a busy machine
CALL_SECONDS = 60
COLLECTIVE_SECONDS = 20


class _Pool:
    """The ranks of one group, waiting for names of functions on their standard input."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
        store = Path(self._folder.name) / "store"
        self._ranks = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(size), str(store)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            for rank in range(size)
        ]
        self._answers(START_SECONDS)

    def call(self, module: str, name: str, arguments: dict[str, Any]) -> None:
        """Runs a function in all ranks.

        Raises:
            AssertionError: With the tracebacks of the ranks that raised, or did not answer in time.
        """
        for process in self._ranks:
            assert process.stdin is not None
            pickle.dump((module, name, arguments), process.stdin)
            process.stdin.flush()
        failed = [(rank, text) for rank, text in enumerate(self._answers(CALL_SECONDS)) if text]
        if failed:  # the others may have been left in the middle of a collective
            self.kill()
        assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed)

    def _answers(self, seconds: float) -> list[str]:
        answers: list[str] = ["no answer"] * len(self._ranks)

        def read(rank: int) -> None:
            try:
                answers[rank] = pickle.load(self._ranks[rank].stdout)  # type: ignore[arg-type]
            except EOFError:
                answers[rank] = "it ended"

        threads = [threading.Thread(target=read, args=(rank,), daemon=True) for rank in range(len(self._ranks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds)
        if any(thread.is_alive() for thread in threads):
            self.kill()
            raise AssertionError(f"no answer within {seconds} s from ranks {_pending(threads)}; answers: {answers}")
        return answers

    @property
    def alive(self) -> bool:
        return all(process.poll() is None for process in self._ranks)

    def kill(self) -> None:
        for process in self._ranks:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self._folder.cleanup()


def _pending(threads: list[threading.Thread]) -> list[int]:
    return [rank for rank, thread in enumerate(threads) if thread.is_alive()]


_pools: dict[int, _Pool] = {}


@atexit.register
def stop() -> None:
    """Ends all ranks."""
    while _pools:
        _pools.popitem()[1].kill()


def on_ranks(size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the test's body runs in this many ranks, with ``rank`` and ``size`` and its other arguments."""

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        def test(**arguments: Any) -> None:
            if size not in _pools or not _pools[size].alive:
                _pools[size] = _Pool(size)
            _pools[size].call(body.__module__, body.__name__, arguments)

        asked = inspect.signature(body).parameters
        # pytest reads there which parameters the test has.
        test.__signature__ = inspect.Signature([p for n, p in asked.items() if n not in ("rank", "size")])  # type: ignore[attr-defined]
        test.__name__, test.__module__, test.__doc__ = body.__name__, body.__module__, body.__doc__
        test.body = body  # type: ignore[attr-defined]
        return test

    return decorate


def _serve(rank: int, size: int, store: str) -> None:
    """In a rank: answers every call with a traceback, or nothing."""
    import torch
    import torch.distributed as dist

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints go to standard error
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    pickle.dump("", answers)
    answers.flush()
    while True:
        try:
            module, name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        answer = ""
        try:
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
                getattr(importlib.import_module(module), name).body(rank=rank, size=size, **arguments)
        except (Exception, pytest.fail.Exception):
            answer = traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
