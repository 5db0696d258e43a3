"""Forward error of float32 inverses, ours beside LAPACK's: ``python -m bench.accuracy``. Prints a Markdown table."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_fast import BlockDiagonal, ops

SIZES = (16, 64, 256, 1024)
CONDITIONS = tuple(10.0**k for k in range(8))
NUMBERS = 1 << 16  # in the matrices of a median: errors of small ones differ by several times
FEWEST = 5


def matrix(n: int, condition: float, generator: torch.Generator) -> Tensor:
    """Symmetric positive definite in float64, eigenvalues spaced geometrically from 1 down to 1/condition."""
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    values = torch.logspace(0, -1, n, base=condition, dtype=torch.float64) if condition > 1 else torch.ones(n).double()
    return (q * values) @ q.T


def errors(n: int, condition: float) -> tuple[float, float]:
    """Median relative error |X − C⁻¹| / |C⁻¹| (Frobenius) of ours and of LAPACK's; infinite where it fails."""
    generator = torch.Generator().manual_seed(n)
    ours, lapack = [], []
    matrices = [matrix(n, condition, generator).float() for _ in range(max(FEWEST, NUMBERS // n**2))]
    inverses, info = ops.damped_inverse(BlockDiagonal.pack(matrices), 0.0)
    for rounded, inverse, failure in zip(matrices, inverses, info.tolist(), strict=True):
        exact = torch.cholesky_inverse(torch.linalg.cholesky_ex(rounded.double()).L)
        factor, failed = torch.linalg.cholesky_ex(rounded)
        ours.append(float((inverse - exact).norm() / exact.norm()) if not failure else float("inf"))
        found = torch.cholesky_inverse(factor) if not int(failed) else torch.full_like(rounded, torch.inf)
        lapack.append(float((found - exact).norm() / exact.norm()))
    return sorted(ours)[len(ours) // 2], sorted(lapack)[len(lapack) // 2]


def main() -> None:
    print("| condition | " + " | ".join(f"n = {n}: ours | LAPACK" for n in SIZES) + " |")
    print("|---" * (2 * len(SIZES) + 1) + "|")
    for condition in CONDITIONS:
        cells = [f"{value:.1e}" for n in SIZES for value in errors(n, condition)]
        print(f"| {condition:.0e} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
