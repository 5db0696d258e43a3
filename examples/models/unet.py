"""A U-Net (Ronneberger et al. 2015) of two levels, with transposed convolutions on the way up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    """Logits ``[N, classes, H, W]`` from images ``[N, channels, H, W]``; H and W are multiples of 4."""

    def __init__(self, channels: int = 1, classes: int = 2, width: int = 8) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(channels, width, 3, padding=1)
        self.down2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.bottom = nn.Conv2d(2 * width, 4 * width, 3, padding=1)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.merge2 = nn.Conv2d(4 * width, 2 * width, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge1 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(F.max_pool2d(a, 2)))
        c = F.relu(self.bottom(F.max_pool2d(b, 2)))
        b = F.relu(self.merge2(torch.cat([self.up2(c), b], 1)))
        a = F.relu(self.norm(self.merge1(torch.cat([self.up1(b), a], 1))))
        return self.head(a)
