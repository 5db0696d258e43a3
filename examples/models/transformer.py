"""A character-level language model of ``nn.TransformerEncoderLayer``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CharTransformer(nn.Module):
    """Logits ``[N, T, vocabulary]`` of the next character, from characters ``[N, T]``."""

    def __init__(self, vocabulary: int, context: int, width: int = 64, heads: int = 4, depth: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        h = self.tokens(text) + self.positions(torch.arange(length, device=text.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=text.device)
        for layer in self.layers:
            h = layer(h, src_mask=mask, is_causal=True)
        return self.head(self.norm(h))
