"""Noise levels as vectors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(t: Tensor, size: int, max_timestep: float = 1000.0, max_period: float = 256.0) -> Tensor:
    """cos then sin of t · f_i, (b, size) float32, with f_i = (1000 / max_timestep) · max_period^(−i / half).

    t: (b,) in 0…max_timestep. An odd size ends in a zero.
    """
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * (1000.0 / max_timestep) * torch.exp(-math.log(max_period) * steps)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, size % 2))


class TimestepEmbedding(nn.Module):
    """A noise level t in 0…max_timestep as a vector: sinusoid, Linear, SiLU, Linear.

    frequencies: numbers of the sinusoid; max_period: as of `sinusoid`. FlexTok gives levels in [0, 1] and a
    max_timestep of 1000, which keeps every angle within 1 radian; with 1 they reach 1000.
    """

    def __init__(
        self, width: int, frequencies: int = 256, max_timestep: float = 1000.0, max_period: float = 256.0
    ) -> None:
        super().__init__()
        self.frequencies, self.max_timestep, self.max_period = frequencies, max_timestep, max_period
        self.fc = nn.Linear(frequencies, width)
        self.proj = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """t: (b,). Returns (b, width)."""
        angles = sinusoid(t, self.frequencies, self.max_timestep, self.max_period)
        return self.proj(F.silu(self.fc(angles.to(self.fc.weight.dtype))))
