"""The update rule of Martens & Grosse 2015 for large batches: learning rate, momentum and damping set themselves.

With Δ = −U the natural gradient and δ₀ the last step, the step δ = αΔ + μδ₀ minimises the quadratic model
M(δ) = ½ δᵀ(F + (λ+η)I)δ + ∇ᵀδ + h over α and μ, where F is the exact Fisher, not its approximation (sec. 6.4, 7). How
well M predicts the loss sets λ (sec. 6.5); the smallest M sets γ (sec. 6.6).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_choice, check_count, check_range
from .preconditioner import ALWAYS_INVERT_FIRST, Preconditioner
from .products import fisher_quadratic_forms


@dataclass(frozen=True)
class Adaptive:
    """Constants of the adaptive rule (sec. 6.5, 6.6, 8, Algorithm 2); where a default is not the paper's it says why.

    Attributes:
        t1: Steps between adjustments of λ.
        t2: Steps between searches for γ.
        t3: Steps between updates of the inverses; the first three steps always update them. The paper has 20. Here
            inverses are cheap beside a pass over a large batch, and fresh ones make each step worth more.
        momentum: Whether the last step is part of the next one.
        product_fraction: Part of the batch for products with the exact Fisher (τ₂).
        gamma: "sqrt" keeps γ = √(λ+η) (sec. 6.3); "search" tries γ and its neighbours every t2 steps (sec. 6.6). On the
            CURVES autoencoder the search ends higher at equal steps, so "sqrt" is the default.
        gamma_max: Upper end of the search. The paper has none; with products on part of a batch it can run off.
        averaging: Largest weight of the old average of the iterates, in [0, 1) (the paper has 0.99), or None for no
            average.
    """

    t1: int = 5
    t2: int = 20
    t3: int = 5
    momentum: bool = True
    product_fraction: float = 0.25
    gamma: str = "sqrt"
    gamma_max: float = 100.0
    averaging: float | None = None

    def __post_init__(self) -> None:
        for name in ("t1", "t2", "t3"):
            check_count(name, getattr(self, name))
        check_range("product_fraction", self.product_fraction, above=0.0, at_most=1.0)
        check_choice("gamma", self.gamma, ("search", "sqrt"))
        check_range("gamma_max", self.gamma_max, above=0.0)
        if self.averaging is not None:
            check_range("averaging", self.averaging, at_least=0.0, below=1.0)


# λ tried by damping="auto", from safe to bold.
CALIBRATION = (100.0, 10.0, 1.0, 0.1, 0.01, 0.001, 1e-4, 1e-5)


@dataclass(frozen=True)
class Step:
    """A minimiser of M over the span of Δ and δ₀.

    Attributes:
        alpha: α, the learning rate.
        mu: μ, the momentum.
        change: M(δ) − M(0), never positive.
    """

    alpha: float
    mu: float
    change: float


def minimise_in_span(quadratic: Tensor, linear: Tensor) -> Step:
    """Solves the 2 × 2 system of sec. 7.

    Args:
        quadratic: ``[k, k]`` of (F + (λ+η)I) over Δ and, if k = 2, δ₀; float64.
        linear: ``[k]`` of ∇ᵀΔ and ∇ᵀδ₀.

    Returns:
        The minimiser; over Δ alone where δ₀ is absent, zero or (nearly) parallel to Δ, and no step at all where even
        that has no minimum.
    """
    (a, *_), (p, *_) = quadratic[0].tolist(), linear.tolist()
    if len(linear) == 2:
        b, c, q = float(quadratic[0, 1]), float(quadratic[1, 1]), float(linear[1])
        determinant = a * c - b * b
        if determinant > 1e-10 * a * c and a > 0:
            alpha, mu = -(c * p - b * q) / determinant, -(a * q - b * p) / determinant
            return Step(alpha, mu, 0.5 * (alpha * p + mu * q))
    if not a > 0:
        return Step(0.0, 0.0, 0.0)
    alpha = -p / a
    return Step(alpha, 0.0, 0.5 * alpha * p)


class AdaptiveRule:
    """Carries out `Adaptive` for a `Preconditioner`.

    Args:
        preconditioner: Gives the natural gradients.
        parameters: All parameters to train; those without a block step along −∇/(λ+η).
        config: The constants.
        damping: λ at the start; "auto" finds it on the first batch (see `_calibrate`).
        weight_decay: η, the ℓ2 coefficient: h and ∇ include (η/2)|θ|².
    """

    def __init__(
        self,
        preconditioner: Preconditioner,
        parameters: list[nn.Parameter],
        config: Adaptive,
        damping: float | str,
        weight_decay: float,
    ) -> None:
        self.preconditioner = preconditioner
        self.config = config
        self.calibrated = not isinstance(damping, str)
        self.damping = CALIBRATION[0] if isinstance(damping, str) else damping
        self.weight_decay = weight_decay
        self.gamma = math.sqrt(self.damping + weight_decay)
        covered = {id(p) for p in preconditioner.covered}
        self.parameters = preconditioner.covered + [p for p in parameters if id(p) not in covered]
        dtype = preconditioner.results_flat.dtype
        for p in self.parameters:
            if p.dtype != dtype:
                raise ValueError(f"adaptive needs all parameters in {dtype}, got one in {p.dtype}")
        names = {id(p): name for name, p in preconditioner.model.named_parameters()}
        self._names = [names[id(p)] for p in self.parameters]
        self.last = torch.cat([torch.zeros_like(p).flatten() for p in self.parameters])  # δ₀
        self.average = None if config.averaging is None else torch.cat([p.detach().flatten() for p in self.parameters])
        self.rejected = 0
        self.stats: dict[str, float] = {}
        preconditioner.capture.keep_batches = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor], evaluate: Callable[[], Tensor] | None = None) -> Tensor:
        """One step of Algorithm 2.

        A loss or gradient that is not finite changes nothing but λ, which grows; a step after which the loss is not
        finite is taken back bit for bit.

        Args:
            closure: Clears gradients, runs the model on the batch, the backward pass, and returns the loss.
            evaluate: Returns the loss on the same batch without a backward pass; None uses the closure.
        """
        config, pre = self.config, self.preconditioner
        pre.capture.forget()
        with torch.enable_grad():
            loss = closure()
        batches = pre.capture.batches
        if not batches:
            raise RuntimeError("step(closure): the closure must run the model's forward and the loss's backward pass")
        theta = torch.cat([p.detach().flatten() for p in self.parameters])
        gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters])
        value = float(loss.detach()) + self._penalty(theta)
        if not (math.isfinite(value) and bool(gradient.isfinite().all())):
            self._grow_damping()
            self.rejected += 1
            return loss
        gradient.add_(theta, alpha=self.weight_decay)

        pre.update_factors()
        if not self.calibrated:
            self._calibrate(theta, gradient, batches, closure, evaluate)
        k = pre.steps
        if k % config.t3 == 0 or pre.inversions < ALWAYS_INVERT_FIRST:
            direction, step = self._invert(gradient, batches, search=k > 0 and k % config.t2 == 0)
        else:
            direction, step = self._propose(gradient, batches)
        delta = direction.mul_(step.alpha)
        if step.mu:
            delta.add_(self.last, alpha=step.mu)
        self._write(theta + delta)
        pre.steps += 1
        self.stats = {
            "loss": value,
            "damping": self.damping,
            "gamma": self.gamma,
            "alpha": step.alpha,
            "mu": step.mu,
            "model_change": step.change,
        }
        if pre.steps % config.t1 == 0 and not self._adjust_damping(value, step, closure, evaluate):
            self._write(theta)
            self.last.zero_()
            self.rejected += 1
            return loss
        self.last = delta
        self._update_average(theta.add_(delta))
        return loss

    def _propose(self, gradient: Tensor, batches: list[Any]) -> tuple[Tensor, Step]:
        """Δ with the inverses at hand, and the minimiser over it and δ₀."""
        direction = self._direction(gradient)
        directions = [direction]
        if self.config.momentum and bool(self.last.any()):
            directions.append(self.last)
        damping = self.damping + self.weight_decay
        quadratic = self._fisher_forms(batches, directions)
        for i, u in enumerate(directions):
            for j, v in enumerate(directions[: i + 1]):
                quadratic[i, j] += damping * float(torch.dot(u, v))
                quadratic[j, i] = quadratic[i, j]
        linear = torch.tensor([float(torch.dot(gradient, u)) for u in directions], dtype=torch.float64)
        return direction, minimise_in_span(quadratic, linear)

    def _invert(self, gradient: Tensor, batches: list[Any], *, search: bool) -> tuple[Tensor, Step]:
        """`_propose` with new inverses; when searching, with the γ among three that has the lowest M (sec. 6.6)."""
        pre, config = self.preconditioner, self.config
        floor = math.sqrt(self.weight_decay)
        if config.gamma == "sqrt":
            candidates = [math.sqrt(self.damping + self.weight_decay)]
        elif search:
            omega = math.sqrt(19 / 20) ** config.t2
            candidates = [
                min(max(g, floor), config.gamma_max) for g in (self.gamma, omega * self.gamma, self.gamma / omega)
            ]
            candidates = list(dict.fromkeys(candidates))
        else:
            candidates = [self.gamma]
        best: tuple[tuple[Tensor, Step], float, list[Tensor]] | None = None
        for gamma in candidates:
            pre.update_inverses([gamma] * len(pre.layers))
            proposal = self._propose(gradient, batches)
            if best is None or proposal[1].change < best[0][1].change:
                best = proposal, gamma, pre.copy_inverses() if len(candidates) > 1 else []
        assert best is not None
        proposal, self.gamma, inverses = best
        if inverses:
            pre.restore_inverses(inverses)
        return proposal

    def _direction(self, gradient: Tensor) -> Tensor:
        pre = self.preconditioner
        pieces = gradient.split([p.numel() for p in self.parameters])
        covered = len(pre.covered)
        pre.precondition([piece.view(p.shape) for piece, p in zip(pieces[:covered], pre.covered, strict=True)])
        plain = [piece / (self.damping + self.weight_decay) for piece in pieces[covered:]]
        return torch.cat([pre.results_flat, *plain]).neg_()

    def _fisher_forms(self, batches: list[Any], directions: list[Tensor]) -> Tensor:
        pre, capture = self.preconditioner, self.preconditioner.capture
        tangents = []
        for direction in directions:
            pieces = direction.split([p.numel() for p in self.parameters])
            tangents.append(
                {name: piece.view(p.shape) for name, piece, p in zip(self._names, pieces, self.parameters, strict=True)}
            )
        total = torch.zeros(len(directions), len(directions), dtype=torch.float64)
        terms = 0.0
        for inputs, counted in batches:
            part, chosen = inputs, slice(None)
            if self.config.product_fraction < 1 and inputs.divisible:
                part, chosen = inputs.part(self.config.product_fraction, pre.steps)
            with capture.paused():
                forms = fisher_quadratic_forms(
                    pre.model, capture.likelihood, capture.find_outputs, part, counted[chosen], tangents
                )
            weight = float(counted[chosen].sum())
            total += weight * forms
            terms += weight
        return total / max(terms, 1.0)

    def _calibrate(
        self,
        theta: Tensor,
        gradient: Tensor,
        batches: list[Any],
        closure: Callable[[], Tensor],
        evaluate: Callable[[], Tensor] | None,
    ) -> None:
        """Takes the λ of `CALIBRATION` whose first step lowers the loss most; λ is tried downwards while that improves.

        From far above it the rule of sec. 6.5 would need hundreds of steps to come down, since λ falls by at most 19/20
        a step.
        """
        best, lowest = CALIBRATION[0], math.inf
        for damping in CALIBRATION:
            self.damping = damping
            self.gamma = math.sqrt(damping + self.weight_decay)
            self.preconditioner.update_inverses([self.gamma] * len(self.preconditioner.layers))
            direction, step = self._propose(gradient, batches)
            self._write(theta + direction.mul_(step.alpha))
            after = self._loss_now(closure, evaluate)
            self._write(theta)
            if not after < lowest:
                break
            best, lowest = damping, after
        self.damping = best
        self.gamma = math.sqrt(self.damping + self.weight_decay)
        self.calibrated = True

    def _loss_now(self, closure: Callable[[], Tensor], evaluate: Callable[[], Tensor] | None) -> float:
        """The loss with the penalty at the present parameters, unseen by the capture."""
        with self.preconditioner.capture.paused():
            if evaluate is not None:
                loss = float(evaluate())
            else:
                with torch.enable_grad():
                    loss = float(closure().detach())
        return loss + self._penalty(torch.cat([p.detach().flatten() for p in self.parameters]))

    def _adjust_damping(
        self, value: float, step: Step, closure: Callable[[], Tensor], evaluate: Callable[[], Tensor] | None
    ) -> bool:
        """Levenberg–Marquardt (sec. 6.5); whether the step may stay."""
        after = self._loss_now(closure, evaluate)
        ratio = (after - value) / step.change if step.change else math.nan
        self.stats["ratio"] = ratio
        self.stats["loss_after"] = after
        if not math.isfinite(after) or not ratio >= 0.25:
            self._grow_damping()
        elif ratio > 0.75:
            self.damping *= self._omega()
        return math.isfinite(after)

    def _omega(self) -> float:
        return (19 / 20) ** self.config.t1

    def _grow_damping(self) -> None:
        self.damping /= self._omega()

    def _penalty(self, theta: Tensor) -> float:
        return 0.5 * self.weight_decay * float(torch.dot(theta, theta)) if self.weight_decay else 0.0

    def _write(self, theta: Tensor) -> None:
        pieces = theta.split([p.numel() for p in self.parameters])
        torch._foreach_copy_(
            [p.detach() for p in self.parameters],
            [x.view(p.shape) for x, p in zip(pieces, self.parameters, strict=True)],
        )

    def _update_average(self, theta: Tensor) -> None:
        if self.average is not None and self.config.averaging is not None:
            keep = min(1 - 1 / self.preconditioner.steps, self.config.averaging)
            self.average.lerp_(theta, 1 - keep)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the preconditioner's own state."""
        return {
            "damping": self.damping,
            "gamma": self.gamma,
            "calibrated": self.calibrated,
            "rejected": self.rejected,
            "last": self.last.clone(),
            "average": None if self.average is None else self.average.clone(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores `state`."""
        self.damping, self.gamma = state["damping"], state["gamma"]
        self.calibrated, self.rejected = state["calibrated"], state["rejected"]
        self.last.copy_(state["last"])
        if self.average is not None and state["average"] is not None:
            self.average.copy_(state["average"])

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged parameters (sec. 8); afterwards its own again.

        Raises:
            RuntimeError: ``averaging`` is None.
        """
        if self.average is None:
            raise RuntimeError("no average is kept: pass adaptive=Adaptive(averaging=0.99)")
        with torch.no_grad():
            own = torch.cat([p.detach().flatten() for p in self.parameters])
            self._write(self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                self._write(own)
