"""The update rule of Martens & Grosse 2015 for large batches: learning rate, momentum and damping set themselves.

With U the natural gradient and δ₀ the last step, the step δ = −αU + μδ₀ minimises the quadratic model
M(δ) = ½ δᵀ(F + (λ+η)I)δ + ∇ᵀδ + h over α and μ, where F is the exact Fisher, not its approximation (sec. 6.4, 7). How
well M predicts the loss sets λ (sec. 6.5); the smallest M sets γ (sec. 6.6).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .adaptive_constants import CALIBRATION, OMEGA, SETTLING, Adaptive
from .loss_check import LossCheck
from .passes import Surroundings, unnoticed
from .preconditioner import ALWAYS_INVERT_FIRST, Preconditioner
from .products import FisherProducts
from .quadratic import Minimum, minimise_in_span
from .tape import Batch
from .vectors import ParameterVector

Closure = Callable[[], Tensor]

# Fewer examples miss directions in which the loss is curved, and a step along them then throws the model far off.
LEAST_EXAMPLES = 200


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
        self.settles = isinstance(damping, str)  # whether λ is to come down faster at first
        self.damping = CALIBRATION[0] if isinstance(damping, str) else damping
        self.weight_decay = weight_decay
        self.gamma = self._balanced_gamma()
        covered = {id(p) for p in preconditioner.covered}
        self.parameters = [*preconditioner.covered, *(p for p in parameters if id(p) not in covered)]
        dtype = preconditioner.results_flat.dtype
        if preconditioner.sharing.sharded:
            raise ValueError("adaptive does not take sharded models; use DistributedDataParallel")
        for p in self.parameters:
            if p.dtype != dtype:
                raise ValueError(f"adaptive needs all parameters in {dtype}, got one in {p.dtype}")
        self._tensors: list[Tensor] = list(self.parameters)
        names = {id(p): name for name, p in preconditioner.model.named_parameters()}
        self._names = [names[id(p)] for p in self.parameters]
        self._gradient = self._vector()  # ∇, with the ℓ2 term
        whole = len(self.parameters) == len(preconditioner.covered)
        self._natural = self._vector(preconditioner.results_flat if whole else None)  # U
        self.last = self._vector()  # δ₀
        self._has_last = False  # whether it is not zero
        self._origin = self._vector()  # θ before a step that may be taken back
        self.average = None if config.averaging is None else self._vector()
        if self.average is not None:
            self.average.copy_(self._tensors)
        self._devices = frozenset(p.device for p in self.parameters)
        self._around = Surroundings()  # of the step's closure
        self.rejected = 0
        self.stats: dict[str, float] = {}
        capture = preconditioner.capture
        capture.keep_batches = True
        self.products = FisherProducts(preconditioner.model, capture.likelihood, capture.find_outputs)
        self._loss_check = LossCheck(capture.likelihood)

    def _vector(self, data: Tensor | None = None) -> ParameterVector:
        return ParameterVector(self.parameters, self._names, data)

    @torch.no_grad()
    def step(self, closure: Closure, evaluate: Closure | None = None) -> Tensor:
        """One step of Algorithm 2.

        A loss or gradient that is not finite changes nothing but λ, which grows; a step after which the loss is not
        finite is taken back bit for bit.

        Args:
            closure: Clears gradients, runs the model on the batch, the backward pass, and returns the loss.
            evaluate: Returns the loss on the same batch without a backward pass; None uses the closure, whose gradients
                then are those after the step.
        """
        config, pre = self.config, self.preconditioner
        pre.capture.forget()
        pre.capture.keep_outputs = self._loss_check.open
        measure = (pre.steps + 1) % config.t1 == 0
        self._around = Surroundings.now(self._devices, generators=measure or not self.calibrated)
        with torch.enable_grad():
            loss = closure()
        batches = pre.capture.batches
        if not batches:
            raise RuntimeError("step(closure): the closure must run the model's forward and the loss's backward pass")
        own = float(loss.detach())
        value = pre.ranks.mean(own)
        self._gradient.copy_gradients_(self._tensors, self.weight_decay)
        if not (math.isfinite(value) and math.isfinite(float(self._gradient.data.sum()))):
            self._grow_damping()
            self.rejected += 1
            self.stats = {"loss": value, "damping": self.damping, "gamma": self.gamma}
            return loss
        if self._loss_check.open:
            self._loss_check.look(own, batches)
        pre.update_factors()
        if not self.calibrated:
            self._calibrate(value + self._penalty(), batches, closure, evaluate)
        k = pre.steps
        if config.gamma == "search" and k > 0 and k % config.t2 == 0:
            step = self._search_gamma(batches)
        else:
            if k % config.t3 == 0 or k < ALWAYS_INVERT_FIRST:
                self._invert()
            step = self._propose(batches)
        pre.steps += 1
        before = value + self._penalty() if measure else math.nan
        if measure:
            self._origin.copy_(self._tensors)
        self.last.data.mul_(step.mu)
        if step.natural:  # else U may be anything, even NaN
            self.last.data.add_(self._natural.data, alpha=step.natural)
        torch._foreach_add_(self._tensors, self.last.views)
        self._has_last = step.natural != 0 or step.mu != 0
        self.stats = {
            "loss": value,
            "damping": self.damping,
            "gamma": self.gamma,
            "alpha": step.alpha,
            "mu": step.mu,
            "model_change": step.change,
        }
        if measure and not self._adjust_damping(before, step, closure, evaluate):
            self._write(self._origin)
            self.last.data.zero_()
            self._has_last = False
            self.rejected += 1
        else:
            self._update_average()
        pre.capture.forget()
        return loss

    def _propose(self, batches: list[Batch]) -> Minimum:
        """U with the inverses at hand, and the minimiser over it and δ₀."""
        linear = [self._precondition()]
        directions = [self._natural]
        if self.config.momentum and self._has_last:
            directions.append(self.last)
            linear.append(self._gradient.dot(self.last))
        damping = self.damping + self.weight_decay
        quadratic = self._fisher_forms(batches, directions)
        for i, u in enumerate(directions):
            for j, v in enumerate(directions[: i + 1]):
                quadratic[i, j] += damping * u.dot(v)
                quadratic[j, i] = quadratic[i, j]
        return minimise_in_span(quadratic, torch.tensor(linear, dtype=torch.float64))

    def _invert(self) -> None:
        """New inverses."""
        if self.config.gamma == "sqrt" or self._settling:
            self.gamma = self._balanced_gamma()
        self._update_inverses(self.gamma)

    def _search_gamma(self, batches: list[Batch]) -> Minimum:
        """`_propose` with new inverses, for the γ among three that has the lowest M (sec. 6.6)."""
        pre, config = self.preconditioner, self.config
        omega = math.sqrt(19 / 20) ** config.t2
        floor = math.sqrt(self.weight_decay)
        candidates = [
            min(max(g, floor), config.gamma_max) for g in (self.gamma, omega * self.gamma, self.gamma / omega)
        ]
        best: tuple[Minimum, float, list[Tensor], Tensor] | None = None
        for gamma in dict.fromkeys(candidates):
            self._update_inverses(gamma)
            step = self._propose(batches)
            if best is None or step.change < best[0].change:
                best = step, gamma, pre.copy_inverses(), self._natural.data.clone()
        assert best is not None
        step, self.gamma, inverses, natural = best
        pre.restore_inverses(inverses)
        self._natural.data.copy_(natural)
        return step

    def _update_inverses(self, gamma: float) -> None:
        self.preconditioner.update_inverses([gamma] * len(self.preconditioner.layers))

    def _precondition(self) -> float:
        """Writes U; ∇ᵀU."""
        pre = self.preconditioner
        slope = float(pre.precondition(self._gradient.views[: len(pre.covered)]).sum())
        if self._natural.data is not pre.results_flat:  # some parameters have no block
            end = pre.results_flat.numel()
            self._natural.data[:end].copy_(pre.results_flat)
            plain, natural = self._gradient.data[end:], self._natural.data[end:]
            torch.div(plain, self.damping + self.weight_decay, out=natural)
            slope += float(torch.dot(plain, natural))
        return slope

    def _fisher_forms(self, batches: list[Batch], directions: list[ParameterVector]) -> Tensor:
        capture = self.preconditioner.capture
        tangents = [direction.by_name for direction in directions]
        total = torch.zeros(len(directions), len(directions), dtype=torch.float64)
        terms = 0.0
        for batch in batches:
            part, chosen = batch.inputs, slice(None)
            fraction = max(self.config.product_fraction, min(1.0, LEAST_EXAMPLES / max(batch.inputs.size, 1)))
            if fraction < 1 and batch.inputs.divisible:
                part, chosen = batch.inputs.part(fraction, self.preconditioner.steps)
            counted = batch.counted[chosen]
            values = None if batch.kept is None else batch.kept.rows(chosen, batch.inputs.size)
            with capture.paused():
                forms = self.products.forms(part, counted, tangents, values)
            weight = float(counted.sum())
            total += weight * forms
            terms += weight
        sums = self.preconditioner.ranks.total(torch.cat([total.flatten(), total.new_tensor([terms])]))
        return sums[:-1].view_as(total) / sums[-1].clamp(min=1)

    def _calibrate(self, value: float, batches: list[Batch], closure: Closure, evaluate: Closure | None) -> None:
        """The smallest λ of `CALIBRATION` whose first step lowers the loss (nearly) most: from 1 down, or else up.

        From far off the rule of sec. 6.5 would need hundreds of steps, since λ changes by at most 19/20 a step. Of two
        that are about as good the bolder one is better later on, where steps are not as large as the first.
        """
        self._origin.copy_(self._tensors)

        def gain(damping: float) -> float:
            self.damping = damping
            self._update_inverses(self._balanced_gamma())
            step = self._propose(batches)
            torch._foreach_add_(self._tensors, self._natural.views, alpha=step.natural)
            after = self._loss_now(closure, evaluate) + self._penalty()
            self._write(self._origin)
            return value - after if math.isfinite(after) else -math.inf

        start = best = CALIBRATION.index(1.0)
        most = gain(CALIBRATION[start])
        for candidate in range(start + 1, len(CALIBRATION)):
            found = gain(CALIBRATION[candidate])
            if not found > most - 0.01 * abs(most):
                break
            best, most = candidate, max(most, found)
        if best == start:
            for candidate in range(start - 1, -1, -1):
                found = gain(CALIBRATION[candidate])
                if not found > most:
                    break
                best, most = candidate, found
        self.damping = CALIBRATION[best]
        self.gamma = self._balanced_gamma()
        self.calibrated = True

    def _loss_now(self, closure: Closure, evaluate: Closure | None) -> float:
        """The loss at the present parameters, without the penalty, with the random numbers of the step's own pass.

        Neither buffers, such as running means, nor the random generators know of it.
        """
        pre = self.preconditioner
        with pre.capture.paused(), unnoticed(pre.model), self._around.again():
            if evaluate is not None:
                loss = float(evaluate())
            else:
                with torch.enable_grad():
                    loss = float(closure().detach())
        return pre.ranks.mean(loss)

    def _adjust_damping(self, before: float, step: Minimum, closure: Closure, evaluate: Closure | None) -> bool:
        """Levenberg–Marquardt (sec. 6.5); whether the step may stay."""
        loss = self._loss_now(closure, evaluate)
        after = loss + self._penalty()
        ratio = (after - before) / step.change if step.change else math.nan
        self.stats |= {"ratio": ratio, "loss_after": loss}
        if not math.isfinite(after) or not ratio >= 0.25:
            self._grow_damping()
        elif ratio > 0.75:
            self.damping *= SETTLING**self.config.t1 if self._settling else self._omega()
        return math.isfinite(after)

    def _omega(self) -> float:
        return OMEGA**self.config.t1

    @property
    def _settling(self) -> bool:
        """Whether this step is one of `Adaptive.settle`."""
        return self.settles and self.preconditioner.steps <= self.config.settle

    def _grow_damping(self) -> None:
        self.damping /= self._omega()

    def _balanced_gamma(self) -> float:
        """γ = √(λ+η), sec. 6.3."""
        return math.sqrt(self.damping + self.weight_decay)

    def _penalty(self) -> float:
        if not self.weight_decay:
            return 0.0
        norms = torch.stack(torch._foreach_norm(self._tensors)).double()
        return 0.5 * self.weight_decay * float(norms.square().sum())

    def _write(self, vector: ParameterVector) -> None:
        torch._foreach_copy_(self._tensors, vector.views)

    def _update_average(self) -> None:
        if self.average is not None and self.config.averaging is not None:
            keep = min(1 - 1 / self.preconditioner.steps, self.config.averaging)
            torch._foreach_lerp_(self.average.views, self._tensors, 1 - keep)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the preconditioner's own state."""
        return {
            "damping": self.damping,
            "gamma": self.gamma,
            "calibrated": self.calibrated,
            "settles": self.settles,
            "rejected": self.rejected,
            "last": self.last.data.clone(),
            "average": None if self.average is None else self.average.data.clone(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores `state`."""
        self.damping, self.gamma = state["damping"], state["gamma"]
        self.calibrated, self.rejected = state["calibrated"], state["rejected"]
        self.settles = bool(state["settles"])  # a checkpoint may be older than it
        self.last.data.copy_(state["last"])
        self._has_last = bool(self.last.data.any())
        if self.average is not None and state["average"] is not None:
            self.average.data.copy_(state["average"])

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged parameters (sec. 8); afterwards its own again.

        Raises:
            RuntimeError: ``averaging`` is None.
        """
        if self.average is None:
            raise RuntimeError("no average is kept: pass adaptive=Adaptive(averaging=0.99)")
        own = self._vector()
        with torch.no_grad():
            own.copy_(self._tensors)
            self._write(self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                self._write(own)
