"""MLP-Mixer (Tolstikhin et al. 2021): linear layers over patches and over channels in turn."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class MixerBlock(nn.Module):
    """Mixes the patches, then the channels, of ``[N, patches, width]``."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.patches1, self.patches2 = nn.Linear(patches, 2 * patches), nn.Linear(2 * patches, patches)
        self.channels1, self.channels2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patches2(F.gelu(self.patches1(self.norm1(x).transpose(1, 2)))).transpose(1, 2)
        return x + self.channels2(F.gelu(self.channels1(self.norm2(x))))


class Mixer(nn.Module):
    """Logits ``[N, classes]`` from images ``[N, channels, side, side]``."""

    def __init__(
        self, channels: int = 1, side: int = 8, patch: int = 2, classes: int = 10, width: int = 32, depth: int = 2
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.blocks = nn.Sequential(*(MixerBlock((side // patch) ** 2, width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(h)).mean(1))
