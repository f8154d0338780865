"""A user's residual blocks."""

from __future__ import annotations

from torch import nn


class Block(nn.Module):
    def __init__(self, channels, use_skip=True):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.use_skip = use_skip

    def forward(self, x):
        out = self.conv(x)
        return out + x if self.use_skip else out


class Plain(nn.Module):
    def forward(self, x):
        return x * 2
