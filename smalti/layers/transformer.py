"""Pre-norm transformer blocks, as in ViT and CLIP."""

from __future__ import annotations

from torch import Tensor, nn

from smalti.layers.attention import SelfAttention
from smalti.layers.mlp import MLP


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the MLP is four times as wide. x: (b, n, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))
