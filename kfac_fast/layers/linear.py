"""Modules whose output is a matrix times the input, at every position."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import Inputs, WeightLayer, register


@register
class LinearLayer(WeightLayer):
    """``nn.Linear``. With inputs ``[N, …, d]`` every position is a row (Eschenhagen et al. 2023, "expand")."""

    kinds = (nn.Linear,)

    @property
    def a_size(self) -> int:
        return self.module.in_features + (self.bias is not None)

    @property
    def g_size(self) -> int:
        return self.module.out_features


class PooledLinearLayer(LinearLayer):
    """``nn.Linear`` on ``[N, …, d]`` with a row per example: the mean of a and the sum of g over its positions.

    Eschenhagen et al. 2023 call it "reduce". It has fewer rows, and is exact where a linear network averages over the
    positions; for a loss per position `LinearLayer` is. Chosen by name: ``Blocks(classes={"blocks.*":
    PooledLinearLayer})``.
    """

    def input_rows(self, inputs: Tensor, *rest: Any) -> Tensor:
        return _by_position(inputs).mean(1)

    def output_rows(self, gradient: Tensor, *inputs: Any) -> Tensor:
        return _by_position(gradient).sum(1)


def _by_position(x: Tensor) -> Tensor:
    """``[N, …, d]`` as ``[N, S, d]``."""
    return x.flatten(1, -2) if x.ndim > 2 else x.reshape(-1, 1, x.shape[-1])


@register
class BilinearLayer(WeightLayer):
    """``nn.Bilinear``: linear in the outer product of its two inputs, whose entries are the inputs of the block."""

    kinds = (nn.Bilinear,)

    @property
    def a_size(self) -> int:
        return self.module.in1_features * self.module.in2_features + (self.bias is not None)

    @property
    def g_size(self) -> int:
        return self.module.out_features

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        named = dict(zip(("input1", "input2"), args, strict=False)) | kwargs
        return named["input1"].detach(), named["input2"].detach()

    def input_rows(self, first: Tensor, second: Tensor) -> Tensor:
        return (first.unsqueeze(-1) * second.unsqueeze(-2)).reshape(-1, first.shape[-1] * second.shape[-1])
