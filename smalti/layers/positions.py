"""Learned position tables."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def table(rows: int, width: int, std: float) -> nn.Parameter:
    """A learned table (rows, width), normal with the given standard deviation."""
    return nn.Parameter(std * torch.randn(rows, width))


def resize_grid(positions: Tensor, grid: int, *, leading: int = 0) -> Tensor:
    """A table of a square grid, resized to grid × grid by bicubic interpolation (antialiased when it shrinks).

    positions: (leading + g², d), row-major after `leading` rows that are kept (a class position).
    """
    kept, old = positions[:leading], positions[leading:]
    side = round(len(old) ** 0.5)
    if side * side != len(old):
        raise ValueError(f"{len(old)} positions do not form a square grid")
    if side == grid:
        return positions
    image = rearrange(old, "(h w) d -> 1 d h w", h=side).float()
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", antialias=grid < side, align_corners=False)
    return torch.cat([kept, rearrange(image, "1 d h w -> (h w) d").to(old.dtype)])
