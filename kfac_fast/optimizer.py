"""`KFAC`: a complete optimizer around `Preconditioner`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .adaptive import AdaptiveRule
from .adaptive_constants import CALIBRATION, Adaptive
from .arguments import check_group, check_range
from .collectives import local
from .distributed import Distributed
from .inverses import KFACWarning
from .layers import Blocks, Found
from .likelihoods import Likelihood
from .ops.native import read_if_free
from .optimizer_state import ResumableOptimizer
from .preconditioner import Preconditioner
from .report import Report, Row
from .update import update_parameters


class KFAC(ResumableOptimizer):
    r"""K-FAC, natural gradient descent with a Kronecker-factored Fisher matrix (Martens & Grosse 2015).

    The Fisher block of a layer is approximated by A ⊗ G, the second moments of its inputs and of its output
    gradients, so that a natural-gradient step costs two small inverses per layer: with the gradient V of W,

    .. math:: U = (G + \tfrac{\gamma}{\pi} I)^{-1} V (A + \pi\gamma I)^{-1}, \qquad \gamma = \sqrt\lambda, \qquad
              W \leftarrow W - \mathrm{lr}\,(\text{momentum over } \nu U)

    with ν = min(1, √(κ / Σ lr²⟨V, U⟩)), the KL clip, at the highest lr of a schedule. The ordinary loop needs nothing
    more than the constructor::

        optimizer = KFAC(model)
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    Linear and convolutional layers are preconditioned. Every other parameter takes the same momentum update with its
    plain gradient; `report` names them all.

    Args:
        model: The module whose outputs the loss is computed from; with several ranks its ``DistributedDataParallel``
            wrapper, or a model in FSDP2's shards. It may be compiled, before or after.
        params: Parameters, groups or named parameters as ``torch.optim`` takes them; None is all that require grad.
            Groups may have their own ``lr``, ``momentum``, ``nesterov``, ``damping``, ``weight_decay``, ``kl_clip``.
        lr: Learning rate, > 0; a number or a one-element tensor. Natural gradients have a scale of their own, and the
            KL clip shortens steps that would change the predictions too much, so the default serves most classifiers.
        momentum: In [0, 1).
        nesterov: Nesterov's momentum. Ignored where momentum is 0.
        damping: λ > 0; 0.03 unless given. Larger is closer to SGD; too small fits the noise of a batch, and in float32
            fails. With ``adaptive`` the λ at the start; "auto", the default there, finds it on the first batch.
        weight_decay: Decoupled, ≥ 0: parameters shrink by lr · weight_decay a step.
        likelihood: What the outputs are parameters of: "categorical" (logits of a cross entropy), "bernoulli" (logits
            of a binary cross entropy), "gaussian" (a regression), or a `Likelihood` for anything else.
        fisher: "mc", the true Fisher with targets drawn from the model's prediction, one extra backward pass without
            parameter gradients; "exact", one such pass per output, for small outputs; "empirical", the gradients of
            the training loss, no extra pass but a different matrix.
        decay: Running averages keep min(1 − 1/k, decay) of the old factors at the k-th update, in [0, 1).
        factor_fraction: Part of each batch, in (0, 1], that the factors are taken from (sec. 8 uses 1/8). Below 1 the
            model is run again on that part, with buffers and random generators restored, and the extra pass costs
            that much less; normalisation layers then use the statistics of that part. "mc" and "exact" only.
        factor_every: Steps between updates of the factors; the steps between cost nothing extra.
        inverse_every: Steps between updates of the inverses; the first three steps always update them.
        kl_clip: κ > 0, or None for no clip: lr²⟨V, U⟩, twice the change of the predictive distribution that is
            predicted for the step, does not exceed it at the group's highest lr: the highest so far or, if that is
            higher, the one that a scheduler starts from. A schedule shortens clipped steps like all others.
        loss_reduction: "mean" or "sum", the scale of your loss; only ``fisher="empirical"`` depends on it.
        grad_scaler: The ``torch.amp.GradScaler`` in use, if any; only ``fisher="empirical"`` needs to know it.
        outputs: A function from what the model returns to the output tensor, where that is neither a tensor nor has
            ``.logits``.
        maximize: Maximises the objective.
        seed: Of the generator that draws targets; the global generators are left alone.
        approximation: The structure of the approximate Fisher matrix. "block_diagonal", A ⊗ G for every layer;
            "block_tridiagonal", which also models how neighbouring layers depend on each other (sec. 4.3), at several
            times the cost of inverse and step, for chains of Linear layers (the first forward pass shows whether the
            model is one); "ekfac", which keeps the eigenvectors of A and G, takes the eigenvalues from per-example
            gradients (George et al. 2018) and adds λ to them, less damping than √λ on each factor.
        blocks: Which modules are preconditioned, by which class, and within what memory, as a `Blocks`.
        adaptive: The rule of the paper for large batches: `step` takes a closure; learning rate, momentum and damping
            set themselves (sec. 6, 7); ``lr``, ``momentum``, ``nesterov``, ``kl_clip`` and ``inverse_every`` are not
            used, and ``weight_decay`` is an ℓ2 coefficient. True, or an `Adaptive` with other constants. The loss must
            be the likelihood's negative log-likelihood at its scale: ``likelihood.loss`` is.
        distributed: Which ranks train the model together and how they share the work, a `Distributed`. None finds the
            ranks from the wrapper. A bare model with several ranks needs a choice: True if gradients are averaged over
            all of them, by a wrapper made later or by you; False if this rank trains by itself.

    Raises:
        ValueError: An argument out of range; the message names it and what was expected.
        TypeError: ``model`` is not a module.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 0.03,
        momentum: float = 0.9,
        nesterov: bool = True,
        damping: float | str | None = None,
        weight_decay: float = 0.0,
        likelihood: str | Likelihood = "categorical",
        fisher: str = "mc",
        decay: float = 0.95,
        factor_fraction: float = 1.0,
        factor_every: int = 1,
        inverse_every: int = 10,
        kl_clip: float | None = 1e-3,
        loss_reduction: str = "mean",
        grad_scaler: torch.amp.GradScaler | None = None,
        outputs: Callable[[Any], Tensor] | None = None,
        maximize: bool = False,
        seed: int = 0,
        approximation: str = "block_diagonal",
        blocks: Blocks | None = None,
        adaptive: bool | Adaptive = False,
        distributed: Distributed | bool | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: pass it, not its parameters")
        config = Adaptive() if adaptive is True else adaptive or None
        if config is not None and not isinstance(config, Adaptive):
            raise TypeError(f"adaptive must be a bool or an Adaptive, got {type(adaptive).__name__}")
        start = damping if damping is not None else (0.03 if config is None else "auto")
        if start == "auto" and config is None:
            raise ValueError("damping='auto' needs adaptive=True")
        damping = CALIBRATION[0] if start == "auto" else start
        check_range("damping", damping, above=0.0)
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "damping": damping, "weight_decay": weight_decay,
            "kl_clip": kl_clip, "maximize": maximize,
        }  # fmt: skip
        check_group(defaults)
        super().__init__([p for p in model.parameters() if p.requires_grad] if params is None else params, defaults)
        self.preconditioner = Preconditioner(
            model,
            damping=float(damping),
            likelihood=likelihood,
            fisher=fisher,
            decay=decay,
            factor_fraction=factor_fraction,
            factor_every=factor_every,
            inverse_every=inverse_every,
            loss_reduction=loss_reduction,
            grad_scaler=grad_scaler,
            outputs=outputs,
            seed=seed,
            approximation=approximation,
            blocks=blocks,
            distributed=distributed,
            parameters=self._parameters,
        )
        self.rule = None if config is None else self._adaptive_rule(config, start)
        self._prepare_state()

    def _adaptive_rule(self, config: Adaptive, damping: float | str) -> AdaptiveRule:
        own = {id(p) for p in self.preconditioner.model.parameters()}
        if any(id(p) not in own for p in self._parameters):
            raise ValueError("adaptive needs all parameters to be the model's, got one that is not")
        decays = {group["weight_decay"] for group in self.param_groups}
        if len(decays) > 1 or any(group["maximize"] for group in self.param_groups):
            raise ValueError("adaptive needs one weight_decay for all groups and maximize=False")
        return AdaptiveRule(self.preconditioner, self._parameters, config, damping, decays.pop())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim``; a group's values are checked like the constructor's.

        Layers whose parameters are now all here, such as layers that were unfrozen, are preconditioned from the next
        step on. Call it between steps: statistics of a backward pass whose step has not been made are lost.
        """
        built = "preconditioner" in self.__dict__
        saved = self._pack() if built else {}
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
            if built and self.rule is not None:
                self._adaptive_rule(self.rule.config, self.rule.damping)
        except BaseException:
            self.param_groups.pop()
            raise
        self.param_groups[-1].setdefault("highest_lr", float(self.param_groups[-1]["lr"]))  # for the KL clip
        if built:
            self.preconditioner.cover(self._parameters)
            if self.rule is not None:
                self.rule = self._adaptive_rule(self.rule.config, self.rule.damping)
            self._prepare_state()
            self._unpack(saved, strict=False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in ``torch.optim``; statistics that came with the gradients are forgotten with them."""
        super().zero_grad(set_to_none)
        self.preconditioner.drop()

    def step(self, closure: Callable[[], Any] | None = None, evaluate: Callable[[], Any] | None = None) -> Any:
        """One step.

        A gradient or natural gradient that is not finite changes nothing: parameters, momentum and factors stay.

        Args:
            closure: Clears the gradients, evaluates the model, runs the backward pass and returns the loss, with
                gradients enabled. Needed with ``adaptive``, which calls it again every ``t1`` steps.
            evaluate: With ``adaptive``, the loss on the same batch without a backward pass, for those calls.

        Returns:
            What the closure returned, or None.
        """
        return self._make_step(closure, evaluate)

    # The kernels are opaque to torch.compile: there is nothing to gain from tracing the Python around them.
    @torch.compiler.disable
    @torch.no_grad()
    def _make_step(self, closure: Callable[[], Any] | None, evaluate: Callable[[], Any] | None) -> Any:
        if self.rule is not None:
            if closure is None:
                raise ValueError("step() needs a closure with adaptive=True")
            loss: Any = self.rule.step(closure, evaluate)
            self._step.fill_(self.preconditioner.steps)
            return loss
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse_gradients()
        groups = self._groups_of_layers()
        dot = self.preconditioner.natural_gradients([group["damping"] for group in groups])

        updates, finite = self._updates(dot)
        known = read_if_free(finite)
        self._step.fill_(self.preconditioner.steps)
        self._skipped += ~finite
        if known is False:
            self._warn_about_skipped_step()
            return loss
        self._last_clips = self._clips(dot, groups)
        for group, clip in zip(self.param_groups, self._last_clips, strict=True):
            natural, plain = updates[id(group)]
            if known is None:  # the host does not know: let the device take zeros, unclipped, for what is not finite
                clip = None if clip is None else torch.where(finite, clip, torch.ones_like(clip))
                for tensors in (natural, plain):
                    for i, (p, u) in enumerate(tensors):
                        tensors[i] = (p, torch.where(finite, u, torch.zeros_like(u)))
            if natural and clip is not None and not (known and bool(clip == 1)):
                torch._foreach_mul_([u for _, u in natural], clip)
            self._apply(group, natural + plain, None if known else finite)
        return loss

    def _updates(self, dot: Tensor) -> tuple[dict[int, tuple[list[Any], list[Any]]], Tensor]:
        """Per group the (parameter, natural gradient) and (parameter, gradient) pairs; whether all are finite."""
        results = self.preconditioner.results
        updates: dict[int, tuple[list[Any], list[Any]]] = {}
        finite = dot.sum().isfinite()
        for group in self.param_groups:
            natural, plain = [], []
            for p in group["params"]:
                if p.grad is None:
                    continue
                i = self._natural.get(id(p))
                if i is not None:
                    natural.append((p, results[i]))
                else:
                    plain.append((p, local(p.grad)))
            if plain:
                norms = torch._foreach_norm([g for _, g in plain])
                finite = finite & torch.stack([n.to(finite.device, torch.float64) for n in norms]).sum().isfinite()
            updates[id(group)] = (natural, plain)
        if self.preconditioner.sharing.sharded:  # each rank has seen its own shards
            finite = self.preconditioner.ranks.add_up((~finite).to(torch.int32)) == 0
        return updates, finite

    def _clips(self, dot: Tensor, groups: list[dict[str, Any]]) -> list[Tensor | None]:
        """ν of every group, from the sum of lr²⟨V, U⟩ over all groups that clip.

        With the lr of the step ν would cancel it: as long as steps are clipped a schedule would do nothing, and in a
        warm-up the momentum, gathered at lower rates, would be too large for the present one.
        """
        if all(group["kl_clip"] is None for group in self.param_groups):
            return [None] * len(self.param_groups)
        for group in self.param_groups:
            group["highest_lr"] = max(float(group.get(key, 0.0)) for key in ("lr", "initial_lr", "highest_lr"))
        squares = []
        for layer, group in zip(self.preconditioner.layers, groups, strict=True):
            squares += [0.0 if group["kl_clip"] is None else group["highest_lr"] ** 2] * len(layer.blocks)
        total = (dot * torch.tensor(squares, dtype=dot.dtype).to(dot.device, non_blocking=True)).sum().abs()
        return [
            None if group["kl_clip"] is None else (group["kl_clip"] / total).sqrt().clamp(max=1.0)
            for group in self.param_groups
        ]

    def _apply(self, group: dict[str, Any], pairs: list[tuple[nn.Parameter, Tensor]], gate: Tensor | None) -> None:
        """Momentum, weight decay and the update. With a gate that is False on the device nothing changes."""
        if not pairs:
            return
        buffers = (
            [local(buffer) for buffer in self._momentum_buffers([p for p, _ in pairs])] if group["momentum"] else []
        )
        update_parameters(group, [local(p) for p, _ in pairs], [u for _, u in pairs], buffers, gate)

    def joinable(self) -> Any:
        """For ranks with different numbers of batches: ``with Join([ddp_model, optimizer.joinable()]): …``.

        ``torch.distributed.algorithms.join.Join`` lets a rank that has run out of batches serve the collectives of the
        others; at the end every rank has the model and the momentum of those that went on longest.

        Raises:
            ValueError: With ``adaptive``, whose closure the others cannot wait for; when the ``with`` begins, with
                ``share="gradients"``, where a rank without batches would have to know gradients.
        """
        from .joining import JoinableSteps

        if self.rule is not None:
            raise ValueError("joinable() does not go with adaptive=True: give all ranks the same number of batches")
        return JoinableSteps(self)

    def _groups_of_layers(self) -> list[dict[str, Any]]:
        """The parameter group of every layer."""
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        return [group_of[id(weight)] for weight in self.preconditioner.weights]

    def damping_by_layer(self) -> list[float]:
        """λ of every layer."""
        return [group["damping"] for group in self._groups_of_layers()]

    def _refuse_sparse_gradients(self) -> None:
        for p in self._parameters:
            if p.grad is not None and p.grad.is_sparse:
                raise ValueError(
                    f"KFAC does not take sparse gradients, got one for {self._name(p)} of shape {tuple(p.shape)}; make "
                    "the layer with sparse=False"
                )

    def _warn_about_skipped_step(self) -> None:
        bad = (p for p in self._parameters if p.grad is not None and not bool(local(p.grad).isfinite().all()))
        first = next(bad, None)
        if first is not None and id(first) not in self._warned:
            self._warned.add(id(first))
            warnings.warn(
                f"the gradient of {self._name(first)} is not finite; the step was left out and changed nothing. Said "
                "once per parameter; stats()['skipped_steps'] counts such steps",
                KFACWarning,
                stacklevel=5,
            )

    # ---- about it ---------------------------------------------------------------------------------------------------

    def memory(self) -> dict[str, int]:
        """`Preconditioner.memory`, and "momentum"."""
        groups = [group for group in self.param_groups if group["momentum"] or self.rule is not None]
        return self.preconditioner.memory() | {"momentum": sum(p.nbytes for g in groups for p in g["params"])}

    def report(self) -> Report:
        """What is preconditioned and how, parameter by parameter, with memory; and why the rest is not."""
        rows = list(self.preconditioner.report())
        own = {id(p) for p in self.preconditioner.model.parameters()}
        for p in self._parameters:
            if id(p) not in own:
                rows.append(Row.of(Found(self._name(p), p, (), "it is not a parameter of the model"), 0))
        return Report(rows)

    def stats(self, *, conditions: bool = False) -> dict[str, float]:
        """Counters since the start, and figures of the last step, for a log; reading them waits for the device.

        - ``step``, ``inversions``: steps made, updates of the inverses.
        - ``skipped_steps``: steps that changed nothing, since a gradient was not finite.
        - ``refused_statistics``: batches whose statistics were not finite and went into no factor.
        - ``failures``: inverses that had to be replaced by something safer, and ``failures/NAME`` for each such block.
        - ``clip``: ν, the share of the last step that the KL clip left; the smallest of any group.
        - With ``conditions``, ``condition/NAME`` for every block: an estimate of its condition number with damping.
        - With ``adaptive`` also ``rejected`` (steps taken back or not made) and, of the last step: ``loss``,
          ``damping`` λ, ``gamma`` γ, ``alpha`` α, ``mu`` μ, ``model_change`` M(δ) − M(0); where measured
          ``loss_after`` and ``ratio`` ρ. Losses are without the ℓ2 term.
        """
        figures = {**self.preconditioner.stats(conditions=conditions), "skipped_steps": float(self._skipped)}
        if clips := [float(clip) for clip in self._last_clips if clip is not None]:
            figures["clip"] = min(clips)
        if self.rule is not None:
            figures.update(self.rule.stats, rejected=float(self.rule.rejected))
        return figures

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the model has its averaged parameters (``Adaptive(averaging=0.99)``; sec. 8).

        Raises:
            RuntimeError: No average is kept.
        """
        if self.rule is None:
            raise RuntimeError("no average is kept: pass adaptive=Adaptive(averaging=0.99)")
        return self.rule.averaged()

    def close(self) -> None:
        """Removes every hook from the model; steps go on with the factors as they are."""
        self.preconditioner.close()
