"""Supported modules: which rows of inputs and output gradients make up their Kronecker factors.

To support another kind of module, subclass `Layer`, list the module types in `kinds` and decorate it with
`register`; everything else follows from its methods. Notation: algorithm.md §1, §8.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .ops import ConvRows
from .ops.reference import Gradient

_LAYERS: dict[type[nn.Module], type[Layer]] = {}


def register(layer: type[Layer]) -> type[Layer]:
    """Class decorator: makes K-FAC use this `Layer` for the module types in its `kinds`."""
    for kind in layer.kinds:
        _LAYERS[kind] = layer
    return layer


class Note(Protocol):
    """What a function of `Layer.forward_in_parts` calls for every use of a parameter."""

    def __call__(self, weight: nn.Parameter, inputs: Any, output: Tensor, block: int = 0) -> None:
        """Notes one use.

        Args:
            weight: The `Layer.weight` of the layer whose rows these are. One that no layer in use has is left out.
            inputs: What that layer's `input_rows` takes.
            output: The part's output; its gradient goes to that layer's `output_rows`.
            block: Where a layer has several blocks with rows of their own (q, k and v of a packed projection): the
                first of those that `input_rows` and `output_rows` give rows for.
        """


class Layer(ABC):
    """One module's weight, and bias if it has one, as one or more blocks A ⊗ G.

    Args:
        name: The module's name in the model.
        module: A module of one of the types in `kinds`.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]]

    # Its rows can't be had from the user's own forward pass: the model is then run again for the statistics.
    needs_own_pass: bool = False

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module

    def forward_in_parts(self, note: Note) -> Callable[..., Any] | None:
        """A function that computes what ``module.forward`` does in parts, for modules that are one fused call.

        It stands in for ``module.forward`` during a statistics pass and calls ``note`` for every use of every weight.
        Several layers may share a module; the first one's function that is not None is taken and notes for all.
        None, the default: the module has one weight, and its own input and output are noted.
        """
        return None

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `input_rows` takes, from the arguments of a call of the module; must not be part of a graph."""
        x: Tensor = args[0] if args else kwargs["input"]
        return x.detach()

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        """Why this module can't be a Kronecker block, or None when it can."""
        return None

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return 1

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.module.bias

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    @abstractmethod
    def a_size(self) -> int:
        """Side of A: inputs of one block, plus one for the bias."""

    @property
    @abstractmethod
    def g_size(self) -> int:
        """Side of G: outputs of one block."""

    @abstractmethod
    def input_rows(self, inputs: Tensor) -> Tensor | ConvRows:
        """Rows of A without the bias column, for all blocks."""

    @abstractmethod
    def output_rows(self, gradient: Tensor) -> Tensor | ConvRows:
        """Rows of G from the gradient with respect to the module's output, for all blocks."""

    def matrices(self, weight: Tensor, bias: Tensor | None) -> list[Gradient]:
        """Tensors shaped like the parameters, as one `[d_out, …]` matrix and bias column per block: views."""
        return [weight if bias is None else (weight, bias)]


@register
class LinearLayer(Layer):
    """``nn.Linear``. With inputs ``[N, …, d]`` every position is a row (Eschenhagen et al. 2023, "expand")."""

    kinds = (nn.Linear,)

    @property
    def a_size(self) -> int:
        return self.module.in_features + (self.bias is not None)

    @property
    def g_size(self) -> int:
        return self.module.out_features

    def input_rows(self, inputs: Tensor) -> Tensor:
        return inputs.reshape(-1, self.module.in_features)

    def output_rows(self, gradient: Tensor) -> Tensor:
        return gradient.reshape(-1, self.module.out_features)


@register
class ConvLayer(Layer):
    """Convolutions (Grosse & Martens 2016): a row per output position. Each group of channels is its own block."""

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    @property
    def blocks(self) -> int:
        return self.module.groups

    @property
    def a_size(self) -> int:
        return self.weight[0].numel() + (self.bias is not None)

    @property
    def g_size(self) -> int:
        return self.module.out_channels // self.module.groups

    def _batched(self, images: Tensor) -> Tensor:
        return images if images.ndim == len(self.module.kernel_size) + 2 else images.unsqueeze(0)

    def input_rows(self, inputs: Tensor) -> ConvRows:
        m = self.module
        padding = m.padding
        if padding == "valid":
            padding = 0
        elif padding == "same":  # an odd total puts the extra element behind
            total = [d * (k - 1) for d, k in zip(m.dilation, m.kernel_size, strict=True)]
            padding = [(t // 2, t - t // 2) for t in total]
        return ConvRows(self._batched(inputs), m.kernel_size, m.stride, padding, m.dilation, m.groups, m.padding_mode)

    def output_rows(self, gradient: Tensor) -> ConvRows:
        return ConvRows(self._batched(gradient), 1, groups=self.module.groups)

    def matrices(self, weight: Tensor, bias: Tensor | None) -> list[Gradient]:
        groups = self.module.groups
        if groups == 1:
            return super().matrices(weight, bias)
        weights = weight.chunk(groups)
        return list(weights) if bias is None else list(zip(weights, bias.chunk(groups), strict=True))


def layer_for(name: str, module: nn.Module) -> Layer | str:
    """The `Layer` of a module, or why it has none.

    The exact type decides: a subclass may compute something else.
    """
    layer = _LAYERS.get(type(module))
    if layer is None:
        return f"no Kronecker block for {type(module).__name__}"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "its weight is computed from other parameters (parametrized)"
    reason = layer.unsupported(module)
    if reason is not None:
        return reason
    made = layer(name, module)
    if made.weight.numel() == 0:
        return "it has no elements"
    if any(not p.requires_grad for p in made.parameters):
        return "it is frozen, in whole or in part (requires_grad=False)"
    return made
