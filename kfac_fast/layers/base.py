"""`Layer`: one module's parameters and what their curvature is made of; which class serves which module."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..ops import ConvRows, Gradient

_LAYERS: dict[type[nn.Module], type[Layer]] = {}

Inputs = tuple[Any, ...]  # of one use: what `Layer.inputs` gave

# ``note(block, inputs, output)``: one use of a block, by its position in the layer's blocks. ``inputs`` are ``[…, a]``
# without the bias; ``output`` is ``[…, g]``, a tensor whose gradient is that of the block's output.
Note = Callable[[int, Tensor, Tensor], None]


def register(layer: type[Layer]) -> type[Layer]:
    """Class decorator: K-FAC uses this `Layer` for the module types in its `kinds`; a later one replaces an earlier."""
    for kind in layer.kinds:
        _LAYERS[kind] = layer
    return layer


def registered(module: nn.Module) -> type[Layer] | None:
    """The `Layer` class of a module. The exact type decides: a subclass may compute something else."""
    kind, *bases = type(module).__mro__
    if bases[0].__name__ == "FSDPModule":  # `fully_shard` put a type of its own in front
        kind = bases[1]
    return _LAYERS.get(kind)


@dataclass(frozen=True)
class Block:
    """Part of a layer that has its own block in the approximate Fisher matrix.

    Attributes:
        parameters: Names within the module of the parameters that it covers, wholly or in part.
        label: Tells the blocks of a layer apart, in warnings.
    """

    parameters: tuple[str, ...]
    label: str = ""

    @property
    def numbers(self) -> int:
        """How many numbers its second moments are."""
        return 0


@dataclass(frozen=True)
class KroneckerBlock(Block):
    """A ⊗ G.

    Attributes:
        a: Side of A: inputs, plus one for the bias.
        g: Side of G: outputs.
        bias: Whether A's last row and column stand for a bias, an input that is always 1.
        a_diagonal: Whether only the diagonal of A is kept.
        g_diagonal: The same for G.
    """

    a: int = 0
    g: int = 0
    bias: bool = False
    a_diagonal: bool = False
    g_diagonal: bool = False

    @property
    def numbers(self) -> int:
        """Elements of A and G."""
        return (self.a if self.a_diagonal else self.a**2) + (self.g if self.g_diagonal else self.g**2)

    def limited(self, max_side: int) -> KroneckerBlock:
        """With only the diagonal of a factor that has more rows than this."""
        return dataclasses.replace(
            self, a_diagonal=self.a_diagonal or self.a > max_side, g_diagonal=self.g_diagonal or self.g > max_side
        )


@dataclass(frozen=True)
class UnitBlock(Block):
    """A 2×2 block per unit, for its scale and shift."""

    units: int = 0

    @property
    def numbers(self) -> int:
        """Second moments of scale and shift."""
        return 3 * self.units


@dataclass(frozen=True)
class SquareSums:
    """Rows of which only the sums of squares are known: all that a diagonal factor needs.

    Attributes:
        sums: Σ over rows of the squares, ``[a]``.
        rows: Their number.
    """

    sums: Tensor
    rows: int


class Layer(ABC):
    """One module's parameters in the approximate Fisher matrix; see `KroneckerLayer` and `UnitLayer`.

    A *use* is one call of the module: its inputs, and the gradient of the log-likelihood with respect to its output.
    A module that computes several matrix products in one fused call has a use per product instead, seen by running it
    in parts.

    Args:
        name: The module's name in the model.
        module: A module of one of the types in `kinds`.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = ()
    needs_own_pass: ClassVar[bool] = False  # what happens inside the module is seen only when it is run in parts

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module
        self.modules: list[nn.Module] = [module]  # several if they share all parameters: their uses are pooled

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        """Why this module can't be served, or None when it can."""
        return None

    @property
    @abstractmethod
    def blocks(self) -> Sequence[Block]:
        """Its blocks."""

    @functools.cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The covered parameters by their name in the module. The first one stands for the layer in its group.

        Looked up once: FSDP2 puts other tensors in their place for the time of a forward and backward pass.
        """
        names = dict.fromkeys(name for block in self.blocks for name in block.parameters)
        return {name: getattr(self.module, name) for name in names}

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that stands for the layer, in parameter groups and checkpoints."""
        return next(iter(self.parameters.values()))

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """What the rows need of a call's arguments: tensors that autograd keeps too, detached, and small things."""
        x: Tensor = args[0] if args else kwargs["input"]
        return (x.detach(),)

    @abstractmethod
    def matrices(self, values: Mapping[str, Tensor]) -> Sequence[Gradient]:
        """Values of `parameters`, by name and of their shapes, as a weight or a weight and a bias per block: views."""

    def forward_in_parts(self, note: Note) -> Callable[..., Any] | None:
        """What the module computes, in parts, for modules that are one fused call.

        Returns:
            A function with the arguments and results of ``module.forward``, which it stands in for during a statistics
            pass; it calls ``note`` for every use of every block. None, the default: the module's own input and output
            are noted.
        """
        return None


