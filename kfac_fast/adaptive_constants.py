"""The constants of the adaptive rule, and why they are what they are."""

from __future__ import annotations

from dataclasses import dataclass

from .arguments import check_choice, check_count, check_range

# λ tried by damping="auto", from safe to bold.
CALIBRATION = (100.0, 10.0, 1.0, 0.1, 0.01, 0.001, 1e-4, 1e-5)

# What λ changes by a step (sec. 6.5), and what it falls by while it settles.
OMEGA, SETTLING = 19 / 20, 0.7


@dataclass(frozen=True)
class Adaptive:
    """Constants of the adaptive rule (sec. 6.5, 6.6, 8, Algorithm 2); where a default is not the paper's it says why.

    Attributes:
        t1: Steps between adjustments of λ.
        t2: Steps between searches for γ.
        t3: Steps between updates of the inverses; the first three steps always update them. The paper has 20. Here
            inverses are cheap beside a pass over a large batch, and fresh ones make each step worth more.
        settle: Steps at the start in which a λ that ``damping="auto"`` has found falls by 0.7 a step, not by 19/20, and
            γ = √(λ+η) goes with it. The first step, from which that λ comes, may do little but learn the biases of the
            outputs, and the steps after it want a thousandth of what serves it best: so it is on a transformer, where
            30 is right (docs/convergence.md). 0 is the paper's rule.
        momentum: Whether the last step is part of the next one.
        product_fraction: Part of the batch for products with the exact Fisher (τ₂), of 200 examples at least.
        gamma: "search" tries γ and its neighbours every t2 steps (sec. 6.6); "sqrt" keeps γ = √(λ+η) (sec. 6.3)
            and tries none. On CURVES searching ends lower for each of three seeds: 40.6 against 41.5 on average after
            300 steps (docs/convergence.md).
        gamma_max: Upper end of the search. The paper has none; with products on part of a batch it can run off.
        averaging: Largest weight of the old average of the iterates, in [0, 1) (the paper has 0.99), or None for no
            average.
    """

    t1: int = 5
    t2: int = 20
    t3: int = 5
    settle: int = 0
    momentum: bool = True
    product_fraction: float = 0.25
    gamma: str = "search"
    gamma_max: float = 100.0
    averaging: float | None = None

    def __post_init__(self) -> None:
        for name in ("t1", "t2", "t3"):
            check_count(name, getattr(self, name))
        check_count("settle", self.settle, least=0)
        check_range("product_fraction", self.product_fraction, above=0.0, at_most=1.0)
        check_choice("gamma", self.gamma, ("search", "sqrt"))
        check_range("gamma_max", self.gamma_max, above=0.0)
        if self.averaging is not None:
            check_range("averaging", self.averaging, at_least=0.0, below=1.0)
