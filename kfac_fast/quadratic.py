"""The quadratic model of the loss, restricted to a few directions, and its minimiser (sec. 6.4, 7)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Minimum:
    """Of M over the span of a natural gradient U and, perhaps, the last step δ₀.

    Attributes:
        natural: The coefficient of U: −α, minus the learning rate.
        mu: The coefficient of δ₀: μ, the momentum.
        change: M(δ) − M(0), never positive.
    """

    natural: float
    mu: float
    change: float

    @property
    def alpha(self) -> float:
        return -self.natural


def minimise_in_span(quadratic: Tensor, linear: Tensor) -> Minimum:
    """Solves the 2 × 2 system of sec. 7.

    Args:
        quadratic: ``[k, k]`` of (F + (λ+η)I) over U and, if k = 2, δ₀; float64, on the CPU.
        linear: ``[k]`` of ∇ᵀU and ∇ᵀδ₀.

    Returns:
        The minimiser; over U alone where δ₀ is absent, zero or (nearly) parallel to U, and no step at all where even
        that has no minimum.
    """
    (a, *_), (p, *_) = quadratic[0].tolist(), linear.tolist()
    if len(linear) == 2:
        b, c, q = float(quadratic[0, 1]), float(quadratic[1, 1]), float(linear[1])
        determinant = a * c - b * b
        if determinant > 1e-10 * a * c and a > 0:
            first, second = -(c * p - b * q) / determinant, -(a * q - b * p) / determinant
            return Minimum(first, second, 0.5 * (first * p + second * q))
    if not a > 0:
        return Minimum(0.0, 0.0, 0.0)
    return Minimum(-p / a, 0.0, -0.5 * p * p / a)
