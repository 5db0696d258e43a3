"""Embeddings: a row of inputs chooses rows of the weight, so that A is diagonal, or nearly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Gradient
from .base import Inputs, KroneckerBlock, KroneckerLayer, SquareSums, register


class _TableLayer(KroneckerLayer):
    """The weight ``[n, d]`` is the transposed matrix of the block: A has side n, G side d.

    Uses that see no entry (padding, empty bags) are no rows of A or G. The number R of the others is known on the
    device only, so A, which is divided by all rows later, gets the factor all/R here.
    """

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        if module.sparse:
            return "its gradient is sparse (sparse=True)"
        if module.scale_grad_by_freq:
            return "its gradient is rescaled (scale_grad_by_freq=True)"
        return None

    def make_blocks(self) -> Sequence[KroneckerBlock]:
        m = self.module
        return [KroneckerBlock(("weight",), "", m.num_embeddings, m.embedding_dim, a_diagonal=True)]

    def matrices(self, values: Mapping[str, Tensor]) -> Sequence[Gradient]:
        return [values["weight"].t()]

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.module.weight.dtype == torch.float64 else torch.float32


@register
class EmbeddingLayer(_TableLayer):
    """``nn.Embedding``: every index is a row, A holds how often each entry was used."""

    kinds = (nn.Embedding,)

    def _used(self, indices: Tensor) -> Tensor | None:
        padding = self.module.padding_idx
        return None if padding is None else indices != padding

    def input_rows(self, indices: Tensor) -> SquareSums:
        indices = indices.reshape(-1)
        used = self._used(indices)
        ones = torch.ones_like(indices, dtype=self._dtype) if used is None else used.to(self._dtype)
        sums = ones.new_zeros(self.module.num_embeddings).index_add_(0, indices, ones)
        if used is not None:
            sums *= len(ones) / ones.sum().clamp(min=1)
        return SquareSums(sums, len(ones))

    def output_rows(self, gradient: Tensor, indices: Tensor) -> Tensor:
        rows = gradient.reshape(-1, gradient.shape[-1])
        used = self._used(indices.reshape(-1))
        return rows if used is None else torch.where(used.unsqueeze(1), rows, 0)


@register
class EmbeddingBagLayer(_TableLayer):
    """``nn.EmbeddingBag`` with mode "sum" or "mean": every bag is a row.

    The input of a bag is the weight that each entry has in it. A's diagonal is exact; that entries meet in a bag,
    A's part off the diagonal, is left out.
    """

    kinds = (nn.EmbeddingBag,)

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        if module.mode == "max":
            return "the maximum over a bag (mode='max') is not linear in the weight"
        return super().unsupported(module)

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        named = dict(zip(("input", "offsets", "per_sample_weights"), args, strict=False)) | kwargs
        weights = named.get("per_sample_weights")
        return named["input"], named.get("offsets"), None if weights is None else weights.detach()

    def _bags(self, indices: Tensor, offsets: Tensor | None) -> tuple[Tensor, int]:
        """The bag of every index, and the number of bags."""
        if offsets is None:
            count, size = indices.shape
            return torch.arange(count, device=indices.device).repeat_interleave(size), count
        count = len(offsets) - self.module.include_last_offset
        starts = offsets[:count].contiguous()
        positions = torch.arange(len(indices), device=indices.device, dtype=starts.dtype)
        return torch.searchsorted(starts, positions, right=True) - 1, count

    def _weights(self, indices: Tensor, bags: Tensor, count: int, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """The weight of every index in its bag, and how many entries every bag has."""
        padding = self.module.padding_idx
        ones = torch.ones_like(indices, dtype=self._dtype)
        if padding is not None:
            ones = (indices != padding).to(self._dtype)
        sizes = ones.new_zeros(count).index_add_(0, bags, ones)
        if given is not None:
            return ones * given.reshape(-1), sizes
        return (ones / sizes[bags].clamp(min=1) if self.module.mode == "mean" else ones), sizes

    def input_rows(self, indices: Tensor, offsets: Tensor | None, given: Tensor | None) -> SquareSums:
        bags, count = self._bags(indices, offsets)
        indices = indices.reshape(-1)
        weights, sizes = self._weights(indices, bags, count, given)
        # An index that is several times in a bag counts once, with the sum of its weights.
        order = torch.argsort(bags * self.module.num_embeddings + indices)
        indices, bags, weights = indices[order], bags[order], weights[order]
        new = torch.ones_like(indices, dtype=torch.bool)
        new[1:] = (indices[1:] != indices[:-1]) | (bags[1:] != bags[:-1])
        place = new.cumsum(0) - 1
        totals = torch.zeros_like(weights).index_add_(0, place, weights)
        sums = weights.new_zeros(self.module.num_embeddings)
        sums.index_add_(0, indices, torch.where(new, totals[place].square(), 0))
        return SquareSums(sums * (count / (sizes > 0).sum().clamp(min=1)), count)

    def output_rows(self, gradient: Tensor, indices: Tensor, offsets: Tensor | None, given: Tensor | None) -> Tensor:
        bags, count = self._bags(indices, offsets)
        sizes = self._weights(indices.reshape(-1), bags, count, given)[1]
        return torch.where((sizes > 0).unsqueeze(1), gradient, 0)
