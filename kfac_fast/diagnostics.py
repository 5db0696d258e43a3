"""What is in this build, what this machine has, and whether the kernels agree with the reference."""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch
from torch import Tensor

from . import _C, ops
from .ops import BlockDiagonal, ConvRows
from .ops.native import cpu_table, cuda_table

# Sizes on both sides of every change of algorithm, small enough for a second or two.
_SIZES = (1, 3, 8, 16, 17, 32, 48, 70, 130)


def show_config() -> str:
    """Versions, devices, instruction set and CUDA architectures, a line each: put it into a bug report."""
    architectures = _C.cuda_architectures
    lines = [
        ("kfac_fast", _C.__version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        ("platform", f"{platform.system()} {platform.machine()}"),
        ("CPU kernels", f"{cpu_table.name} (built in and usable here: {', '.join(t.name for t in _C.cpu_tables())})"),
        ("CPU threads", str(torch.get_num_threads())),
        ("CUDA kernels", f"architectures {architectures}" if architectures else "not in this build (KFAC_FAST_CUDA)"),
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            lines.append((f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"))
    else:
        lines.append(("CUDA devices", "none"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def self_test(device: torch.device | str) -> list[tuple[str, float, float]]:
    """Runs every op natively and in the reference on small random input.

    Args:
        device: Where.

    Returns:
        ``(name, relative difference, bound)`` per op; a difference above its bound, or NaN, is a failure.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    rows = [randn(2 * n + 3, n) for n in _SIZES]
    images = ConvRows(randn(2, 5, 9, 8), 3, padding=1)
    factors = BlockDiagonal.zeros([*_SIZES, 46], device=device)
    bias = [False] * len(_SIZES) + [True]
    grads = [randn(n, n) for n in factors.sizes]

    def update() -> Tensor:
        result = BlockDiagonal(factors.sizes, torch.zeros_like(factors.data))
        ops.factor_update_(result, [*rows, images], 0.0, 0.01, bias=bias)
        return result.data

    factors.data.copy_(update())
    with ops.use_reference():
        inverses = ops.damped_inverse(factors, 0.1).inverse

    def commit() -> Tensor:
        result, pending = factors.clone(), factors.clone()
        ops.commit_(result, pending, 0.5, 0.25)
        return result.data

    checks: list[tuple[str, Callable[[], Tensor], float]] = [
        ("factor_update_", update, 1e-5),
        ("commit_", commit, 1e-6),
        ("damped_inverse", lambda: _flat(ops.damped_inverse(factors, 0.1).inverse), 1e-4),
        ("precondition", lambda: _natural(grads, inverses), 1e-5),
    ]  # fmt: skip
    results = []
    for name, run, bound in checks:
        native = run()
        with ops.use_reference():
            expected = run()
        results.append((name, float((native - expected).norm() / expected.norm()), bound))
    return results


def _natural(grads: list[Tensor], inverses: BlockDiagonal) -> Tensor:
    out = [torch.empty_like(g) for g in grads]
    ops.precondition(grads, inverses, inverses, out)
    return torch.cat([u.flatten() for u in out])


def _flat(blocks: BlockDiagonal) -> Tensor:
    return torch.cat([block.flatten() for block in blocks])


def main() -> int:
    """Prints `show_config` and the self-test; returns 1 when an op disagrees with the reference."""
    print(show_config())
    devices = ["cpu"]
    if cuda_table is not None and torch.cuda.is_available():
        devices.append("cuda")
    failed = False
    for device in devices:
        for name, difference, bound in self_test(device):
            good = difference <= bound
            failed |= not good
            print(f"self-test {device} {name:<15} {'ok' if good else 'FAILED'}  {difference:.1e} (at most {bound:.0e})")
    return int(failed)
