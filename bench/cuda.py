"""The CUDA kernels against torch and CuPy on a GPU: ``python -m bench.cuda``. `make gpu` runs it."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kfac_fast import BlockDiagonal, ops

from .harness import readable

REPEATS = 11
DAMPING = 0.1


def milliseconds(run: Callable[[], Any], stretch: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(stretch):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / stretch


def compare(case: str, rival: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> str:
    """A row of the table: medians and the median ratio of alternating repeats."""
    counts = []
    for run in (ours, theirs):
        run()
        torch.cuda.synchronize()
        counts.append(max(1, round(20 / max(milliseconds(run, 1), 1e-3))))
    pairs = [(milliseconds(ours, counts[0]), milliseconds(theirs, counts[1])) for _ in range(REPEATS)]
    mine, other = (statistics.median(pair[i] for pair in pairs) * 1e-3 for i in (0, 1))
    ratio = statistics.median(b / a for a, b in pairs)
    return f"| {case} | {readable(mine)} | {readable(other)} ({rival}) | **{ratio:.2f}** |"


def well_conditioned(n: int) -> Tensor:
    x = torch.randn(2 * n, n, device="cuda")
    return x.T @ x / (2 * n)


def inverse(c: Tensor) -> Tensor:
    damped = c + DAMPING * torch.eye(c.shape[-1], device=c.device)
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(damped).L)


def inverses() -> list[str]:
    rows = []
    for count, n in (
        (4096, 8),
        (1024, 16),
        (1024, 32),
        (256, 64),
        (64, 128),
        (64, 256),
        (64, 512),
        (16, 1024),
        (64, 2048),
    ):
        singles = [well_conditioned(n) for _ in range(count)]
        blocks, stack = BlockDiagonal.pack(singles), torch.stack(singles)
        out = blocks.empty_like()
        case = f"damped_inverse, {count} × {n}²"

        def ours(blocks: BlockDiagonal = blocks, out: BlockDiagonal = out) -> None:
            ops.damped_inverse(blocks, DAMPING, out)

        rows.append(compare(case, "torch.linalg, stacked", ours, lambda stack=stack: inverse(stack)))
        if count <= 256:
            looped = lambda singles=singles: [inverse(c) for c in singles]
            rows.append(compare(case, "torch.linalg, looped", ours, looped))
        if importlib.util.find_spec("cupy") is not None:
            import cupy

            theirs = cupy.from_dlpack(stack)
            rows.append(compare(case, "cupy.linalg.inv", ours, lambda theirs=theirs: cupy.linalg.inv(theirs)))
    sizes = torch.randint(8, 513, (200,)).tolist()
    singles = [well_conditioned(n) for n in sizes]
    mixed = BlockDiagonal.pack(singles)
    out = mixed.empty_like()
    rows.append(
        compare(
            "damped_inverse, 200 blocks of 8…512", "torch.linalg, looped",
            lambda: ops.damped_inverse(mixed, DAMPING, out), lambda: [inverse(c) for c in singles],
        )
    )  # fmt: skip
    return rows


def factor_updates() -> list[str]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for m, n in ((256, 256), (8192, 64), (8192, 256), (8192, 512), (8192, 1024)):
            x = torch.randn(m, n, device="cuda").to(dtype)
            factor, c = BlockDiagonal.zeros([n], device=x.device), torch.zeros(n, n, device="cuda", dtype=dtype)
            rows.append(
                compare(
                    f"factor_update_, {m} rows, {n}², {str(dtype).removeprefix('torch.')}", "torch.addmm",
                    lambda factor=factor, x=x: ops.factor_update_(factor, [x], 0.95, 0.05),
                    lambda c=c, x=x: torch.addmm(c, x.T, x, beta=0.95, alpha=0.05, out=c),
                )
            )  # fmt: skip
    return rows


def natural_gradients() -> list[str]:
    rows = []
    for name, sizes in (("200 layers of 8…128", torch.randint(8, 129, (200,)).tolist()), ("50 × 512²", [512] * 50)):
        inverse_blocks = BlockDiagonal.pack([well_conditioned(n) for n in sizes])
        singles = [block.contiguous() for block in inverse_blocks]
        gradients = [torch.randn(n, n, device="cuda") for n in sizes]
        results = [torch.empty_like(v) for v in gradients]

        def ours(b: BlockDiagonal = inverse_blocks, v: list = gradients, u: list = results) -> None:
            ops.precondition(v, b, b, u)

        pairs = lambda s=singles, v=gradients: [g @ x @ g for g, x in zip(s, v, strict=True)]
        rows.append(compare(f"precondition, {name}", "two mm a layer", ours, pairs))
        if hasattr(torch, "_foreach_mm"):
            foreach = lambda s=singles, v=gradients: torch._foreach_mm(torch._foreach_mm(s, v), s)
            rows.append(compare(f"precondition, {name}", "torch._foreach_mm", ours, foreach))
    return rows


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured")
        return
    torch.manual_seed(0)
    print("| case | ours | rival | rival's time / ours |\n|---|---|---|---|")
    for part in (inverses, factor_updates, natural_gradients):
        for row in part():
            print(row, flush=True)


if __name__ == "__main__":
    main()
