"""A character-level language model of ``nn.LSTM``."""

from __future__ import annotations

from torch import Tensor, nn


class CharLSTM(nn.Module):
    """Logits ``[N, T, vocabulary]`` of the next character, from characters ``[N, T]``."""

    def __init__(self, vocabulary: int, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, depth, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(text))[0])
