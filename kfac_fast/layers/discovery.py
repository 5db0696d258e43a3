"""Which modules of a model get which layers, and for every other parameter the reason why it has none."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from .base import KroneckerLayer, Layer, registered
from .embedding import EmbeddingLayer
from .linear import LinearLayer

# Three buffers of an 8192² factor are 0.8 GB in float32, and its inverse takes about a second on a fast CPU.
MAX_SIDE = 8192


@dataclass(frozen=True)
class Blocks:
    """Which modules are preconditioned, by which class, and within what memory.

    Patterns are those of the shell (``fnmatch``) and are matched with the names of ``model.named_modules()``: "head",
    "encoder.*", "*.norm?".

    Attributes:
        include: One or several patterns; a module that matches none is left out.
        exclude: A module that matches one of these is left out.
        classes: `Layer` classes by pattern, in place of the one registered for the module's type; the first match
            counts.
        max_side: A factor with more rows than this keeps its diagonal only; None never does. The default is where
            memory (three n × n matrices) and the time of an inverse become a surprise: vocabularies.
        max_factor_bytes: Most memory for factors, pending sums and inverses together. A model that needs more is
            refused, with the sum in the message; None refuses none. `KFAC.memory` tells.

    Raises:
        TypeError: A pattern that is no string, a class that is no `Layer`.
        ValueError: ``max_side`` or ``max_factor_bytes`` below 1.
    """

    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()
    classes: Mapping[str, type[Layer]] = field(default_factory=dict)
    max_side: int | None = MAX_SIDE
    max_factor_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            value = getattr(self, name)
            patterns = (value,) if isinstance(value, str) else tuple(value)
            if any(not isinstance(pattern, str) for pattern in patterns):
                raise TypeError(f"{name} must be a pattern or several, got {value!r}")
            object.__setattr__(self, name, patterns)
        for pattern, layer in self.classes.items():
            if not (isinstance(pattern, str) and isinstance(layer, type) and issubclass(layer, Layer)):
                raise TypeError(f"classes must map patterns to Layer classes, got {pattern!r}: {layer!r}")
        for name in ("max_side", "max_factor_bytes"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be an integer >= 1 or None, got {name}={value!r}")

    def check_names(self, names: Sequence[str]) -> None:
        """Refuses patterns that match no module: more likely a slip than a wish.

        Raises:
            ValueError: The message names the argument and the pattern.
        """
        for argument in ("include", "exclude", "classes"):
            for pattern in getattr(self, argument):
                if not any(fnmatchcase(name, pattern) for name in names):
                    known = ", ".join(map(repr, names[:8])) + (", …" if len(names) > 8 else "")
                    raise ValueError(f"{argument} has {pattern!r}, which matches no module; there are {known}")

    def reason_against(self, name: str) -> str | None:
        """Why a module of this name is left out."""
        for pattern in self.exclude:
            if fnmatchcase(name, pattern):
                return f"it is excluded (exclude={pattern!r})"
        if any(fnmatchcase(name, pattern) for pattern in self.include):
            return None
        return f"it is not included (include={', '.join(map(repr, self.include))})"

    def layer_class(self, name: str, module: nn.Module) -> type[Layer] | None:
        """The class for a module of this name; None if there is none."""
        for pattern, layer in self.classes.items():
            if fnmatchcase(name, pattern):
                return layer
        return registered(module)


class Found(NamedTuple):
    """A parameter of the model."""

    name: str
    parameter: nn.Parameter
    layers: tuple[Layer, ...]  # that cover it: several if it is tied
    reason: str  # why none does


def discover(
    model: nn.Module, parameters: Iterable[nn.Parameter] | None, blocks: Blocks, in_shards: Container[int] = ()
) -> tuple[list[Found], list[Layer]]:
    """Every parameter of the model with its layers or the reason why it has none, and all layers in model order.

    Args:
        model: The model.
        parameters: Only layers whose parameters are all among these count; None is all.
        blocks: The user's selection.
        in_shards: Identities of parameters that may be sharded over ranks.

    Raises:
        ValueError: A pattern of ``blocks`` matches no module.
        TypeError: A class of ``blocks`` does not fit a module.
    """
    allowed = None if parameters is None else {id(p) for p in parameters}
    layers: list[Layer] = []
    reasons: dict[int, str] = {}
    modules = dict(model.named_modules())
    blocks.check_names(list(modules))
    for name, module in modules.items():
        try:
            found = _candidate(name, module, blocks)
            reason = found if isinstance(found, str) else _reason_against(found, allowed, in_shards, layers)
        except AttributeError as error:
            raise TypeError(
                f"blocks: the class for {name!r} does not fit a {type(module).__name__}: {error}"
            ) from error
        own = list(module.parameters(recurse=False))
        if isinstance(found, Layer):
            own += found.parameters.values()
            if reason is None:
                layers.append(found)
        for p in own:
            reasons.setdefault(id(p), reason or f"{type(found).__name__} does not cover it")
    layers = _settle_ties(layers, _uses(model), reasons)
    covering: dict[int, list[Layer]] = defaultdict(list)
    for layer in layers:
        for p in layer.parameters.values():
            covering[id(p)].append(layer)
    return [Found(name, p, tuple(covering[id(p)]), reasons[id(p)]) for name, p in model.named_parameters()], layers


def _candidate(name: str, module: nn.Module, blocks: Blocks) -> Layer | str:
    made = blocks.layer_class(name, module)
    if parametrize.is_parametrized(module) or isinstance(module, parametrize.ParametrizationList):
        return "the weight is computed from it (parametrized)"
    if made is None:
        return f"no block for {type(module).__name__}"
    reason = blocks.reason_against(name) or made.unsupported(module)
    if reason is not None:
        return reason
    layer = made(name, module)
    if isinstance(layer, KroneckerLayer):
        layer.max_side = blocks.max_side
    return layer


def _reason_against(
    layer: Layer, allowed: set[int] | None, in_shards: Container[int], layers: list[Layer]
) -> str | None:
    own = layer.parameters
    for name, p in own.items():
        if not isinstance(p, nn.Parameter):
            return f"the {name} is computed from it, not a parameter"
        if type(p) is not nn.Parameter and id(p) not in in_shards:
            return f"its {name} is a {type(p).__name__}"
        if p.numel() == 0:
            return "it has no elements"
        if not p.is_floating_point():
            return f"its {name} is {p.dtype}"
        first = layers[0].weight if layers else layer.weight
        if p.device != first.device or (p.dtype == torch.float64) != (first.dtype == torch.float64):
            return f"it is {p.dtype} on {p.device}, while the first layer is {first.dtype} on {first.device}"
    if any(not p.requires_grad for p in own.values()):
        return "its layer is frozen, in whole or in part (requires_grad=False)"
    if allowed is not None and any(id(p) not in allowed for p in own.values()):
        return "its parameters are not all in this optimizer"
    return None


# ---- tied weights ---------------------------------------------------------------------------------------------------


def _uses(model: nn.Module) -> dict[int, int]:
    """In how many places of the model a parameter stands."""
    uses: dict[int, int] = defaultdict(int)
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                uses[id(p)] += 1
    return uses


def _settle_ties(layers: list[Layer], uses: dict[int, int], reasons: dict[int, str]) -> list[Layer]:
    """Pools layers that are the same in all but their module, pairs tied embeddings and heads, drops other ties."""
    sharing: dict[int, list[Layer]] = defaultdict(list)
    for layer in layers:
        for p in layer.parameters.values():
            if uses[id(p)] > 1:
                sharing[id(p)].append(layer)
    dropped: set[int] = set()
    for key, group in sharing.items():
        group = [layer for layer in group if id(layer) not in dropped]
        if sum(len(layer.modules) for layer in group) < uses[key]:
            reason = "it is shared with a module that has no block"
        else:
            group, pooled = _pool(group)
            dropped |= {id(layer) for layer in pooled}
            if len(group) <= 1 or _pair(group):
                continue
            reason = "it is shared with a module that differs in kind, settings or other parameters"
        for layer in group:
            dropped.add(id(layer))
            for p in layer.parameters.values():
                reasons[id(p)] = reason if id(p) == key else f"the other parameter of its layer: {reason}"
    return [layer for layer in layers if id(layer) not in dropped]


def _pool(group: list[Layer]) -> tuple[list[Layer], list[Layer]]:
    """Gives layers with the same parameters and settings one `Layer`; those that are left, and those that went."""
    kept: dict[object, Layer] = {}
    gone: list[Layer] = []
    for layer in group:
        own = tuple(map(id, layer.parameters.values()))
        key = id(layer) if layer.needs_own_pass else (type(layer), own, layer.module.extra_repr())
        first = kept.setdefault(key, layer)
        if first is not layer:
            first.modules += layer.modules
            gone.append(layer)
    return list(kept.values()), gone


def _pair(group: list[Layer]) -> bool:
    """Makes an embedding and the output layer that shares its table one block."""
    embedding, head = sorted(group, key=lambda layer: isinstance(layer, LinearLayer))[:2]
    if len(group) > 2 or not (isinstance(embedding, EmbeddingLayer) and isinstance(head, LinearLayer)):
        return False
    head.blocks = [dataclasses.replace(block, g_diagonal=True) for block in head.blocks]
    embedding.head = head
    return True
