"""Pre-norm transformer blocks whose norms have no weights of their own, plain or modulated by a condition (adaLN-zero).

Attention with normalised queries and keys (Dehghani et al. 2023, arXiv:2302.05442), SwiGLU (Shazeer 2020,
arXiv:2002.05202), modulation as in DiT (Peebles and Xie 2022, arXiv:2212.09748) but by groups of tokens, as in FlexTok.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from smalti.layers.attention import attend
from smalti.layers.mlp import FeedForward


def layer_norm(x: Tensor) -> Tensor:
    """Zero mean and unit variance over the last dimension, computed in float32."""
    return F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """x · (1 + scale) + shift, with one shift and one scale for each group of tokens.

    x: (b, n, d). shift, scale: (b or 1, e, d). sizes: tokens of each of the e groups, in the order of the sequence.
    """
    parts = zip(_groups(x, sizes), _vectors(shift, sizes), _vectors(1 + scale, sizes), strict=True)
    return _joined([torch.addcmul(shift, part, scale) for part, shift, scale in parts])


def add_gated(x: Tensor, gate: Tensor, y: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """x + gate · y, with one gate (b or 1, e, d) for each group of tokens of x and y (b, n, d)."""
    parts = zip(_groups(x, sizes), _vectors(gate, sizes), _groups(y, sizes), strict=True)
    return _joined([torch.addcmul(x, gate, y) for x, gate, y in parts])


def _groups(x: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Groups of equal size as one tensor (b, e, n / e, d), which needs no copy afterwards; else one tensor each."""
    if len(set(sizes)) == 1:
        return [x.unflatten(1, (len(sizes), sizes[0]))]
    return list(x.split(sizes, dim=1))


def _vectors(x: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """(b, e, d) to be broadcast over what `_groups` gives."""
    return [x[:, :, None]] if len(set(sizes)) == 1 else list(x.split(1, dim=1))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0].flatten(1, 2) if len(parts) == 1 else torch.cat(parts, dim=1)


class Attention(nn.Module):
    """Multi-head self-attention; each head's queries and keys are normalised, its scale is 8 / head width.

    The scale is 1/√width at the usual head width of 64 only, as muP wants it (Yang et al. 2022, arXiv:2203.03466).
    """

    def __init__(
        self, width: int, heads: int, *, qk_norm: bool = True, qkv_bias: bool = False, proj_bias: bool = False
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        self.heads, self.qk_norm, self.scale = heads, qk_norm, 8 * heads / width
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.out = nn.Linear(width, width, bias=proj_bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, keep: slice | None = None) -> Tensor:
        """x: (b, n, d), returns (b, n, d), or only the tokens in `keep`, which still attend to all that they may.

        mask: (n, n) or (b, 1, 1 or n, n) bool, true where a row may attend to a column; None: everywhere.
        """
        d = x.shape[-1]
        if keep is None:
            q, k, v = self._heads(self.qkv(x), 3)
        else:
            weights = self.qkv.weight.split((d, 2 * d))
            biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split((d, 2 * d))
            (q,) = self._heads(F.linear(x[:, keep], weights[0], biases[0]), 1)
            k, v = self._heads(F.linear(x, weights[1], biases[1]), 2)
            if mask is not None and mask.shape[-2] > 1:
                mask = mask[..., keep, :]
        if self.qk_norm:
            q, k = layer_norm(q), layer_norm(k)
        return self.out(attend(q, k, v, attn_mask=mask, scale=self.scale))

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(b, n, parts·d) as `parts` views (b, heads, n, d / heads)."""
        return rearrange(x, "b n (parts heads d) -> parts b heads n d", parts=parts, heads=self.heads).unbind(0)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)). x: (b, n, width)."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        gated_mlp: bool = True,
        mlp_ratio: float = 4.0,
        mlp_bias: bool = False,
        qk_norm: bool = True,
        qkv_bias: bool = False,
        proj_bias: bool = False,
    ) -> None:
        super().__init__()
        self.attn = Attention(width, heads, qk_norm=qk_norm, qkv_bias=qkv_bias, proj_bias=proj_bias)
        self.mlp = FeedForward(width, gated=gated_mlp, ratio=mlp_ratio, bias=mlp_bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, keep: slice | None = None) -> Tensor:
        """With `keep`, only those tokens come out."""
        x = (x if keep is None else x[:, keep]) + self.attn(layer_norm(x), mask, keep)
        return x + self.mlp(layer_norm(x))


class ModulatedBlock(Block):
    """A block whose two halves are shifted, scaled and gated by a condition, each group of tokens in its own way."""

    def __init__(self, width: int, heads: int, groups: int, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.groups = groups
        self.modulation = nn.Linear(width, groups * 6 * width)

    @torch.no_grad()
    def open_gates_(self, value: float) -> None:
        """Set both gates of every group, whatever the condition: at 0 (adaLN-zero) a block begins as the identity."""
        self.modulation.bias.view(self.groups, 6, -1)[:, :2] = value

    def forward(  # type: ignore[override]
        self, x: Tensor, condition: Tensor, sizes: tuple[int, ...], mask: Tensor | None = None, keep: int | None = None
    ) -> Tensor:
        """condition: (b or 1, width), activated already. sizes: tokens of each group. mask: as in `Attention`.

        keep: how many of the first group's tokens come out, and nothing else; None: all tokens.
        """
        parts = rearrange(self.modulation(condition), "b (e six d) -> six b e d", e=self.groups, six=6)
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = parts.unbind(0)
        attended = self.attn(
            modulate(layer_norm(x), shift_attn, scale_attn, sizes), mask, None if keep is None else slice(keep)
        )
        if keep is not None:
            x, sizes = x[:, :keep], (keep,)
            gate_attn, gate_mlp, shift_mlp, scale_mlp = (
                vector[:, :1] for vector in (gate_attn, gate_mlp, shift_mlp, scale_mlp)
            )
        x = add_gated(x, gate_attn, attended, sizes)
        return add_gated(x, gate_mlp, self.mlp(modulate(layer_norm(x), shift_mlp, scale_mlp, sizes)), sizes)
