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

Direction = dict[str, Tensor]  # by parameter name

# Linear in their inputs and linear in their parameters.
_BILINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# A function of one number, applied to all.
_POINTWISE = (nn.Sigmoid, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Softplus)
# Of these, f'(x) ẋ from ẋ and f(x).
_FROM_RESULT = {nn.Sigmoid: torch.ops.aten.sigmoid_backward, nn.Tanh: torch.ops.aten.tanh_backward}


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
    def forms(self, inputs: ModelInputs, counted: Tensor, directions: Sequence[Direction]) -> Tensor:
        """vᵢᵀ F vⱼ for all pairs of directions.

        Args:
            inputs: The examples to average over.
            counted: Which loss terms count, in the shape of the likelihood's terms.
            directions: Tangents; all name the same parameters.

        Returns:
            ``[k, k]`` float64 for k directions, divided by the number of loss terms, on the CPU.

        Raises:
            RuntimeError: A layer has neither a forward-mode rule nor a second derivative; torch names it.
        """
        outputs, tangents = self._differentiate(inputs, directions)
        forms = torch.empty(len(directions), len(directions), dtype=torch.float64)
        for j in range(len(directions)):
            product = self._likelihood.fisher_product(outputs, tangents[j])
            if not bool(counted.all()):
                product = torch.where(self._likelihood.spread(counted), product, 0.0)
            for i in range(j + 1):
                forms[i, j] = forms[j, i] = _dot(tangents[i], product)
        return forms / counted.sum().clamp(min=1).double().cpu()

    def _differentiate(self, inputs: ModelInputs, directions: Sequence[Direction]) -> tuple[Tensor, list[Tensor]]:
        """The outputs and J v for every direction v."""
        with unnoticed(self._model), differentiable_kernels():
            if not self.forward_mode:
                return self._twice_backward(inputs, directions)
            chain = _as_chain(self._model, inputs)
            try:
                if chain is not None:
                    return self._along_chain(chain, inputs.args[0], directions)
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

    def _along_chain(
        self, chain: list[nn.Module], x: Tensor, directions: Sequence[Direction]
    ) -> tuple[Tensor, list[Tensor]]:
        """Module by module: what does not depend on the direction is computed once for all of them."""
        named = dict(self._model.named_parameters())
        moving: dict[int, list[Tensor]] = {id(named[name]): [d[name] for d in directions] for name in directions[0]}
        devices = cuda_devices(self._model)
        # The activation and, once something has moved, its tangents behind it: ``[1 (+ k), *activation]``.
        jet = x.unsqueeze(0)
        for module in chain:
            mine = {name: moving[id(p)] for name, p in module.named_parameters() if id(p) in moving}
            if _is_bilinear(module, jet):
                jet = _through_bilinear(module, jet, mine)
            elif type(module) in _POINTWISE and not getattr(module, "inplace", False):
                jet = _through_pointwise(module, jet)
            elif mine or len(jet) > 1:
                jet = _through_any(module, jet, mine, len(directions), devices)
            else:
                jet = module(jet[0]).unsqueeze(0)
        tangents = list(jet[1:])
        outputs = self._find_outputs(jet[0])
        return outputs, tangents or [torch.zeros_like(outputs)] * len(directions)

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


def _as_chain(model: nn.Module, inputs: ModelInputs) -> list[nn.Module] | None:
    """The modules that a plain ``nn.Sequential`` runs one after the other; None for any other model."""
    if not (_is_plain_sequential(model) and len(inputs.args) == 1 and not inputs.kwargs):
        return None
    chain: list[nn.Module] = []
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if _is_plain_sequential(module):
            waiting.extend(reversed(list(module.children())))
        else:
            chain.append(module)
    # A module that a hook of the user's may alter has to be called as it is; one hook is enough to give up the chain.
    return chain if all(_is_observed_only(module) for module in model.modules()) else None


def _is_plain_sequential(module: nn.Module) -> bool:
    return type(module) is nn.Sequential


def _is_observed_only(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return all(getattr(hook, "observes_only", False) for hook in hooks)


def _is_bilinear(module: nn.Module, jet: Tensor) -> bool:
    """Whether `_through_bilinear` serves: not for a convolution of one example without a batch dimension."""
    return type(module) in _BILINEAR and (type(module) is nn.Linear or jet[0].ndim == module.weight.ndim)


def _through_bilinear(module: Any, jet: Tensor, moving: dict[str, list[Tensor]]) -> Tensor:
    """Both y = W x + b and ẏ = Ẇ x + ḃ + W ẋ, with one product for all that W meets."""
    weights, biases = moving.get("weight"), moving.get("bias")
    count = len(weights or biases or jet[1:])
    is_linear = type(module) is nn.Linear
    if is_linear:
        result = nn.functional.linear(jet, module.weight)
    else:
        result = module._conv_forward(jet.flatten(0, 1), module.weight, None).unflatten(0, jet.shape[:2])
    if len(jet) <= count:  # W ẋ = 0
        result = torch.cat([result, torch.zeros_like(result[0]).expand(count, *result.shape[1:])])
    for moved, weight in zip(result[1:], weights or (), strict=False):
        if is_linear:
            moved.view(-1, len(weight)).addmm_(jet[0].reshape(-1, weight.shape[1]), weight.T)
        else:
            moved.add_(module._conv_forward(jet[0], weight, None))
    if module.bias is not None:
        shifts = torch.stack([module.bias, *(biases or [torch.zeros_like(module.bias)] * count)])
        spatial = () if is_linear else (1,) * len(module.kernel_size)
        result += shifts.view(1 + count, *(1,) * (result.ndim - 2 - len(spatial)), -1, *spatial)
    return result


def _through_pointwise(module: nn.Module, jet: Tensor) -> Tensor:
    """Both y = f(x) and ẏ = f'(x) ẋ, with one derivative for all directions; overwrites the jet's tangents."""
    if len(jet) == 1:
        return module(jet[0]).unsqueeze(0)
    if type(module) in _FROM_RESULT:
        y = module(jet[0])
        jet[1:] = _FROM_RESULT[type(module)](jet[1:], y.expand_as(jet[1:]))
        jet[0] = y
        return jet
    with torch.enable_grad():
        x = jet[0].detach().requires_grad_()
        y = module(x)
        (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    jet[1:] *= slope
    jet[0] = y.detach()
    return jet


def _through_any(
    module: nn.Module, jet: Tensor, moving: dict[str, list[Tensor]], count: int, devices: list[int]
) -> Tensor:
    """One dual pass per direction."""
    parameters = dict(module.named_parameters())
    results = []
    for j in range(count):
        # Every direction has to see the same input, though the module may write to it, and the same dropout mask; the
        # next module another one.
        own = jet[0].clone()
        with torch.random.fork_rng(devices, enabled=j < count - 1), forward_ad.dual_level():
            dual = own if len(jet) == 1 else forward_ad.make_dual(own, jet[1 + j])
            duals = {name: forward_ad.make_dual(parameters[name].detach(), v[j]) for name, v in moving.items()}
            y, tangent = forward_ad.unpack_dual(functional_call(module, duals, (dual,)) if duals else module(dual))
            results.append(torch.zeros_like(y) if tangent is None else tangent)
    return torch.stack([y, *results])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype.itemsize < 4:
        a, b = a.float(), b.float()
    return torch.dot(a.flatten(), b.flatten())
