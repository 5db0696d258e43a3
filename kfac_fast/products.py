"""Products with the exact Fisher matrix through the network: vᵀ F w = (1/M) Σ (J v)ᵀ F_R (J w) (sec. 6.4, App. C)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from .likelihoods import Likelihood
from .passes import ModelInputs, unnoticed


def fisher_quadratic_forms(
    model: nn.Module,
    likelihood: Likelihood,
    find_outputs: Callable[[Any], Tensor],
    inputs: ModelInputs,
    counted: Tensor,
    directions: Sequence[dict[str, Tensor]],
) -> Tensor:
    """vᵢᵀ F vⱼ for all pairs of directions, by one forward-mode derivative each and no backward pass.

    Args:
        model: The network; its buffers and the random generators are left as they are.
        likelihood: Gives F_R, the Fisher of the outputs.
        find_outputs: From what the model returns to its output tensor.
        inputs: The examples to average over.
        counted: Which loss terms count, in the shape of the likelihood's terms.
        directions: Tangents by parameter name; all name the same parameters.

    Returns:
        ``[k, k]`` float64 for k directions, divided by the number of loss terms, on the CPU.

    Raises:
        RuntimeError: A layer has no forward-mode derivative; torch names it.
    """
    names = list(directions[0])
    parameters = dict(model.named_parameters())
    tangents: list[Tensor] = []
    with torch.no_grad():
        for direction in directions:
            # `unnoticed` also gives every direction the same dropout mask.
            with unnoticed(model), forward_ad.dual_level():
                duals = {name: forward_ad.make_dual(parameters[name].detach(), direction[name]) for name in names}
                result = find_outputs(functional_call(model, duals, inputs.args, inputs.kwargs))
                z, tangent = forward_ad.unpack_dual(result)
                tangents.append(torch.zeros_like(z) if tangent is None else tangent)
        mask = likelihood.spread(counted)
        forms = torch.empty(len(directions), len(directions), dtype=torch.float64)
        for j in range(len(directions)):
            product = torch.where(mask, likelihood.fisher_product(z, tangents[j]), 0.0)
            for i in range(j + 1):
                forms[i, j] = forms[j, i] = (tangents[i] * product).sum(dtype=torch.float64)
    return forms / counted.sum().clamp(min=1).double().cpu()
