"""Threads, processes and memory: what the CPU kernels promise to whoever calls them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kfac_fast import BlockDiagonal, ops
from kfac_fast.ops import native

SIZES = [8] * 20 + [5, 33, 64, 65, 130, 400]  # groups of small ones, single ones, one for all threads


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def blocks(sizes: list[int] = SIZES) -> BlockDiagonal:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(2 * n, n, generator=generator) for n in sizes]
    return BlockDiagonal.pack([x.T @ x / len(x) for x in xs])


GIVEN = blocks()  # torch's own products would differ with the number of threads, and hang after a fork


def inverse() -> Tensor:
    return torch.cat([block.reshape(-1) for block in ops.damped_inverse(GIVEN, 0.1).inverse])


def factor(rows: list[Tensor]) -> Tensor:
    factors = BlockDiagonal.zeros([x.shape[1] for x in rows])
    ops.factor_update_(factors, rows, 0.0, 1.0)
    return torch.cat([block.reshape(-1) for block in factors])


def natural(n: int) -> list[Tensor]:
    shapes = [(n, n), (40, 3), (17, 300), (100, 61)]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    g, a = blocks([m for m, _ in shapes]), blocks([k for _, k in shapes])
    results, dot = ops.precondition(grads, g, a)
    return [*results, dot]


CALLS: dict[str, Callable[[], Tensor]] = {
    "damped_inverse": inverse,
    "factor_update_": lambda: factor(
        [torch.linspace(-1, 1, m * n).sin().view(m, n) for m, n in ((700, 260), (5000, 30), (256, 70), (9, 3))]
    ),
    "precondition": lambda: torch.cat([result.reshape(-1) for result in natural(300)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_bits_depend_neither_on_the_run_nor_on_the_number_of_threads(name: str) -> None:
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append(CALLS[name]())
    assert results[0].isfinite().all()
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [1, 3])
def test_set_num_threads_is_honoured(threads: int) -> None:
    script = (
        "import os, torch\n"
        "from kfac_fast import BlockDiagonal, ops\n"
        f"torch.set_num_threads({threads})\n"
        "def count(): return len(os.listdir('/proc/self/task'))\n"
        "before = count()\n"
        "blocks = BlockDiagonal([500] + [40] * 99, torch.zeros(BlockDiagonal.numel_for([500] + [40] * 99)))\n"
        "ops.damped_inverse(blocks, 1.0)\n"
        "print(count() - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == threads - 1


class Inverses(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return inverse()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(context: str) -> None:
    if context not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {context} here")
    torch.set_num_threads(2)
    expected = inverse()  # the parent's threads are there when it forks
    loader = DataLoader(Inverses(), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=100)
    batches = list(loader)
    assert len(batches) == 4
    for batch in batches:
        assert torch.equal(batch, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # the point of the test
def test_a_forked_child_computes() -> None:
    torch.set_num_threads(2)

    def result() -> list[bytes]:  # without torch's own parallel functions, which hang in a forked child
        return [block.numpy().tobytes() for block in ops.damped_inverse(GIVEN, 0.1).inverse]

    expected = result()
    child = os.fork()
    if child == 0:
        os._exit(0 if result() == expected else 1)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(done[1]) == 0


def test_threads_of_python_compute_side_by_side() -> None:
    torch.set_num_threads(2)
    expected = inverse()
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(inverse())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        assert torch.equal(result, expected)


def test_the_interpreter_is_free_meanwhile() -> None:
    torch.set_num_threads(1)
    work, damping = blocks([600] * 4), torch.full((4,), 0.1)
    span: list[float] = []

    def invert() -> None:
        span.append(time.perf_counter())
        ops.damped_inverse(work, damping)
        span.append(time.perf_counter())

    thread = threading.Thread(target=invert)
    ticks = []
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0)
    thread.join()
    begin, end = span
    # With the lock held throughout there would be none; a busy machine may leave few.
    inside = [t for t in ticks if begin + 0.2 * (end - begin) < t < begin + 0.8 * (end - begin)]
    assert inside


def workspace_of(call: Callable[[], object]) -> int:
    """Bytes that a call takes, found in a thread whose workspace is still empty."""
    sizes: list[int] = []

    def work() -> None:
        call()
        sizes.append(native._scratch.host.numel())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return sizes[0]


def test_workspace_is_bounded_by_the_largest_blocks_not_by_their_number() -> None:
    torch.set_num_threads(2)
    n = 300
    block = 4 * n * n
    calls: dict[str, Callable[[int], object]] = {
        "damped_inverse": lambda count: ops.damped_inverse(blocks([n, 40] * count), 0.1),
        "factor_update_": lambda count: ops.factor_update_(
            BlockDiagonal.zeros([n, 40] * count), [torch.zeros(50, n), torch.zeros(50, 40)] * count, 0.0, 1.0
        ),
        "precondition": lambda count: ops.precondition(
            [torch.zeros(n, n), torch.zeros(40, 40)] * count, blocks([n, 40] * count), blocks([n, 40] * count)
        ),
    }
    for name, call in calls.items():
        few, many = workspace_of(lambda call=call: call(12)), workspace_of(lambda call=call: call(24))
        assert few == many, name
        # Per thread: precondition packs four matrices of a layer; the others keep one block and panels of it.
        assert few <= 2 * (6 * block + (1 << 20)), name
