"""`Preconditioner`: capture → statistics → approximation → natural gradients, for any optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .approximations import APPROXIMATIONS, Approximation, Settings, expected_bytes, make_parts
from .approximations.base import block_names
from .arguments import check_choice, check_count, check_range
from .capture import FISHERS, Capture
from .checkpoint import IncompatibleKeys
from .collectives import local, reduction
from .distributed import Distributed, ranks_of, shards_of_rows
from .factors import QUEUE_BYTES
from .layers import Blocks, Inputs, discover
from .likelihoods import Likelihood, as_likelihood
from .models import Original, refuse_moved_model, unwrap
from .notices import Notices
from .report import Report, Row, bytes_by_kind, refuse_beyond
from .sampler import Sampler
from .sharing import sharing_for
from .statistics import Statistics
from .tape import Pass

# The running averages change fastest at the start, so the first inverses are always made anew (sec. 8).
ALWAYS_INVERT_FIRST = 3


class Preconditioner:
    """Turns gradients V into natural gradients G⁻¹ V A⁻¹ (Martens & Grosse 2015).

    Use it before the step of any optimizer::

        preconditioner = Preconditioner(model)
        for x, y in data:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            preconditioner.step()  # rewrites .grad of the supported layers
            optimizer.step()

    `kfac_fast.KFAC` is this together with an update rule. Arguments that both take are described there.

    Args:
        model: The module whose outputs the loss is computed from; a ``DistributedDataParallel`` wrapper is looked into.
        damping: λ > 0, added to the block as a whole: each factor gets γ = √λ, balanced by π.
        likelihood: "categorical", "bernoulli", "gaussian" or a `Likelihood`.
        fisher: "mc", "exact" or "empirical".
        decay: Largest weight of the old factors, ε_max in [0, 1).
        factor_fraction: Part of each batch that the factors are taken from.
        factor_every: Steps between updates of the factors.
        inverse_every: Steps between updates of the inverses.
        kl_clip: κ > 0 bounds lr² ⟨∇, U⟩; needs ``lr`` in `step`. None does not clip.
        loss_reduction: "mean" or "sum", how the user's loss is scaled. Only the empirical Fisher depends on it.
        grad_scaler: The ``torch.amp.GradScaler`` that multiplies the loss. Only the empirical Fisher depends on it.
        outputs: Finds the outputs in what the model returns, where that is not a tensor or has ``.logits``.
        seed: Of the generator that draws targets; the global generators are not used.
        approximation: The structure of the approximate Fisher matrix: "block_diagonal", "block_tridiagonal" or "ekfac".
        blocks: Which modules are preconditioned, and by which class; None is all that are supported.
        distributed: Over which ranks, and how they share the work; see `Distributed`.
        parameters: Only layers whose parameters are all among these are preconditioned; None is all.

    Raises:
        ValueError: An argument out of range; the message names it. ``torch.nn.DataParallel``. Several ranks, and
            nothing says whether they train one model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        damping: float = 0.03,
        likelihood: str | Likelihood = "categorical",
        fisher: str = "mc",
        decay: float = 0.95,
        factor_fraction: float = 1.0,
        factor_every: int = 1,
        inverse_every: int = 10,
        kl_clip: float | None = None,
        loss_reduction: str = "mean",
        grad_scaler: torch.amp.GradScaler | None = None,
        outputs: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
        approximation: str = "block_diagonal",
        blocks: Blocks | None = None,
        distributed: Distributed | bool | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
    ) -> None:
        parameters = None if parameters is None else list(parameters)
        # What a copy is made from: every argument as it was given.
        self._arguments = {name: value for name, value in locals().items() if name != "self"}
        check_range("damping", damping, above=0.0)
        check_range("decay", decay, at_least=0.0, below=1.0)
        check_range("factor_fraction", factor_fraction, above=0.0, at_most=1.0)
        check_count("factor_every", factor_every)
        check_count("inverse_every", inverse_every)
        if kl_clip is not None:
            check_range("kl_clip", kl_clip, above=0.0)
        check_choice("fisher", fisher, FISHERS)
        check_choice("approximation", approximation, tuple(APPROXIMATIONS))
        if fisher == "empirical" and factor_fraction < 1:
            raise ValueError(f"factor_fraction must be 1 with fisher='empirical', got {factor_fraction:g}")
        check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        if blocks is not None and not isinstance(blocks, Blocks):
            raise TypeError(f"blocks must be a Blocks or None, got {type(blocks).__name__}")
        if outputs is not None and not callable(outputs):
            raise TypeError(f"outputs must be a function, got {type(outputs).__name__}")
        if grad_scaler is not None and not callable(getattr(grad_scaler, "get_scale", None)):
            raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, got {type(grad_scaler).__name__}")
        self._loss_scale = grad_scaler.get_scale if grad_scaler is not None and fisher == "empirical" else None
        self._unscale = 1.0  # for rows of the backward pass under way
        self.damping = damping
        self.factor_every = factor_every
        self.inverse_every = inverse_every
        self.kl_clip = kl_clip
        self.steps = 0
        self.inversions = 0
        self.model, called = unwrap(model)
        self.ranks, config = ranks_of(model, distributed)
        self._found, layers = discover(self.model, parameters, blocks or Blocks(), shards_of_rows(self.model))
        self.sampler = Sampler(seed, self.ranks.rank)
        example = layers[0].weight if layers else torch.zeros(())
        dtype = torch.float64 if example.dtype == torch.float64 else torch.float32
        self._expected = expected_bytes(approximation, layers, dtype)
        if blocks is not None and blocks.max_factor_bytes is not None:
            refuse_beyond(blocks.max_factor_bytes, self._expected)
        settings = Settings(decay, dtype, example.device, fisher == "empirical" and loss_reduction == "mean")
        self.factors, self.parts = make_parts(approximation, layers, settings)
        self.approximation = self.parts[0]
        # Every part serves a run of consecutive layers.
        self.layers = [layer for part in self.parts for layer in part.layers]
        self.original = Original(self.model, self.layers, parameters or ())
        self._notices = Notices([layer.name for layer in self.layers], self.original)
        self.weights = [layer.weight for layer in self.layers]
        self._owner = [(part, i) for part in self.parts for i in range(len(part.layers))]
        self.statistics = Statistics([store for part in self.parts for store in part.stores])
        self.refused = torch.zeros((), dtype=torch.int64, device=example.device)  # commits of what was not finite
        self._reduce = reduction(self.ranks, config.dtype)
        self.sharing = sharing_for(config, self.ranks, self.parts, self.factors.running.data)
        # Natural gradients of all covered parameters, in one buffer with a view per parameter.
        self.covered, self.results = self.sharing.covered, self.sharing.results
        self.results_flat = self.sharing.results_flat
        self.capture = Capture(
            self.original, called, self.layers, as_likelihood(likelihood), fisher, factor_fraction, self, outputs,
            self.generator,
        )  # fmt: skip
        if self.approximation.needs_trace:
            self.capture.on_trace = self.approximation.take_trace

    # ---- use --------------------------------------------------------------------------------------------------------

    def step(self, lr: float | None = None) -> None:
        """Updates factors and inverses if they are due and replaces the gradients of the covered layers.

        Args:
            lr: Learning rate of the optimizer, for the KL clip; the highest one of a schedule, which clipped steps
                would not follow otherwise.

        Raises:
            ValueError: ``kl_clip`` is set and ``lr`` is missing.
        """
        if self.kl_clip is not None and lr is None:
            raise ValueError("lr must be given to step() when kl_clip is set")
        dot = self.natural_gradients(self.damping)
        if self.kl_clip is not None and lr is not None:
            clip = (self.kl_clip / (lr**2 * dot.sum()).abs()).sqrt().clamp(max=1.0)
            self.results_flat.mul_(clip)
        pairs = [(local(p.grad), u) for p, u in zip(self.covered, self.results, strict=True) if p.grad is not None]
        with torch.no_grad():
            if pairs:
                torch._foreach_copy_([g for g, _ in pairs], [u for _, u in pairs])

    @torch.no_grad()
    def natural_gradients(self, damping: float | Sequence[float]) -> Tensor:
        """One step's curvature work; `results` then holds U of every covered parameter.

        Args:
            damping: λ, or one per layer.

        Returns:
            ⟨V, U⟩ of every block, on the device.
        """
        self.capture.forget()
        refuse_moved_model(self.layers, self.results_flat)
        self.update_curvature(damping)
        return self.precondition([p.grad for p in self.covered])

    def update_curvature(self, damping: float | Sequence[float], *, joined: bool = False) -> None:
        """Factors and inverses where they are due; counts the step.

        Args:
            damping: λ, or one per layer.
            joined: This rank has no more batches and only serves the others: it has no gradients.
        """
        self.update_factors(joined=joined)
        if self.steps % self.inverse_every == 0 or self.inversions < ALWAYS_INVERT_FIRST:
            per_layer = [damping] * len(self.layers) if isinstance(damping, (int, float)) else damping
            self.update_inverses([math.sqrt(x) for x in per_layer])
            self._notices.changes()
            self.capture.look_again()
        self.steps += 1

    def update_factors(self, *, joined: bool = False) -> None:
        """Commits the statistics gathered since the last step, if they are due; those of all ranks."""
        if self.steps == 0:
            self.sharing.check_that_gradients_are_averaged(joined)
        if self.wants_statistics():
            gate = self.statistics.commit(self._reduce)
            if gate is not None:
                self.refused += (gate == 0).sum()
            self._notices.unseen([i for i in self.capture.take_unseen() if not self._seen_elsewhere(i)])
            self._notices.used_elsewhere(self.capture.used_elsewhere)

    def update_inverses(self, gamma: Sequence[float]) -> None:
        """Recomputes all inverses with γ, one per layer."""
        self.inversions += 1
        per_block = [x for x, layer in zip(gamma, self.layers, strict=True) for _ in layer.blocks]
        data = self.factors.running.data
        self.sharing.update(torch.tensor(per_block, dtype=data.dtype).to(data.device, non_blocking=True))

    def copy_inverses(self) -> list[Tensor]:
        """The inverses in use, for `restore_inverses`."""
        return [view.clone() for view in self._inverse_views()]

    def restore_inverses(self, copies: Sequence[Tensor]) -> None:
        """Puts back what `copy_inverses` gave."""
        torch._foreach_copy_(self._inverse_views(), list(copies))

    def _inverse_views(self) -> list[Tensor]:
        return [view for k, (part, i) in enumerate(self._owner) if self.sharing.keeps(k) for view in part.inverses(i)]

    def precondition(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Natural gradients of these gradients of `covered`, into `results`; ⟨V, U⟩ of every block."""
        return self.sharing.apply(gradients)

    def part_of(self, layer: int) -> tuple[Approximation, int]:
        """The part that serves a layer, and the layer's number there."""
        return self._owner[layer]

    def close(self) -> None:
        """Removes every hook from the model. Factors and inverses stay; no new statistics are gathered."""
        self.capture.close()

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that is kept between steps, by layer name: plain tensors and numbers.

        Statistics of a backward pass whose step has not been made are not part of it: save after a step.
        """
        return checkpoint.save(self)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Restores what `state_dict` gave, from any device and dtype. Nothing is changed unless everything fits.

        Args:
            state_dict: From a preconditioner with the same approximation.
            strict: False loads the layers that fit, by name, and reports the others.

        Returns:
            Layers that are here and were not loaded, and that were there and are not here; both empty if strict.

        Raises:
            ValueError: Missing entries, other shapes or, with ``strict``, other layers; the message names the layer.
        """
        return checkpoint.load(self, state_dict, strict)

    def cover(self, parameters: Iterable[nn.Parameter]) -> None:
        """Looks again for layers to precondition, among these parameters; those it has keep their state.

        For layers that were unfrozen. Statistics of a backward pass whose step has not been made are lost.
        """
        state = self.state_dict()
        self.close()
        self.__init__(**{**self._arguments, "parameters": parameters})  # type: ignore[misc]
        self.load_state_dict(state, strict=False)

    def __reduce__(self) -> Any:
        """A copy or a pickle has the model with it; hooks are set on the copy's model."""
        return _restored, (type(self), self._arguments, self.state_dict(), self.capture.closed)

    # ---- tape.Sink --------------------------------------------------------------------------------------------------

    def wants_statistics(self) -> bool:
        return self.steps % self.factor_every == 0

    def add_rows(self, layer: int, inputs: Inputs, gradient: Tensor, sent: Pass, block: int = 0) -> None:
        if self._loss_scale is not None:  # in float32: what was scaled may be too small for half precision
            gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * self._unscale
        part, own = self._owner[layer]
        part.add_rows(own, inputs, gradient, sent, block)

    def add_terms(self, terms: Tensor) -> None:
        self.statistics.add_terms(terms)

    def begin(self) -> None:
        # A step that a gradient scaler left out, since gradients overflowed, must not leave its statistics to the next.
        # With FSDP2 a gradient that waits to be reduced is not there either; `KFAC.zero_grad` serves in its place.
        if not self.sharing.sharded and all(p.grad is None for p in self.covered):
            self.drop()
        if self._loss_scale is not None:
            self._unscale = 1 / self._loss_scale()

    def drop(self) -> None:
        self.statistics.reset()
        self.sampler.restart()

    # ---- about it ---------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """What is preconditioned and how, parameter by parameter, with memory; and why the rest is not."""
        memory: dict[int, int] = defaultdict(int)
        for i, layer in enumerate(self.layers):
            memory[id(layer.weight)] += self.layer_bytes(i)
        return Report([Row.of(found, memory.get(id(found.parameter), 0)) for found in self._found])

    def stats(self, *, conditions: bool = False) -> dict[str, float]:
        """Counters since the start, and condition numbers; see `KFAC.stats`. Reading them waits for the device."""
        names = [name for part in self.parts for name in block_names(part.layers)]
        failures = [float(x) for part in self.parts for x in part.failures().tolist()]
        figures = {
            "step": float(self.steps),
            "inversions": float(self.inversions),
            "refused_statistics": float(self.refused),
            "failures": sum(failures),
            **{f"failures/{name}": count for name, count in zip(names, failures, strict=True) if count},
        }
        if conditions:
            numbers = [x for part in self.parts for x in part.conditions().tolist()]
            figures.update((f"condition/{name}", x) for name, x in zip(names, numbers, strict=True))
        return figures

    def layer_bytes(self, layer: int) -> int:
        """Bytes kept for a layer on this rank: statistics, pending sums, inverses."""
        part, own = self._owner[layer]
        return part.memory(own) - (0 if self.sharing.keeps(layer) else part.inverse_bytes(own))

    def memory(self) -> dict[str, int]:
        """Bytes by purpose, known before the first step.

        Statistics, pending sums and inverses by kind of layer; "natural gradients", one number per covered parameter;
        "rows", the most that waits to be added up at one time. With approximation="block_tridiagonal" the kinds are
        upper bounds until the first forward pass has shown the chain.
        """
        figures = bytes_by_kind(self._expected)
        figures["natural gradients"] = self.results_flat.nbytes
        figures["rows"] = QUEUE_BYTES * len(self.parts)
        return figures

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator that draws targets on a device."""
        return self.sampler.generator(device, self.steps)

    def _seen_elsewhere(self, layer: int) -> bool:
        """Whether other ranks, or this one before, had rows of a layer that this rank did not use in this step."""
        part, own = self._owner[layer]
        return self.ranks.size > 1 and any(bool(k.any()) for k in part.state(own)["updates"])


def _restored(
    kind: type[Preconditioner], arguments: dict[str, Any], state: dict[str, Any], closed: bool
) -> Preconditioner:
    preconditioner = kind(**arguments)
    preconditioner.load_state_dict(state)
    if closed:
        preconditioner.close()
    return preconditioner
