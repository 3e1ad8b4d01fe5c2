"""Images, or grids of latents, as patches and back."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def patchify(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """(b, c, h, w) as patches (b, h', w', d), d = row in the patch, then column, then channel.

    Raises ValueError for a side that the patch does not divide.
    """
    if x.shape[2] % patch[0] or x.shape[3] % patch[1]:
        raise ValueError(f"a grid of {x.shape[2]} × {x.shape[3]} is not made of patches of {patch[0]} × {patch[1]}")
    return rearrange(x, "b c (h p1) (w p2) -> b h w (p1 p2 c)", p1=patch[0], p2=patch[1])


def unpatchify(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: (b, h', w', d) as (b, c, h, w)."""
    return rearrange(x, "b h w (p1 p2 c) -> b c (h p1) (w p2)", p1=patch[0], p2=patch[1])
