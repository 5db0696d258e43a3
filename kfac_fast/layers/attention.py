"""``nn.MultiheadAttention``: the projections of query, key and value, and of the output, as blocks of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import Gradient
from .base import KroneckerBlock, KroneckerLayer, Note, register

_PARTS = ("q", "k", "v")
_EXTRA = ("bias_k", "bias_v")
_ARGUMENTS = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")


@register
class AttentionLayer(KroneckerLayer):
    """``nn.MultiheadAttention``, packed or separate projections; rows are positions.

    ``bias_k`` and ``bias_v``, the extra key and value of every example, are blocks with a single, constant input. The
    module uses its output projection without calling it.
    """

    kinds = (nn.MultiheadAttention,)
    needs_own_pass = True

    @property
    def _packed(self) -> bool:
        return self.module.in_proj_weight is not None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p is not None}

    def make_blocks(self) -> Sequence[KroneckerBlock]:
        m = self.module
        bias = m.in_proj_bias is not None
        blocks = []
        for part, size in zip(_PARTS, (m.embed_dim, m.kdim, m.vdim), strict=True):
            names: tuple[str, ...] = ("in_proj_weight",) if self._packed else (f"{part}_proj_weight",)
            names += ("in_proj_bias",) if bias else ()
            blocks.append(KroneckerBlock(names, part, size + bias, m.embed_dim, bias))
        if m.bias_k is not None:
            blocks += [KroneckerBlock((name,), name, 1, m.embed_dim) for name in _EXTRA]
        bias = m.out_proj.bias is not None
        names = ("out_proj.weight", "out_proj.bias") if bias else ("out_proj.weight",)
        return [*blocks, KroneckerBlock(names, "out", m.embed_dim + bias, m.embed_dim, bias)]

    def matrices(self, values: Mapping[str, Tensor]) -> Sequence[Gradient]:
        if self._packed:
            weights = list(values["in_proj_weight"].chunk(3))
        else:
            weights = [values[f"{part}_proj_weight"] for part in _PARTS]
        result: list[Gradient] = list(weights)
        if "in_proj_bias" in values:
            result = list(zip(weights, values["in_proj_bias"].chunk(3), strict=True))
        result += [values[name].view(-1, 1) for name in _EXTRA if name in values]
        bias = values.get("out_proj.bias")
        return [*result, values["out_proj.weight"] if bias is None else (values["out_proj.weight"], bias)]

    def forward_in_parts(self, note: Note) -> Callable[..., Any]:
        m = self.module
        attend = _without_projections(m)

        def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
            named = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
            projected = []
            for block, (x, matrix) in enumerate(zip((query, key, value), self.matrices(self.parameters), strict=False)):
                y = F.linear(x, *matrix) if isinstance(matrix, tuple) else F.linear(x, matrix)
                note(block, x, y)
                projected.append(y)
            if m.bias_k is not None:
                self._append_extra(projected, named, note)
            heads, weights = attend(*projected, **named)
            y = F.linear(heads, m.out_proj.weight, m.out_proj.bias)
            note(len(self.blocks) - 1, heads, y)
            return y, weights

        return forward

    def _append_extra(self, projected: list[Tensor], named: dict[str, Any], note: Note) -> None:
        """Appends ``bias_k`` and ``bias_v`` to the sequences of keys and values, and makes the masks wide enough."""
        for i, name in enumerate(_EXTRA, start=1):
            x = projected[i]
            dim = 1 if self.module.batch_first and x.ndim == 3 else 0  # of the positions
            shape = (*x.shape[:dim], 1, *x.shape[dim + 1 :])
            extra = getattr(self.module, name).view(-1).expand(shape)
            note(2 + i, extra.new_ones(*shape[:-1], 1), extra)
            projected[i] = torch.cat([x, extra], dim)
        for name in ("key_padding_mask", "attn_mask"):
            if named.get(name) is not None:
                named[name] = F.pad(named[name], (0, 1))


def _without_projections(m: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """The same attention with identities as projections, so that masks and dropout remain torch's own."""
    weight = m.out_proj.weight
    plain = nn.MultiheadAttention(
        m.embed_dim, m.num_heads, m.dropout, bias=False, add_zero_attn=m.add_zero_attn, batch_first=m.batch_first,
        device="meta",
    )  # fmt: skip
    eye = torch.eye(m.embed_dim, dtype=weight.dtype, device=weight.device)
    plain.in_proj_weight = nn.Parameter(eye.repeat(3, 1), requires_grad=False)
    plain.out_proj.weight = nn.Parameter(eye, requires_grad=False)
    return plain.train(m.training)
