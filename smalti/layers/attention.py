"""Attention on torch's fused kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.layers.cache import KVCache
from smalti.layers.rotary import rotate


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Heads (b, heads, m, d / heads) that attend to k and v, joined to (b, m, d).

    options: of torch's scaled_dot_product_attention. On CPUs its bfloat16 kernel takes 3 times as long backward as its
    float32 one (b 64, n 128, 4 heads), which is taken instead.
    """
    dtype = v.dtype
    if v.device.type == "cpu" and dtype == torch.bfloat16:
        q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(q, k, v, **options).to(dtype).transpose(1, 2).flatten(2)


def take(x: Tensor, keep: slice | Tensor) -> Tensor:
    """Tokens of x (b, n, d): a slice of them, the same in each sample, or those at places (b, m)."""
    return x[:, keep] if isinstance(keep, slice) else x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))


class SelfAttention(nn.Module):
    """Multi-head self-attention over all tokens, or over those that a mask leaves: biases everywhere.

    The projections start as torch's own `nn.MultiheadAttention` starts them: queries, keys and values xavier-uniform
    as one (3·width, width) matrix, biases zero, the output as any Linear. dropout: of attention's probabilities.
    """

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, keep: slice | Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x: (b, n, d), returns (b, n, d), or only the tokens in `keep` (see `take`), which still attend to all.

        mask: (b, n) bool, true for the tokens that may be attended to, at least one of each sample; None: all.
        """
        d = x.shape[-1]
        if keep is None:
            # Views of one buffer, never copied: backward keeps the qkv output once.
            q, k, v = self._heads(self.qkv(x), 3)
        else:
            weights, biases = self.qkv.weight.split((d, 2 * d)), self.qkv.bias.split((d, 2 * d))
            (q,) = self._heads(F.linear(take(x, keep), weights[0], biases[0]), 1)
            k, v = self._heads(F.linear(x, weights[1], biases[1]), 2)
        dropped = self.dropout if self.training else 0.0
        return self.out(attend(q, k, v, attn_mask=None if mask is None else mask[:, None, None], dropout_p=dropped))

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(b, n, parts·d) as `parts` views (b, heads, n, d / heads)."""
        b, n, width = x.shape
        return x.view(b, n, parts, self.heads, width // parts // self.heads).permute(2, 0, 3, 1, 4).unbind(0)


class CausalAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and what precedes it.

    kv_heads: heads of keys and values, each of which serves heads / kv_heads heads of queries next to each other
    (grouped queries, Ainslie et al. 2023, arXiv:2305.13245); None: as many as of queries. qk_norm: each head's queries
    and keys are normalised, with a learned gain. qkv_bias, out_bias: of the projections. dropout: of attention's
    probabilities.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        out_bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dropout = heads, kv_heads or heads, dropout
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        if heads % self.kv_heads:
            raise ValueError(f"heads={heads} is not a multiple of kv_heads={self.kv_heads}")
        self.head_width = width // heads
        self.qkv = nn.Linear(width, (heads + 2 * self.kv_heads) * self.head_width, bias=qkv_bias)
        self.out = nn.Linear(width, width, bias=out_bias)
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm, self.k_norm = (nn.LayerNorm(self.head_width, bias=False) for _ in range(2))

    def forward(
        self,
        x: Tensor,
        *,
        rotary: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        start: int = 0,
    ) -> Tensor:
        """x: (b, m, d), tokens start…start + m − 1 of a sequence whose earlier ones `cache` holds; returns (b, m, d).

        rotary: rows start…start + m − 1 of `Rotary.table`. mask: (b, 1, m, start + m) bool, true where a token may
        attend; None: to itself and everything before it.
        """
        m = x.shape[1]
        heads = self.qkv(x).unflatten(-1, (-1, self.head_width))
        both = heads.narrow(2, 0, self.heads + self.kv_heads)  # queries and keys are turned at once
        v = heads.narrow(2, self.heads + self.kv_heads, self.kv_heads)
        if self.qk_norm:
            q, k = both.split((self.heads, self.kv_heads), dim=2)
            both = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        if rotary is not None:
            both = rotate(both, rotary)
        q, k = both.narrow(2, 0, self.heads), both.narrow(2, self.heads, self.kv_heads)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if cache is not None:
            k, v = cache.write(start, k, v)
        if mask is None and start and m > 1:
            mask = torch.ones(m, start + m, dtype=torch.bool, device=x.device).tril_(start)
        causal, grouped = mask is None and m > 1, self.kv_heads != self.heads
        dropped = self.dropout if self.training else 0.0
        return self.out(attend(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped, dropout_p=dropped))
