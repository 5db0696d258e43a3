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
        tangents: list[Tensor] | None = None  # None: zero
        for module in chain:
            mine = {name: moving[id(p)] for name, p in module.named_parameters() if id(p) in moving}
            if type(module) in _BILINEAR:
                x, tangents = _through_bilinear(module, x, tangents, mine)
            elif type(module) in _POINTWISE and not getattr(module, "inplace", False):
                x, tangents = _through_pointwise(module, x, tangents)
            elif mine or tangents is not None:
                x, tangents = _through_any(module, x, tangents, mine, len(directions), devices)
            else:
                x = module(x)
        outputs = self._find_outputs(x)
        return outputs, [torch.zeros_like(outputs)] * len(directions) if tangents is None else tangents

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


def _through_bilinear(
    module: Any, x: Tensor, tangents: list[Tensor] | None, moving: dict[str, list[Tensor]]
) -> tuple[Tensor, list[Tensor] | None]:
    """Both y = W x + b and ẏ = Ẇ x + ḃ + W ẋ."""
    apply = nn.functional.linear if type(module) is nn.Linear else module._conv_forward
    weights, biases = moving.get("weight"), moving.get("bias")
    y = apply(x, module.weight, module.bias)
    result: list[Tensor] | None = None
    if weights is not None:
        shifts: Sequence[Tensor | None] = biases or [None] * len(weights)
        result = [apply(x, weight, shift) for weight, shift in zip(weights, shifts, strict=True)]
    if tangents is not None:
        passed = [apply(t, module.weight, None) for t in tangents]
        result = passed if result is None else [r.add_(p) for r, p in zip(result, passed, strict=True)]
    if weights is None and biases is not None:
        shape = (-1,) if type(module) is nn.Linear else (-1, *(1,) * len(module.kernel_size))
        moved = [bias.view(shape).expand_as(y).clone() for bias in biases]
        result = moved if result is None else [r + m for r, m in zip(result, moved, strict=True)]
    return y, result


def _through_pointwise(
    module: nn.Module, x: Tensor, tangents: list[Tensor] | None
) -> tuple[Tensor, list[Tensor] | None]:
    """Both y = f(x) and ẏ = f'(x) ẋ, with one derivative for all directions."""
    if tangents is None:
        return module(x), None
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = module(x)
        (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), [t.mul_(slope) for t in tangents]


def _through_any(
    module: nn.Module,
    x: Tensor,
    tangents: list[Tensor] | None,
    moving: dict[str, list[Tensor]],
    count: int,
    devices: list[int],
) -> tuple[Tensor, list[Tensor]]:
    """One dual pass per direction."""
    parameters = dict(module.named_parameters())
    results = []
    for j in range(count):
        # Every direction has to see the same input, though the module may write to it, and the same dropout mask; the
        # next module another one.
        last = j == count - 1
        own = x if last else x.clone()
        with torch.random.fork_rng(devices, enabled=not last), forward_ad.dual_level():
            dual = own if tangents is None else forward_ad.make_dual(own, tangents[j])
            duals = {name: forward_ad.make_dual(parameters[name].detach(), v[j]) for name, v in moving.items()}
            y, tangent = forward_ad.unpack_dual(functional_call(module, duals, (dual,)) if duals else module(dual))
            results.append(torch.zeros_like(y) if tangent is None else tangent)
    return y, results


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype.itemsize < 4:
        a, b = a.float(), b.float()
    return torch.dot(a.flatten(), b.flatten())
