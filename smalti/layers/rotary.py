"""Rotary positions (Su et al. 2021, arXiv:2104.09864) of a sequence or a raster grid, behind condition tokens.

Elements 2j and 2j + 1 of a head are a pair, turned by its position times frequency j. On a grid the first half of the
pairs turns by the row and the second half by the column.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

CONDITIONS = ("identity", "zero")


@dataclass(frozen=True)
class Rotary:
    """width: of a head. grid: (n,), or (h, w) in raster order. leading: condition tokens before them.

    condition: what happens to queries and keys of those: nothing ("identity"), or they become zero ("zero"). The latter
    is LlamaGen's, whose weights depend on it: whatever a token asks, it looks at all condition tokens alike.
    """

    width: int
    grid: tuple[int, ...]
    leading: int = 0
    condition: str = "identity"
    base: float = 10000.0

    def __post_init__(self) -> None:
        if self.condition not in CONDITIONS:
            raise ValueError(f"condition_rope={self.condition!r} is not known; use one of {', '.join(CONDITIONS)}")
        if self.width % (2 * len(self.grid)):
            raise ValueError(
                f"{self.width} channels a head are not a multiple of {2 * len(self.grid)}, which rotary positions need"
            )

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin (leading + n, width) float32, each pair's twice, the first sin of a pair negated."""
        return (_make if torch.compiler.is_compiling() else _made)(self, device)


def _make(rotary: Rotary, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # tables made while sampling serve training later
        part = rotary.width // len(rotary.grid)
        frequencies = 1.0 / rotary.base ** (torch.arange(0, part, 2, dtype=torch.float32) / part)
        axes = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in rotary.grid), indexing="ij")
        angles = torch.cat([axis.flatten()[:, None] * frequencies for axis in axes], dim=-1)
        cos, sin = (torch.stack(pair, -1).flatten(-2) for pair in ((angles.cos(),) * 2, (-angles.sin(), angles.sin())))
        lead = torch.zeros(rotary.leading, rotary.width)
        kept = lead if rotary.condition == "zero" else lead + 1
        return torch.cat([kept, cos]).to(device), torch.cat([lead, sin]).to(device)


# Not a buffer: a model in bfloat16 still needs float32 angles.
_made = lru_cache(maxsize=16)(_make)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of x (b, m, heads, width), in float32; cos, sin: rows (m, width) of `tables`."""
    pairs = x.float()
    swapped = pairs.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(pairs * cos[:, None], swapped, sin[:, None]).to(x.dtype)
