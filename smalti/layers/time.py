"""A noise level or a timestep as a vector."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimestepEmbedding(nn.Module):
    """t (b,) as (b, width): [cos(t f), sin(t f)], Linear, SiLU, Linear; f falls from 1000 / max_timestep by 256.

    max_timestep: the largest t. 1000 with t in [0, 1], as FlexTok has it, keeps the angles within one radian.
    size: of the sinusoids; an odd one ends in a zero. As in FlexTok: cosines first, and a longest period of 256 instead
    of the usual 10,000.
    """

    def __init__(self, width: int, size: int = 256, max_timestep: float = 1000.0) -> None:
        super().__init__()
        self.size, self.max_timestep = size, max_timestep
        self.fc = nn.Linear(size, width)
        self.proj = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        return self.proj(F.silu(self.fc(self.sinusoid(t).to(self.fc.weight.dtype))))

    def sinusoid(self, t: Tensor) -> Tensor:
        """(b, size) float32, in [−1, 1]."""
        half = self.size // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * (1000.0 / self.max_timestep * torch.exp(-math.log(256) * exponents))
        return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, self.size - 2 * half))
