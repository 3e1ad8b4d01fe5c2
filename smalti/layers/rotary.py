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

    def table(self, device: torch.device) -> Tensor:
        """cos + i sin of every place and pair, (leading + n, width / 2) complex64."""
        return (_make if torch.compiler.is_compiling() else _made)(self, device)


def _make(rotary: Rotary, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a table made while sampling serves training later
        part = rotary.width // len(rotary.grid)
        frequencies = 1.0 / rotary.base ** (torch.arange(0, part, 2, dtype=torch.float32) / part)
        axes = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in rotary.grid), indexing="ij")
        angles = torch.cat([axis.flatten()[:, None] * frequencies for axis in axes], dim=-1)
        lead = torch.full((rotary.leading, rotary.width // 2), float(rotary.condition == "identity"))
        turns = torch.complex(torch.cat([lead, angles.cos()]), torch.cat([torch.zeros_like(lead), angles.sin()]))
        return turns.to(device)


# Not a buffer: a model in bfloat16 still needs float32 angles.
_made = lru_cache(maxsize=16)(_make)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs of x (b, m, heads, width), in float32; turns: rows (m, width / 2) of `table`.

    As complex numbers, in one product: a fifth of the time of sines and cosines apart (8 × 1 × 24 × 64, one thread).
    Compilers, which do not know complex numbers, are given those.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), torch.view_as_real(turns)[:, None].unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
    return torch.view_as_real(torch.view_as_complex(pairs) * turns[:, None]).flatten(-2).to(x.dtype)
