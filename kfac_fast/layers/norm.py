"""Normalisation layers: scale and shift, one 2×2 block per unit.

With x̂ the normalised input, the gradient of one example with respect to the scale and shift of unit j is
(Σ g_j x̂_j, Σ g_j), sums over the example's positions: no Kronecker product, but only two numbers per unit. Their exact
second moments are kept for each unit. A full ``[2d]²`` block would also hold the correlation of units, at d times the
memory and d² times the time of the inverse, for parameters that are a small part of a network.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Inputs, UnitLayer, register


class _NormLayer(UnitLayer):
    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        return "it has no scale and shift" if module.weight is None else None

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        # Batch normalisation depends on the mode, which may change before the backward pass.
        return (*super().inputs(args, kwargs), self.module.training)


@register
class LayerNormLayer(_NormLayer):
    """``nn.LayerNorm`` and ``nn.RMSNorm``: a unit per element of the normalised shape."""

    kinds = (nn.LayerNorm, nn.RMSNorm)

    def normalised(self, inputs: Tensor, training: bool) -> Tensor:
        m = self.module
        if isinstance(m, nn.LayerNorm):
            return F.layer_norm(inputs, m.normalized_shape, None, None, m.eps)
        return F.rms_norm(inputs, m.normalized_shape, None, m.eps)

    def by_unit(self, values: Tensor) -> Tensor:
        lead = values.ndim - len(self.module.normalized_shape)
        return values.reshape(*values.shape[:lead], math.prod(values.shape[lead:]))


class _ChannelNormLayer(_NormLayer):
    def by_unit(self, values: Tensor) -> Tensor:
        return values.sum(tuple(range(2, values.ndim))) if values.ndim > 2 else values


@register
class GroupNormLayer(_ChannelNormLayer):
    """``nn.GroupNorm``: a unit per channel."""

    kinds = (nn.GroupNorm,)

    def normalised(self, inputs: Tensor, training: bool) -> Tensor:
        return F.group_norm(inputs, self.module.num_groups, None, None, self.module.eps)


@register
class BatchNormLayer(_ChannelNormLayer):
    """``nn.BatchNorm1d/2d/3d``: a unit per channel.

    In training x̂ uses the statistics of the batch, as the module does, and an example's gradient is the one at its
    own positions.
    """

    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

    def normalised(self, inputs: Tensor, training: bool) -> Tensor:
        m = self.module
        if training or m.running_mean is None:
            return F.batch_norm(inputs, None, None, training=True, eps=m.eps)
        return F.batch_norm(inputs, m.running_mean, m.running_var, training=False, eps=m.eps)


@register
class InstanceNormLayer(_ChannelNormLayer):
    """``nn.InstanceNorm1d/2d/3d`` with ``affine=True``: a unit per channel."""

    kinds = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

    def normalised(self, inputs: Tensor, training: bool) -> Tensor:
        m = self.module
        x = self._batched(inputs)
        if training or m.running_mean is None:
            return F.instance_norm(x, eps=m.eps).view_as(inputs)
        return F.instance_norm(x, m.running_mean, m.running_var, use_input_stats=False, eps=m.eps).view_as(inputs)

    def by_unit(self, values: Tensor) -> Tensor:
        return super().by_unit(self._batched(values))

    def _batched(self, images: Tensor) -> Tensor:
        return images.unsqueeze(0) if images.ndim == self.module._get_no_batch_dim() else images
