"""Oracles: the exact Fisher matrix by automatic differentiation in float64, and helpers to compare with it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from kfac_fast import Preconditioner
from kfac_fast.layers import Layer
from kfac_fast.ops import Gradient


def root_categorical(logits: Tensor) -> Tensor:  # [C] -> [C, C]
    p = logits.softmax(0)
    return torch.diag(p) - torch.outer(p, p)


def root_bernoulli(logits: Tensor) -> Tensor:
    p = logits.sigmoid()
    return torch.diag(p * (1 - p))


def root_gaussian(mean: Tensor) -> Tensor:
    return torch.eye(len(mean), dtype=mean.dtype)


def exact_blocks(model: nn.Module, layer: Layer, x: Tensor, output_fisher: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The layer's blocks of (1/M) Σ Jᵀ F_R J over the loss terms; outputs ``[N, …, C]``, one term per leading index.

    Rows and columns of a block run over its matrix with the bias as last column, row by row: the order of kron(G, A).
    """
    model = copy.deepcopy(model)  # the copy carries no hooks
    everything = dict(model.named_parameters())
    prefix = f"{layer.name}." if layer.name else ""
    own = {name: everything[prefix + name].detach() for name in layer.parameters}

    own = {name: value.requires_grad_() for name, value in own.items()}
    y = functional_call(model, {prefix + name: value for name, value in own.items()}, (x,))
    y = y.reshape(-1, y.shape[-1])
    m, c = y.shape
    rows: list[list[Tensor]] = []  # for every output the flattened blocks of its gradient
    for output in y.flatten():
        found = torch.autograd.grad(output, list(own.values()), retain_graph=True)
        rows.append([_flat(matrix) for matrix in layer.matrices(dict(zip(own, found, strict=True)))])
    blocks = []
    for block in zip(*rows, strict=True):
        j = torch.stack(block).view(m, c, -1)
        blocks.append(sum(jn.T @ output_fisher(yn) @ jn for jn, yn in zip(j, y.detach(), strict=True)) / m)
    return blocks


def _flat(matrix: Gradient) -> Tensor:
    weight, bias = matrix if isinstance(matrix, tuple) else (matrix, None)
    columns = weight.reshape(weight.shape[0], -1)
    return (columns if bias is None else torch.cat([columns, bias[:, None]], 1)).flatten()


def exact_fisher(model: nn.Module, layer: Layer, x: Tensor, output_fisher: Callable[[Tensor], Tensor]) -> Tensor:
    """`exact_blocks` of a layer with one block."""
    (block,) = exact_blocks(model, layer, x, output_fisher)
    return block


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
