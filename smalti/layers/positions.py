"""Position tables, learned and sine-cosine."""

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


def sincos(grid: tuple[int, int], width: int, layout: str = "corrected") -> Tensor:
    """Sine-cosine positions (h, w, width) of a grid: sin and cos of the row, then of the column, at width / 4
    frequencies from 1 down to 1/10000.

    layout: "corrected", or "published": rectangular grids as FlexTok has them, whose table is made column by column and
    then read row by row. The two agree on squares. Raises ValueError when 4 does not divide the width.
    """
    if width % 4:
        raise ValueError(f"width={width} is not a multiple of 4, which sine-cosine positions need")
    if layout not in ("corrected", "published"):
        raise ValueError(f"layout={layout!r} is not known; use 'corrected' or 'published'")
    h, w = grid
    number = torch.arange(h * w, dtype=torch.float32)
    a, b = (number // w, number % w) if layout == "corrected" else (number // h, number % h)
    frequencies = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    angles = [axis[:, None] * frequencies for axis in (a, b)]
    return torch.cat([f(x) for x in angles for f in (torch.sin, torch.cos)], dim=-1).view(h, w, width)


class SinCosPositions(nn.Module):
    """Fixed positions of a grid of patches. Not a part of the weights.

    scaling: "absolute", a smaller grid is the corner of the table; "interpolate", any grid spans the whole table.
    """

    table: Tensor

    def __init__(
        self, grid: tuple[int, int], width: int, *, scaling: str = "absolute", layout: str = "corrected"
    ) -> None:
        super().__init__()
        if scaling not in ("absolute", "interpolate"):
            raise ValueError(f"scaling={scaling!r} is not known; use 'absolute' or 'interpolate'")
        self.scaling = scaling
        self.register_buffer("table", sincos(grid, width, layout), persistent=False)

    def forward(self, *grid: int) -> Tensor:
        """(h, w, width). Raises ValueError for a grid larger than the table, unless it is interpolated."""
        if self.scaling == "interpolate":
            image = rearrange(self.table, "h w d -> 1 d h w").float()
            image = F.interpolate(image, size=grid, mode="bilinear", align_corners=True)
            return rearrange(image, "1 d h w -> h w d").to(self.table.dtype)
        _check_fits(grid, tuple(self.table.shape[:2]))
        return self.table[: grid[0], : grid[1]]


class LearnedPositions(nn.Module):
    """Learned positions of a sequence or a grid, one table (length, width) an axis, cut to what is asked for.

    combine: how the rows of several axes become one position, "sum" or "product".
    """

    def __init__(self, length: int, width: int, *, axes: int = 1, combine: str = "sum", std: float = 0.02) -> None:
        super().__init__()
        if combine not in ("sum", "product"):
            raise ValueError(f"combine={combine!r} is not known; use 'sum' or 'product'")
        self.combine = combine
        self.tables = nn.Parameter(nn.init.trunc_normal_(torch.empty(axes, length, width), std=std, a=-2, b=2))

    def forward(self, *grid: int) -> Tensor:
        """(n, width), or (h, w, width) with two axes. Raises ValueError for a grid larger than the table."""
        axes, length, _ = self.tables.shape
        _check_fits(grid, (length,) * axes)
        positions = self.tables[0, : grid[0]]
        for axis in range(1, axes):
            one, other = positions.unsqueeze(-2), self.tables[axis, : grid[axis]]
            positions = one + other if self.combine == "sum" else one * other
        return positions


def _check_fits(grid: tuple[int, ...], table: tuple[int, ...]) -> None:
    if len(grid) != len(table) or any(side > most for side, most in zip(grid, table, strict=True)):
        raise ValueError(f"positions of {' × '.join(map(str, grid))}: this table has {' × '.join(map(str, table))}")
