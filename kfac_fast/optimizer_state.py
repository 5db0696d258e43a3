"""What an optimizer with a `Preconditioner` saves, loads, copies and pickles: the state half of `KFAC`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .adaptive import AdaptiveRule
from .arguments import check_group
from .checkpoint import (
    IncompatibleKeys,
    check_layer_state,
    check_run_state,
    check_tensor,
    layer_keys,
    layer_states,
    load_layer_state,
    load_run_state,
    run_state,
)
from .preconditioner import Preconditioner


class ResumableOptimizer(torch.optim.Optimizer):
    """State in the layout of ``torch.optim``: per parameter plain tensors and numbers.

    The entry of a layer's weight has the layer's factors and inverses too, that of the first such weight the counters
    of the run under keys that begin with ``"run/"``. The base class would cast float32 state to the dtype of a bfloat16
    parameter, so nothing of loading is left to it; its hooks are called as it calls them.
    """

    preconditioner: Preconditioner
    rule: AdaptiveRule | None
    _natural: dict[int, int]  # place of a parameter in `Preconditioner.results`, by its id
    _step: Tensor  # the "step" of every parameter
    _last_clips: list[Tensor | None]  # ν of every group, None where it does not clip
    _skipped: Tensor  # steps that changed nothing, since a gradient was not finite; on the device
    _warned: set[int]  # parameters that were named in a warning, by id

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _prepare_state(self) -> None:
        """Makes `state` complete, so that tools which look at it before the first step find it as later."""
        self.preconditioner.capture.keep_batches = self.rule is not None
        self._natural = {id(p): i for i, p in enumerate(self.preconditioner.covered)}
        self._step = torch.tensor(float(self.preconditioner.steps))
        self._last_clips = []
        self._skipped = torch.zeros_like(self.preconditioner.refused)
        self._warned = set()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = self._step
            if group["momentum"] and self.rule is None:
                self._momentum_buffers([p for p in group["params"] if p.requires_grad])
        # Flattened sharded checkpoints ask here which entries a parameter has; `state_dict` puts the content in.
        for i, weight, prefix in _places(self.preconditioner):
            self.state[weight].update((prefix + key, None) for key in layer_keys(self.preconditioner, i))
        for p, pieces in ({} if self.rule is None else _split(self.rule)[1]).items():
            self.state[p].update(dict.fromkeys(pieces))
        self.state[self._parameters[self._run_position]].update(dict.fromkeys(_flat({"run": self._run_state()[0]})))

    @property
    def _run_position(self) -> int:
        """The parameter whose entry has the counters of the run: the first layer's weight."""
        first = self.preconditioner.weights[:1]
        return next((i for i, p in enumerate(self._parameters) if first and p is first[0]), 0)

    def _momentum_buffers(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        buffers = []
        for p in parameters:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p, dtype=self._update_dtype(p))
            buffers.append(state["momentum_buffer"])
        return buffers

    def _update_dtype(self, p: nn.Parameter) -> torch.dtype:
        return self.preconditioner.results_flat.dtype if id(p) in self._natural else p.dtype

    def _name(self, parameter: nn.Parameter) -> str:
        places = {id(p): i for i, p in enumerate(self._parameters)}
        return self._names()[places[id(parameter)]]

    def _names(self) -> list[str]:
        """Of every parameter, by position: the model's, or where there is none the place in the groups."""
        known = {id(p): name for name, p in self.preconditioner.model.named_parameters()}
        return [
            known.get(id(p), f"param_groups.{i}.{j}")
            for i, group in enumerate(self.param_groups)
            for j, p in enumerate(group["params"])
        ]

    # ---- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers: momentum and, under each layer's weight, factors, inverses in use and counters.

        Loading it continues the run bit for bit on the CPU. Statistics and gradients of a backward pass whose step has
        not been made are not part of it: save after a step. With ``share="gradients"`` and with sharded models no rank
        has all inverses: call it on all ranks.

        Raises:
            RuntimeError: Ranks share the inverses and one of them did not ask.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self._pack()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def _pack(self) -> dict[str, Any]:
        pre, parameters = self.preconditioner, self._parameters
        position = {id(p): i for i, p in enumerate(parameters)}
        state: dict[Any, dict[str, Any]] = {
            position[id(p)]: {**self.state[p], "step": torch.tensor(float(pre.steps))} for p in parameters
        }
        for (_, weight, prefix), own in zip(_places(pre), layer_states(pre), strict=True):
            state[position[id(weight)]].update((prefix + key, kept) for key, kept in own.items())
        run, vectors = self._run_state()
        for p, pieces in vectors.items():
            state[position[id(p)]].update(pieces)
        state[self._run_position].update(_flat({"run": run}))
        groups, names, start = [], self._names(), 0
        for group in self.param_groups:
            end = start + len(group["params"])
            options = {key: value for key, value in group.items() if key != "params"}
            groups.append({**options, "param_names": names[start:end], "params": list(range(start, end))})
            start = end
        return {"state": state, "param_groups": groups}

    def _run_state(self) -> tuple[dict[str, Any], dict[nn.Parameter, dict[str, Tensor]]]:
        """Counters and the sampler; of an adaptive run its numbers too, and its vectors in pieces per parameter."""
        run = {**run_state(self.preconditioner), "skipped": self._skipped.clone()}
        if self.rule is None:
            return run, {}
        run["adaptive"], vectors = _split(self.rule)
        return run, vectors

    # ---- loading ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> IncompatibleKeys:  # type: ignore[override]
        """Restores what `state_dict` gave, from any device and dtype. Nothing is changed unless everything fits.

        Args:
            state_dict: From an optimizer of the same kind; it is not changed.
            strict: False loads what fits, parameters by their names in the model, and reports the rest: for a model
                with layers added or removed. Options of the parameter groups are then loaded only if there are as many
                groups.

        Returns:
            Parameters that are here and were not loaded, and that were there and are not here; both empty if strict.

        Raises:
            ValueError: Not such a state; with ``strict`` other groups, missing entries or other shapes, too. The
                message names the parameter or layer.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        report = self._unpack(state_dict, strict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)
        return report

    def _unpack(self, saved: Mapping[str, Any], strict: bool) -> IncompatibleKeys:
        if not isinstance(saved, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(saved).__name__}")
        if not saved.get("param_groups") or "state" not in saved:
            raise ValueError(
                f"state_dict must have 'state' and 'param_groups' with a group at least, got {sorted(map(str, saved))}"
            )
        pre, parameters, names = self.preconditioner, self._parameters, self._names()
        groups_fit = self._check_groups(saved["param_groups"], strict)
        run = check_run_state(pre, _nested(saved["state"].values()).get("run"))
        if ("adaptive" in run) != (self.rule is not None):
            raise ValueError("state_dict and optimizer must both be adaptive, or neither")
        if self.rule is not None and (lacking := sorted(set(_split(self.rule)[0]) - set(run["adaptive"]))):
            raise ValueError(f"state_dict has no {', '.join(map(repr, lacking))} of the adaptive rule: it is truncated")
        entries, unexpected = _match(saved, names, by_position=strict)
        if strict and unexpected:
            raise ValueError(f"state_dict has state for parameters {unexpected}, which are not here")
        layers_of = defaultdict(list)
        for i, weight, prefix in _places(pre):
            layers_of[id(weight)].append((i, prefix))
        vectors = {} if self.rule is None else _split(self.rule)[1]
        missing, fitting = [], []
        for p, name in zip(parameters, names, strict=True):
            entry = entries.get(name, {})
            try:
                if "step" not in entry:
                    raise ValueError(f"state_dict has no state for {name}: it is truncated or of another optimizer")
                for i, prefix in layers_of[id(p)]:
                    check_layer_state(pre, i, _without(prefix, entry))
                for key in ["momentum_buffer"] * ("momentum_buffer" in entry) + list(vectors.get(p, ())):
                    check_tensor(entry.get(key), key, tuple(p.shape), name)
                fitting.append((p, entry))
            except ValueError:
                if strict:
                    raise
                missing.append(name)
        if strict:
            self._check_momentum(entries, names)

        if groups_fit:
            self._load_options(saved["param_groups"])
        for p, entry in fitting:
            self.state[p].pop("momentum_buffer", None)
            if "momentum_buffer" in entry:
                kept = entry["momentum_buffer"].to(p.device, self._update_dtype(p), copy=True)
                self.state[p]["momentum_buffer"] = kept
            for i, prefix in layers_of[id(p)]:
                load_layer_state(pre, i, _without(prefix, entry))
        load_run_state(pre, run)
        if self.rule is not None:
            loaded = {id(p): entry for p, entry in fitting}
            pieces = {p: loaded.get(id(p), own) for p, own in vectors.items()}
            self.rule.load_state(_join(self.rule, run["adaptive"], pieces))
        self._prepare_state()
        self._skipped.copy_(run.get("skipped", self._skipped))
        return IncompatibleKeys(missing, unexpected)

    def _check_groups(self, saved: list[dict[str, Any]], strict: bool) -> bool:
        """Whether options of the groups can be loaded."""
        if len(saved) != len(self.param_groups):
            if strict:
                raise ValueError(
                    f"state_dict has {len(saved)} parameter groups, the optimizer has {len(self.param_groups)}"
                )
            return False
        for i, (own, other) in enumerate(zip(self.param_groups, saved, strict=True)):
            lacking = sorted({"params", *self.defaults} - set(other))
            if lacking:
                raise ValueError(
                    f"state_dict has no {', '.join(map(repr, lacking))} in group {i}: it is truncated or not of a KFAC"
                )
            check_group(other)
            if strict and len(own["params"]) != len(other["params"]):
                counts = f"{len(other['params'])} parameters in group {i}, the optimizer has {len(own['params'])}"
                raise ValueError(f"state_dict has {counts}")
        return True

    def _check_momentum(self, entries: Mapping[str, Mapping[str, Any]], names: list[str]) -> None:
        """A momentum buffer that only some parameters of a group have is a sign of a truncated state."""
        named = iter(names)
        for group in self.param_groups:
            of_group = [(next(named), p) for p in group["params"]]
            having = {name for name, p in of_group if "momentum_buffer" in entries[name]}
            lacking = [name for name, p in of_group if p.requires_grad and name not in having]
            if having and lacking:
                raise ValueError(f"state_dict has no 'momentum_buffer' for {lacking[0]}: it is truncated")

    def _load_options(self, saved: list[dict[str, Any]]) -> None:
        for own, other in zip(self.param_groups, saved, strict=True):
            kept = {key: own[key] for key in ("params", "param_names") if key in own}
            options = {key: value for key, value in other.items() if key not in ("params", "param_names")}
            own.clear()
            own.update({key: v.clone() if isinstance(v, Tensor) else v for key, v in options.items()}, **kept)

    # ---- copying ----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle has the preconditioner with it, and so the model."""
        own = {"preconditioner": self.preconditioner, "rule": self.rule, "skipped": self._skipped}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        skipped = state.pop("skipped")
        super().__setstate__(state)
        self._prepare_state()
        self._skipped.copy_(skipped)


