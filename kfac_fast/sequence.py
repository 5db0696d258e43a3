"""What a plain sequence of modules computed in the user's own pass, and derivatives along it without another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .passes import ModelInputs, saves_are_packed

# Linear in their inputs and linear in their parameters.
BILINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# A function of one number, applied to all.
POINTWISE = (nn.Sigmoid, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Softplus)
# Of these, f'(x) t from t and f(x).
_FROM_RESULT: dict[type[nn.Module], Callable[[Tensor, Tensor], Tensor]] = {
    nn.Sigmoid: torch.ops.aten.sigmoid_backward,
    nn.Tanh: torch.ops.aten.tanh_backward,
    nn.ReLU: lambda t, y: torch.ops.aten.threshold_backward(t, y, 0),
}
# They change the shape and nothing else.
_RESHAPING = (nn.Identity, nn.Flatten)


def modules_in_order(model: nn.Module) -> list[nn.Module] | None:
    """The modules that a plain ``nn.Sequential`` runs one after the other; None for any other model.

    None too where a hook of the user's may alter what a module does.
    """
    if type(model) is not nn.Sequential:
        return None
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    if not all(getattr(hook, "observes_only", False) for hook in hooks):
        return None
    found: list[nn.Module] = []
    waiting: list[nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        if type(module) is nn.Sequential:
            waiting.extend(reversed([m for m in module._modules.values() if m is not None]))  # `children` drops repeats
        else:
            found.append(module)
    return found


def is_pointwise(module: nn.Module) -> bool:
    return type(module) in POINTWISE and not getattr(module, "inplace", False)


class Values:
    """The input of every module of a sequence, and the output of the last; what is not known is computed when asked.

    Args:
        modules: In the order in which they run.
        known: Inputs by position; position ``len(modules)`` is the output of the last.
    """

    def __init__(self, modules: list[nn.Module], known: dict[int, Tensor]) -> None:
        self.modules = modules
        self._known = known

    def __getitem__(self, position: int) -> Tensor:
        start = position
        while start not in self._known:
            start -= 1
            if start < 0:
                raise KeyError(position)
        for i in range(start, position):
            self._known[i + 1] = self.modules[i](self._known[i])
        return self._known[position]

    def put(self, position: int, value: Tensor) -> None:
        self._known[position] = value

    @property
    def outputs(self) -> Tensor:
        return self[len(self.modules)]

    @property
    def pulls_back(self) -> bool:
        """Whether `pull_back` serves."""
        return all(type(m) in (nn.Linear, *_RESHAPING) or is_pointwise(m) for m in self.modules)

    def times_slope(self, position: int, t: Tensor) -> Tensor:
        """f'(x) t for the pointwise module at a position: tangents on the way forward, gradients on the way back.

        Args:
            position: Of the module.
            t: In the shape of its input, perhaps with more dimensions in front.
        """
        module = self.modules[position]
        if type(module) in _FROM_RESULT:
            y = self[position + 1]
            return _FROM_RESULT[type(module)](t, y.expand_as(t))
        with torch.enable_grad():
            x = self[position].detach().requires_grad_()
            y = module(x)
            (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
        self.put(position + 1, y.detach())
        return t * slope

    def pull_back(self, gradient: Tensor, lowest: int) -> Iterator[tuple[int, Tensor]]:
        """Positions from the last one down to the lowest, and the gradient of the output of the module that is there.

        Args:
            gradient: Of the output of the last.
            lowest: Where to stop.
        """
        for position in range(len(self.modules) - 1, lowest - 1, -1):
            yield position, gradient
            if position == lowest:
                return
            module: Any = self.modules[position]
            if is_pointwise(module):
                gradient = self.times_slope(position, gradient)
            elif type(module) is nn.Linear:
                gradient = gradient @ module.weight
            else:
                gradient = gradient.reshape(self[position].shape)


class Kept:
    """What the user's own forward pass showed of a sequence in which every example goes its own way.

    That is one of linear layers, convolutions and pointwise functions alone, each module once: rows of what the pass
    computed are then what a pass over these rows would compute.

    Args:
        modules: In the order in which they run.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules
        self._places = {id(module): i for i, module in enumerate(modules)}
        self._known: dict[int, tuple[Tensor, int]] = {}  # by position; with the version

    @classmethod
    def of(cls, model: nn.Module, inputs: ModelInputs) -> Kept | None:
        """For a coming pass of the model; None where this does not serve.

        Under autocast values are in another dtype than a pass of ours would have. Where a checkpoint packs them, nobody
        wants them kept.
        """
        if len(inputs.args) != 1 or inputs.kwargs or inputs.surroundings.is_autocast or saves_are_packed() is not False:
            return None
        modules = modules_in_order(model)
        if modules is None or len({id(m) for m in modules}) < len(modules):
            return None
        serve = (type(m) in (*BILINEAR, nn.Identity) or is_pointwise(m) or _flattens_examples(m) for m in modules)
        return cls(modules) if all(serve) else None

    def note(self, module: nn.Module | None, value: Tensor) -> None:
        """The input of a module, or (None) the output of the model."""
        position = len(self._modules) if module is None else self._places.get(id(module))
        if position is not None and not value.is_inference():
            self._known[position] = value.detach(), value._version

    def rows(self, chosen: slice, size: int) -> Values | None:
        """Values of these examples; None where one was changed in place since, or no input was noted, as in a compiled
        model.

        Args:
            chosen: The examples.
            size: Their number in the whole batch.
        """
        if not any(position < len(self._modules) for position in self._known):
            return None
        for value, version in self._known.values():
            if value._version != version or value.ndim < 2 or len(value) != size:
                return None
        # A copy of some rows: a view would hold all of them for as long as these wait to be added up.
        return Values(self._modules, {i: value[chosen].contiguous() for i, (value, _) in self._known.items()})


def _flattens_examples(module: nn.Module) -> bool:
    return type(module) is nn.Flatten and module.start_dim == 1
