"""Oracles: the exact Fisher matrix by automatic differentiation in float64, and helpers to compare with it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from kfac_fast import Preconditioner
from kfac_fast.layers import Layer


def root_categorical(logits: Tensor) -> Tensor:  # [C] -> [C, C]
    p = logits.softmax(0)
    return torch.diag(p) - torch.outer(p, p)


def root_bernoulli(logits: Tensor) -> Tensor:
    p = logits.sigmoid()
    return torch.diag(p * (1 - p))


def root_gaussian(mean: Tensor) -> Tensor:
    return torch.eye(len(mean), dtype=mean.dtype)


def exact_fisher(model: nn.Module, layer: Layer, x: Tensor, output_fisher: Callable[[Tensor], Tensor]) -> Tensor:
    """The layer's block of (1/M) Σ Jᵀ F_R J over the loss terms; outputs ``[N, …, C]``, one term per leading index.

    Rows and columns run over W with the bias as last column, row by row: the order of kron(G, A).
    """
    model = copy.deepcopy(model)  # the copy carries no hooks
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    prefix = f"{layer.name}." if layer.name else ""
    own = {key: parameters[prefix + key] for key in ("weight", "bias") if prefix + key in parameters}

    def outputs(changed: dict[str, Tensor]) -> Tensor:
        y = functional_call(model, {**parameters, **{prefix + key: value for key, value in changed.items()}}, (x,))
        return y.reshape(-1, y.shape[-1])

    jacobian = jacrev(outputs)(own)
    d_out = own["weight"].shape[0]
    columns = [jacobian["weight"].flatten(3)]
    if "bias" in own:
        columns.append(jacobian["bias"].unsqueeze(-1))
    j = torch.cat(columns, -1)  # [M, C, d_out, d_in (+1)]
    assert j.shape[2] == d_out
    j = j.flatten(2)
    y = outputs(own)
    return sum(jn.T @ output_fisher(yn) @ jn for jn, yn in zip(j, y, strict=True)) / len(y)


def full_fisher(model: nn.Module, x: Tensor, output_fisher: Callable[[Tensor], Tensor]) -> Tensor:
    """The whole (1/M) Σ Jᵀ F_R J; every module's weight with its bias as last column, row by row."""
    model = copy.deepcopy(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = jacrev(lambda changed: functional_call(model, changed, (x,)))(parameters)
    columns: list[Tensor] = []
    for j in jacobian.values():
        if j.ndim == 3:  # a bias
            columns[-1] = torch.cat([columns[-1], j.unsqueeze(-1)], -1)
        else:
            columns.append(j.flatten(3))
    j = torch.cat([c.flatten(2) for c in columns], 2)
    y = model(x)
    return sum(jn.T @ output_fisher(yn) @ jn for jn, yn in zip(j, y, strict=True)) / len(y)


def kronecker_block(preconditioner: Preconditioner, layer: int, group: int = 0) -> Tensor:
    """G ⊗ A of the running factors, in the order of `exact_fisher`."""
    factors = preconditioner.factors
    block = factors.first_block[layer] + group
    return torch.kron(factors.running[factors.count + block], factors.running[block])


def gather(preconditioner: Preconditioner, model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """One forward and backward pass and a commit of the statistics."""
    model.zero_grad()
    loss(model(x)).backward()
    preconditioner.step()
