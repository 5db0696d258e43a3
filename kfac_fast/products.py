"""Products with the exact Fisher matrix through the network: vᵀ F w = (1/M) Σ (J v)ᵀ F_R (J w) (sec. 6.4, App. C)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from .likelihoods import Likelihood
from .passes import ModelInputs, cuda_devices, differentiable_kernels, unnoticed
from .sequence import BILINEAR, Values, is_pointwise, modules_in_order

Direction = dict[str, Tensor]  # by parameter name


class FisherProducts:
    """Quadratic forms of the exact Fisher matrix of a model; its buffers and the random generators stay as they are.

    J v comes from forward-mode differentiation. Where a layer has no forward-mode rule it comes from differentiating
    the backward pass, J v = ∂(vᵀ Jᵀ u)/∂u, which every layer with an ordinary derivative has; the first failure
    decides it for good.

    Args:
        model: The network.
        likelihood: Gives F_R, the Fisher of the outputs.
        find_outputs: From what the model returns to its output tensor.

    Attributes:
        forward_mode: Whether forward mode is used; False after its first failure.
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood, find_outputs: Callable[[Any], Tensor]) -> None:
        self._model = model
        self._likelihood = likelihood
        self._find_outputs = find_outputs
        self.forward_mode = True

    @torch.no_grad()
    def forms(
        self, inputs: ModelInputs, counted: Tensor, directions: Sequence[Direction], values: Values | None = None
    ) -> Tensor:
        """vᵢᵀ F vⱼ for all pairs of directions.

        Args:
            inputs: The examples to average over.
            counted: Which loss terms count, in the shape of the likelihood's terms.
            directions: Tangents; all name the same parameters.
            values: What the model computed for these examples at these parameters, if that is known.

        Returns:
            ``[k, k]`` float64 for k directions, divided by the number of loss terms, on the CPU.

        Raises:
            RuntimeError: A layer has neither a forward-mode rule nor a second derivative; torch names it.
        """
        outputs, tangents = self._differentiate(inputs, directions, values)
        forms = torch.empty(len(directions), len(directions), dtype=torch.float64)
        for j in range(len(directions)):
            product = self._likelihood.fisher_product(outputs, tangents[j])
            if not bool(counted.all()):
                product = torch.where(self._likelihood.spread(counted), product, 0.0)
            for i in range(j + 1):
                forms[i, j] = forms[j, i] = _dot(tangents[i], product)
        return forms / counted.sum().clamp(min=1).double().cpu()

    def _differentiate(
        self, inputs: ModelInputs, directions: Sequence[Direction], values: Values | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The outputs and J v for every direction v."""
        if values is not None and self.forward_mode:
            return self._along(values, directions)
        with unnoticed(self._model), differentiable_kernels():
            if not self.forward_mode:
                return self._twice_backward(inputs, directions)
            modules = modules_in_order(self._model) if len(inputs.args) == 1 and not inputs.kwargs else None
            try:
                if modules is not None:
                    return self._along(Values(modules, {0: inputs.args[0]}), directions)
                return self._forward(inputs, directions)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # also NotImplementedError: no forward-mode rule
                try:
                    result = self._twice_backward(inputs, directions)
                except RuntimeError:
                    raise error from None  # a failure of the model itself, or neither derivative exists
                self.forward_mode = False
                return result

    def _forward(self, inputs: ModelInputs, directions: Sequence[Direction]) -> tuple[Tensor, list[Tensor]]:
        parameters = dict(self._model.named_parameters())
        tangents = []
        for direction in directions:
            # `unnoticed` also gives every direction the same dropout mask.
            with unnoticed(self._model), forward_ad.dual_level():
                duals = {name: forward_ad.make_dual(parameters[name].detach(), v) for name, v in direction.items()}
                result = self._find_outputs(functional_call(self._model, duals, inputs.args, inputs.kwargs))
                outputs, tangent = forward_ad.unpack_dual(result)
                tangents.append(torch.zeros_like(outputs) if tangent is None else tangent)
        return outputs, tangents

    def _along(self, values: Values, directions: Sequence[Direction]) -> tuple[Tensor, list[Tensor]]:
        """Module by module: what does not depend on the direction is computed once for all of them, or not at all."""
        named = dict(self._model.named_parameters())
        moving: dict[int, list[Tensor]] = {id(named[name]): [d[name] for d in directions] for name in directions[0]}
        devices = cuda_devices(self._model)
        tangents: Tensor | None = None  # of the activation, once something has moved: ``[k, *activation]``
        for i, module in enumerate(values.modules):
            mine = {name: moving[id(p)] for name, p in module.named_parameters() if id(p) in moving}
            if not mine and tangents is None:
                continue
            if _is_bilinear(module, values, i):
                tangents = _through_bilinear(values, i, tangents, mine)
            elif is_pointwise(module) and tangents is not None:
                tangents = values.times_slope(i, tangents)
            else:
                output, tangents = _through_any(module, values[i], tangents, mine, len(directions), devices)
                values.put(i + 1, output)
        outputs = values.outputs
        found = [self._find_outputs(t) for t in tangents] if tangents is not None else []
        outputs = self._find_outputs(outputs)
        return outputs, found or [torch.zeros_like(outputs)] * len(directions)

    def _twice_backward(self, inputs: ModelInputs, directions: Sequence[Direction]) -> tuple[Tensor, list[Tensor]]:
        named = dict(self._model.named_parameters())
        variables = {name: named[name].detach().requires_grad_() for name in directions[0]}
        with torch.enable_grad():
            outputs = self._find_outputs(functional_call(self._model, variables, inputs.args, inputs.kwargs))
            u = torch.zeros_like(outputs, requires_grad=True)
            # Linear in u, so that its derivative does not depend on the u it is taken at.
            pulled = torch.autograd.grad(
                outputs, list(variables.values()), u, create_graph=True, materialize_grads=True
            )
            tangents = []
            for direction in directions:
                vectors = [direction[name] for name in variables]
                pairs = [(g, v) for g, v in zip(pulled, vectors, strict=True) if g.requires_grad]
                gradients, weights = [g for g, _ in pairs], [v for _, v in pairs]
                tangents.append(
                    torch.autograd.grad(gradients, u, weights, retain_graph=True, materialize_grads=True)[0]
                    if pairs
                    else torch.zeros_like(outputs)
                )
        return outputs.detach(), [t.detach() for t in tangents]


def _is_bilinear(module: nn.Module, values: Values, position: int) -> bool:
    """Whether `_through_bilinear` serves: not for a convolution of one example without a batch dimension."""
    return type(module) is nn.Linear or (type(module) in BILINEAR and values[position].ndim == module.weight.ndim)


def _through_bilinear(
    values: Values, position: int, tangents: Tensor | None, moving: dict[str, list[Tensor]]
) -> Tensor:
    """ẏ = Ẇ x + ḃ + W ẋ for y = W x + b, with one product for all that W meets."""
    module: Any = values.modules[position]
    weights, biases = moving.get("weight"), moving.get("bias")
    is_linear = type(module) is nn.Linear
    if tangents is None and weights is None:
        output = values[position + 1]
        result = torch.zeros(len(biases or ()), *output.shape, dtype=output.dtype, device=output.device)
    elif tangents is None:
        result = torch.stack([_product(module, values[position], weight) for weight in weights or ()])
    else:
        if is_linear:
            result = nn.functional.linear(tangents, module.weight)
        else:
            result = _product(module, tangents.flatten(0, 1), module.weight).unflatten(0, tangents.shape[:2])
        for moved, weight in zip(result, weights or (), strict=False):
            if is_linear:
                moved.view(-1, len(weight)).addmm_(values[position].reshape(-1, weight.shape[1]), weight.T)
            else:
                moved.add_(_product(module, values[position], weight))
    if biases is not None:
        spatial = () if is_linear else (1,) * len(module.kernel_size)
        result += torch.stack(biases).view(len(biases), *(1,) * (result.ndim - 2 - len(spatial)), -1, *spatial)
    return result


def _product(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(x, weight) if type(module) is nn.Linear else module._conv_forward(x, weight, None)


def _through_any(
    module: nn.Module,
    x: Tensor,
    tangents: Tensor | None,
    moving: dict[str, list[Tensor]],
    count: int,
    devices: list[int],
) -> tuple[Tensor, Tensor]:
    """Output and tangents, by one dual pass per direction."""
    parameters = dict(module.named_parameters())
    results = []
    for j in range(count):
        # Every direction has to see the same input, though the module may write to it, and the same dropout mask; the
        # next module another one.
        own = x.clone()
        with torch.random.fork_rng(devices, enabled=j < count - 1), forward_ad.dual_level():
            dual = own if tangents is None else forward_ad.make_dual(own, tangents[j])
            duals = {name: forward_ad.make_dual(parameters[name].detach(), v[j]) for name, v in moving.items()}
            y, tangent = forward_ad.unpack_dual(functional_call(module, duals, (dual,)) if duals else module(dual))
            results.append(torch.zeros_like(y) if tangent is None else tangent)
    return y, torch.stack(results)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype.itemsize < 4:
        a, b = a.float(), b.float()
    return torch.dot(a.flatten(), b.flatten())