class KroneckerLayer(Layer):
    """A layer of blocks A ⊗ G, each a matrix that is applied to every row of its inputs."""

    max_side: int | None = None  # a larger factor keeps its diagonal only; None: no limit
    head: KroneckerLayer | None = None  # of an embedding: the output layer that has the same weight

    @functools.cached_property
    def blocks(self) -> Sequence[KroneckerBlock]:
        made = self.make_blocks()
        return made if self.max_side is None else [block.limited(self.max_side) for block in made]

    @abstractmethod
    def make_blocks(self) -> Sequence[KroneckerBlock]:
        """The blocks, in the order of `matrices`: a ``[g, …]`` matrix, and a bias column ``[g]`` if there is one."""

    def input_rows(self, inputs: Tensor, *rest: Any) -> Tensor | ConvRows | SquareSums:
        """Rows of A ``[R, a]`` without the bias, of all blocks of a use; `SquareSums` will do for a diagonal A."""
        return inputs.reshape(-1, inputs.shape[-1])

    def output_rows(self, gradient: Tensor, *inputs: Any) -> Tensor | ConvRows:
        """Rows of G ``[R, g]`` from the gradient with respect to the output, of all blocks of a use."""
        return gradient.reshape(-1, gradient.shape[-1])


class WeightLayer(KroneckerLayer):
    """A module with one ``weight [g, …]``, and a ``bias [g]`` or None, in one or more groups of outputs."""

    @property
    def bias(self) -> nn.Parameter | None:
        return self.module.bias

    @property
    @abstractmethod
    def a_size(self) -> int:
        """Side of A: inputs of one block, plus one for the bias."""

    @property
    @abstractmethod
    def g_size(self) -> int:
        """Side of G: outputs of one block."""

    @property
    def groups(self) -> int:
        """Number of blocks, of one size."""
        return 1

    def make_blocks(self) -> Sequence[KroneckerBlock]:
        bias = self.bias is not None
        names = ("weight", "bias") if bias else ("weight",)
        labels = [f"group {i}" for i in range(self.groups)] if self.groups > 1 else [""]
        return [KroneckerBlock(names, label, self.a_size, self.g_size, bias) for label in labels]

    def matrices(self, values: Mapping[str, Tensor]) -> Sequence[Gradient]:
        weight, bias = values["weight"], values.get("bias")
        if self.groups == 1:
            return [weight if bias is None else (weight, bias)]
        weights = weight.chunk(self.groups)
        return weights if bias is None else list(zip(weights, bias.chunk(self.groups), strict=True))


class UnitLayer(Layer):
    """Units with a scale and perhaps a shift each, y_j = scale_j x̂_j + shift_j: one 2×2 block per unit."""

    @property
    def blocks(self) -> Sequence[UnitBlock]:
        names = ("weight",) if getattr(self.module, "bias", None) is None else ("weight", "bias")
        return [UnitBlock(names, units=self.module.weight.numel())]

    @abstractmethod
    def normalised(self, *inputs: Any) -> Tensor:
        """x̂, shaped like the output."""

    @abstractmethod
    def by_unit(self, values: Tensor) -> Tensor:
        """Values shaped like the output as ``[…, units]``, summed over the positions of a unit within an example."""

    def gradients(self, gradient: Tensor, examples: int, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Gradients ``[R, units]`` of scale and shift, one row per example.

        Args:
            gradient: With respect to the output.
            examples: Their number. The first leading dimension of this size is theirs, and positions along the others
                are summed. Without one every position is a row of its own.
            inputs: Of the call.
        """
        scale = self.by_unit(gradient * self.normalised(*inputs))
        return _by_example(scale, examples), _by_example(self.by_unit(gradient), examples)

    def matrices(self, values: Mapping[str, Tensor]) -> Sequence[Gradient]:
        bias = values.get("bias")
        return [(values["weight"].flatten(), None if bias is None else bias.flatten())]


def _by_example(values: Tensor, examples: int) -> Tensor:
    lead = tuple(values.shape[:-1])
    if examples not in lead:
        return values.reshape(-1, values.shape[-1])
    others = [dim for dim in range(len(lead)) if dim != lead.index(examples)]
    return values.sum(others) if others else values
