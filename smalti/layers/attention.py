"""Self-attention on torch's fused kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head self-attention over all tokens, or over those that a mask leaves: no dropout, biases everywhere.

    The projections start as torch's own `nn.MultiheadAttention` starts them: queries, keys and values xavier-uniform
    as one (3·width, width) matrix, biases zero, the output as any Linear.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, keep: slice | None = None, mask: Tensor | None = None) -> Tensor:
        """x: (b, n, d), returns (b, n, d), or only the tokens in `keep`, which still attend to all.

        mask: (b, n) bool, true for the tokens that may be attended to, at least one of each sample; None: all.
        """
        d = x.shape[-1]
        if keep is None:
            # Views of one buffer, never copied: backward keeps the qkv output once.
            q, k, v = self._heads(self.qkv(x), 3)
        else:
            weights, biases = self.qkv.weight.split((d, 2 * d)), self.qkv.bias.split((d, 2 * d))
            (q,) = self._heads(F.linear(x[:, keep], weights[0], biases[0]), 1)
            k, v = self._heads(F.linear(x, weights[1], biases[1]), 2)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            # torch's bfloat16 kernel on CPUs takes 3 times as long backward as its float32 one (b 64, n 128, 4 heads).
            q, k, v = q.float(), k.float(), v.float()
        keys = None if mask is None else mask[:, None, None]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=keys).to(x.dtype)
        return self.out(x.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(b, n, parts·d) as `parts` views (b, heads, n, d / heads)."""
        b, n, width = x.shape
        return x.view(b, n, parts, self.heads, width // parts // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
