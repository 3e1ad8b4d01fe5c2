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

    def forward(self, x: Tensor, keep: slice | None = None, mask: Tensor | None = None) -> Tensor:
        """With `keep`, only those tokens come out; with `mask` (b, n), only the true ones are attended to."""
        x = (x if keep is None else x[:, keep]) + self.attn(self.ln_1(x), keep, mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Sequential):
    """Blocks in a row. The last one computes only the tokens that are read afterwards.

    With 128 of 385 tokens read, that saves 7 % of eight blocks' multiplications.
    """

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__(*(Block(width, heads) for _ in range(depth)))

    def forward(self, x: Tensor, keep: slice | None = None, mask: Tensor | None = None) -> Tensor:
        """x: (b, n, width), returns (b, n, width) or the tokens in `keep`. mask: (b, n), true where attended to."""
        *before, last = self
        for block in before:
            x = block(x, mask=mask)
        return last(x, keep, mask)
