"""`ConvRows`: the patches of a convolution's input, as rows that are never materialised."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")  # index = PaddingMode in csrc/ops.h


class ConvRows:
    """Stands for the patches that a convolution's weights see, one row per image and output position.

    Row ``(n, p)`` is the receptive field of output position ``p`` in image ``n``; its columns run over (channel,
    kernel offset), the order of ``weight.view(C_out, -1)`` (Grosse & Martens 2016, sec. 3.1). With ``groups`` > 1 it
    stands for that many consecutive blocks, one per group of channels.

    With ``kernel = 1`` it gives the rows of a channels-first tensor, for instance of a convolution's output
    gradient, without a transposed copy.

    Args:
        x: ``[N, C, *spatial]`` with one to three spatial dimensions, any strides.
        kernel: Kernel size, a number or one per dimension; so are ``stride`` and ``dilation``.
        stride: Step between output positions.
        padding: A number, one per dimension, or a ``(before, after)`` pair per dimension.
        dilation: Step between the elements of a patch.
        groups: Divides ``C``.
        padding_mode: "zeros", "reflect", "replicate" or "circular", as in ``torch.nn.Conv2d``.

    Raises:
        ValueError: A geometry that no convolution has; the message names the argument.
    """

    __slots__ = ("dilation", "groups", "kernel", "out", "padding", "padding_mode", "stride", "x")

    def __init__(
        self,
        x: Tensor,
        kernel: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | Sequence[tuple[int, int]] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
    ) -> None:
        dims = x.ndim - 2
        if not 1 <= dims <= 3:
            raise ValueError(f"x must be [N, C, *spatial] with 1 to 3 spatial dimensions, got shape {tuple(x.shape)}")
        self.x = x
        self.kernel = _per_dimension("kernel", kernel, dims, minimum=1)
        self.stride = _per_dimension("stride", stride, dims, minimum=1)
        self.dilation = _per_dimension("dilation", dilation, dims, minimum=1)
        self.padding = _padding_pairs(padding, dims)
        if groups < 1 or x.shape[1] % groups:
            raise ValueError(f"groups must divide the {x.shape[1]} channels of x, got groups={groups}")
        self.groups = groups
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {PADDING_MODES}, got {padding_mode!r}")
        self.padding_mode = padding_mode
        for size, (before, after) in zip(x.shape[2:], self.padding, strict=True):
            widest = {"zeros": math.inf, "replicate": math.inf, "reflect": size - 1, "circular": size}[padding_mode]
            if max(before, after) > widest or (padding_mode == "replicate" and size == 0):
                raise ValueError(f"padding {(before, after)} is too wide for {padding_mode!r} on a side of {size}")
        self.out = tuple(
            (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
            for size, (before, after), kernel, stride, dilation in zip(
                x.shape[2:], self.padding, self.kernel, self.stride, self.dilation, strict=True
            )
        )
        if min(self.out) < 1:
            raise ValueError(f"kernel {self.kernel} does not fit x of shape {tuple(x.shape)} with this padding")

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, d)``: rows, and columns of one group's block without a bias column."""
        return self.x.shape[0] * math.prod(self.out), self.x.shape[1] // self.groups * math.prod(self.kernel)

    def patches(self, group: int = 0) -> Tensor:
        """The rows ``[m, d]`` of one group, materialised. The native kernels never do this."""
        channels = self.x.shape[1] // self.groups
        x = self.x.narrow(1, group * channels, channels)
        if any(side for pair in self.padding for side in pair):
            flat = [side for pair in reversed(self.padding) for side in pair]
            x = F.pad(x, flat, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        dims = len(self.kernel)
        for dim in range(dims):
            span = self.dilation[dim] * (self.kernel[dim] - 1) + 1
            x = x.unfold(dim + 2, span, self.stride[dim])[..., :: self.dilation[dim]]
        # [N, C, *out, *kernel] -> [N, *out, C, *kernel]
        order = (0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
        return x.permute(order).reshape(self.shape)

    def __repr__(self) -> str:
        return (
            f"ConvRows(x={tuple(self.x.shape)}, kernel={self.kernel}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}, padding_mode={self.padding_mode!r})"
        )


def _per_dimension(name: str, value: int | Sequence[int], dims: int, minimum: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims or any(not isinstance(v, int) or v < minimum for v in values):
        raise ValueError(f"{name} must be an integer >= {minimum} or {dims} of them, got {value!r}")
    return values


def _padding_pairs(padding: int | Sequence[int] | Sequence[tuple[int, int]], dims: int) -> tuple[tuple[int, int], ...]:
    values = (padding,) * dims if isinstance(padding, int) else tuple(padding)
    pairs = tuple((p, p) if isinstance(p, int) else tuple(p) for p in values)  # type: ignore[arg-type]
    if len(pairs) != dims or any(len(p) != 2 or min(p) < 0 for p in pairs):
        raise ValueError(f"padding must be >= 0: a number, {dims} numbers or {dims} pairs, got {padding!r}")
    return pairs  # type: ignore[return-value]