def _places(preconditioner: Preconditioner) -> Iterator[tuple[int, nn.Parameter, str]]:
    """Of every layer the parameter whose entry has its state, and what its keys begin with: ties share a weight."""
    users: Counter[int] = Counter()
    for i, weight in enumerate(preconditioner.weights):
        before = users[id(weight)]
        users[id(weight)] += 1
        yield i, weight, f"tied{before}_" if before else ""


def _without(prefix: str, entry: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key[len(prefix) :]: value for key, value in entry.items() if key.startswith(prefix)} if prefix else entry


def _match(
    saved: Mapping[str, Any], names: list[str], *, by_position: bool
) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """The saved entry of every name, and whose entries are left over.

    Keys of ``saved["state"]`` are what the groups list under "params": positions, or names in a sharded checkpoint.
    """
    keys = list(chain.from_iterable(group["params"] for group in saved["param_groups"]))
    saved_names = list(
        chain.from_iterable(group.get("param_names", group["params"]) for group in saved["param_groups"])
    )
    name_of = dict(zip(keys, names if by_position else map(str, saved_names), strict=False))
    entries = {name_of.get(key, str(key)): entry for key, entry in saved["state"].items()}
    return entries, sorted(set(entries) - set(names))


def _flat(nested: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested dicts as one with paths like "run/sampler/cpu": flattened sharded checkpoints take no dicts before 2.7."""
    leaves: dict[str, Any] = {}
    for key, value in nested.items():
        leaves.update(_flat(value, f"{path}{key}/") if isinstance(value, dict) else {f"{path}{key}": value})
    return leaves


def _nested(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The inverse of `_flat`, of all keys in these entries that are paths."""
    nested: dict[str, Any] = {}
    for path, value in ((path, value) for entry in entries for path, value in entry.items() if "/" in str(path)):
        *folders, key = path.split("/")
        inner = nested
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[key] = value
    return nested


def _split(rule: AdaptiveRule) -> tuple[dict[str, Any], dict[nn.Parameter, dict[str, Tensor]]]:
    """The rule's numbers, and its vectors over all parameters cut into one piece per parameter."""
    numbers, vectors = {}, {p: {} for p in rule.parameters}  # type: dict[str, Any], dict[nn.Parameter, dict[str, Tensor]]
    for key, value in rule.state().items():
        if isinstance(value, Tensor):
            pieces = value.split([p.numel() for p in rule.parameters])
            for p, piece in zip(rule.parameters, pieces, strict=True):
                vectors[p][f"adaptive_{key}"] = piece.view(p.shape)
        elif value is not None:
            numbers[key] = value
    return numbers, vectors


def _join(
    rule: AdaptiveRule, numbers: Mapping[str, Any], pieces: Mapping[nn.Parameter, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """The inverse of `_split`."""
    state: dict[str, Any] = dict.fromkeys(rule.state()) | dict(numbers)
    for key, value in rule.state().items():
        if isinstance(value, Tensor):
            state[key] = torch.cat([pieces[p][f"adaptive_{key}"].to(value).flatten() for p in rule.parameters])
    return state
