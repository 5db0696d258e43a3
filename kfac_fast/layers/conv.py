"""Convolutions and transposed convolutions (Grosse & Martens 2016): a row per output position."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..ops import ConvRows, Gradient
from .base import Inputs, WeightLayer, register


class _ConvLayer(WeightLayer):
    """Each group of channels is a block of its own."""

    @property
    def groups(self) -> int:
        return self.module.groups

    @property
    def a_size(self) -> int:
        return self.module.in_channels // self.module.groups * math.prod(self.module.kernel_size) + (
            self.bias is not None
        )

    @property
    def g_size(self) -> int:
        return self.module.out_channels // self.module.groups

    def _batched(self, images: Tensor) -> Tensor:
        return images if images.ndim == len(self.module.kernel_size) + 2 else images.unsqueeze(0)

    def output_rows(self, gradient: Tensor, *inputs: Any) -> ConvRows:
        return ConvRows(self._batched(gradient), 1, groups=self.module.groups)


@register
class ConvLayer(_ConvLayer):
    """``nn.Conv1d/2d/3d``: inputs of a row are the patch under the kernel."""

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def input_rows(self, inputs: Tensor, *rest: Any) -> ConvRows:
        m = self.module
        padding = m.padding
        if padding == "valid":
            padding = 0
        elif padding == "same":  # an odd total puts the extra element behind
            total = [d * (k - 1) for d, k in zip(m.dilation, m.kernel_size, strict=True)]
            padding = [(t // 2, t - t // 2) for t in total]
        return ConvRows(self._batched(inputs), m.kernel_size, m.stride, padding, m.dilation, m.groups, m.padding_mode)


@register
class ConvTransposeLayer(_ConvLayer):
    """``nn.ConvTranspose1d/2d/3d``: inputs of a row are what the kernel spreads onto that output position.

    A transposed convolution is a convolution, with the kernel reversed, of the input with ``stride − 1`` zeros between
    its elements. The image is reversed instead of the kernel, so that columns keep the order of ``weight``: second
    moments do not depend on the order of rows.
    """

    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        named = dict(zip(("input", "output_size"), args, strict=False)) | kwargs
        m = self.module
        dims = len(m.kernel_size)
        extra = m._output_padding(
            named["input"], named.get("output_size"), m.stride, m.padding, m.kernel_size, dims, m.dilation
        )
        return named["input"].detach(), tuple(extra)

    def input_rows(self, inputs: Tensor, extra: tuple[int, ...]) -> ConvRows:
        m = self.module
        dims = range(len(m.kernel_size))
        x = self._batched(inputs).flip([i + 2 for i in dims])
        if max(m.stride) > 1:
            sides = [(x.shape[i + 2] - 1) * m.stride[i] + 1 for i in dims]
            spread = x.new_zeros(*x.shape[:2], *sides)
            every: list[Any] = [slice(None), slice(None), *(slice(None, None, s) for s in m.stride)]
            spread[tuple(every)] = x
            x = spread
        margins = [m.dilation[i] * (m.kernel_size[i] - 1) - m.padding[i] for i in dims]
        # Reversed, the extra outputs come first. A negative margin cuts inputs that no output sees.
        padding = [(margin + e, margin) for margin, e in zip(margins, extra, strict=True)]
        for i, (before, after) in enumerate(padding):
            if before < 0 or after < 0:
                start, stop = max(-before, 0), x.shape[i + 2] - max(-after, 0)
                x = x.narrow(i + 2, start, stop - start)
        pairs = [(max(before, 0), max(after, 0)) for before, after in padding]
        return ConvRows(x, m.kernel_size, 1, pairs, m.dilation, m.groups)

    def matrices(self, values: Mapping[str, Tensor]) -> Sequence[Gradient]:
        # [C_in, C_out/groups, *kernel]
        weights = [w.transpose(0, 1) for w in values["weight"].chunk(self.groups)]
        bias = values.get("bias")
        return list(weights) if bias is None else list(zip(weights, bias.chunk(self.groups), strict=True))
