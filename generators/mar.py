"""MAR: continuous tokens, several at a time and in any order, each from a small diffusion (Li et al. 2024,
arXiv:2406.11838).

tokens (b, n, c), some of them known -> masked autoencoder -> z (b, n, d) of the unknown ones -> head: p(token | z)

The encoder sees known tokens only, the decoder all places; both see both ways. `MaskedAutoencoder` is that body, which
TokenBridge shares. Published weights and their names: smalti/published/mar.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.layers.attention import SelfAttention, take
from smalti.layers.mlp import MLP
from smalti.settings import check_shares, check_sizes


class MaskedAutoencoder(nn.Module):
    """What stands at unknown places, in view of the known tokens and of a class: z (b, m, `out_width`).

    length, dim: tokens n and their channels c. width, depth, heads: of the encoder; decoder_width, decoder_depth,
    decoder_heads: of the decoder, None: as of the encoder. mlp_ratio: width inside of MLPs over that of the model.
    buffer: slots of the class in front of the tokens, where an encoder that sees few tokens can compute; each has its
    own position. dropout: behind attention, GELU and MLP; attention_dropout: of attention's probabilities.
    Source: He et al. 2021, arXiv:2111.06377, as arXiv:2406.11838, section 3.5 and appendix B, has it.
    """

    def __init__(
        self,
        *,
        length: int,
        dim: int,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        decoder_width: int | None = None,
        decoder_depth: int | None = None,
        decoder_heads: int | None = None,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        buffer: int = 64,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_sizes(length=length, dim=dim, width=width, depth=depth, heads=heads, buffer=buffer)
        check_sizes(decoder_width=decoder_width, decoder_depth=decoder_depth, decoder_heads=decoder_heads)
        check_shares(dropout=dropout, attention_dropout=attention_dropout)
        self.length, self.width, self.buffer = length, width, buffer
        self.out_width = out = decoder_width or width

        def blocks(width: int, depth: int, heads: int) -> nn.ModuleList:
            options = {"mlp_ratio": mlp_ratio, "norm_eps": norm_eps, "dropout": dropout}
            return nn.ModuleList(
                Block(width, SelfAttention(width, heads, dropout=attention_dropout), **options) for _ in range(depth)
            )

        self.embed = nn.Linear(dim, width)
        self.encoder_positions = nn.Parameter(torch.empty(buffer + length, width))
        self.input_norm = nn.LayerNorm(width, eps=1e-6)
        self.encoder = blocks(width, depth, heads)
        self.encoder_norm = nn.LayerNorm(width, eps=norm_eps)
        self.decoder_embed = nn.Linear(width, out)
        self.mask_token = nn.Parameter(torch.empty(1, out))
        self.decoder_positions = nn.Parameter(torch.empty(buffer + length, out))
        self.decoder = blocks(out, decoder_depth or depth, decoder_heads or heads)
        self.decoder_norm = nn.LayerNorm(out, eps=norm_eps)
        self.output_positions = nn.Parameter(torch.empty(length, out))
        init_(self)

    def forward(self, tokens: Tensor, mask: Tensor, classes: Tensor) -> Tensor:
        """z (b, n, out_width) of all places, in any of which a head may be interested.

        tokens: (b, n, c), read where `mask` (b, n) is false; it is true where tokens are to be predicted, at as many
        places of each sample. classes: (b, width), embedded.
        """
        known = (~mask).nonzero()[:, 1].view(len(mask), -1)
        return self.decode(self.encode(tokens, known, classes), known)

    def at(self, tokens: Tensor, known: Tensor, wanted: Tensor, classes: Tensor) -> Tensor:
        """z (b, m, out_width) at the `wanted` places (b, m) alone, which is less work than all.

        tokens: (b, n, c), read at the `known` places (b, k). classes: (b, width), embedded.
        """
        return self.decode(self.encode(tokens, known, classes), known, wanted)

    def encode(self, tokens: Tensor, known: Tensor, classes: Tensor) -> Tensor:
        """(b, buffer + k, width): the buffer, and the tokens at the `known` places (b, k), in the order given."""
        slots, positions = self.encoder_positions.split((self.buffer, self.length))
        x = self.embed(take(tokens, known))
        x = torch.cat([classes[:, None] + slots, x + F.embedding(known, positions)], dim=1)
        x = self.input_norm(x)
        for block in self.encoder:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, encoded: Tensor, known: Tensor, wanted: Tensor | None = None) -> Tensor:
        """z (b, n, out_width), or (b, m, out_width) at the `wanted` places (b, m), of what `encode` gives.

        Where places are wanted, the last block computes those alone, which still attend to all.
        """
        x = self.decoder_embed(encoded)
        slots, seen = x.split((self.buffer, known.shape[1]), dim=1)
        unknown = self.mask_token.to(x.dtype).expand(len(x), self.length, -1)
        x = torch.cat([slots, unknown.scatter(1, known[..., None].expand_as(seen), seen)], dim=1)
        x = x + self.decoder_positions
        *before, last = self.decoder
        for block in before:
            x = block(x)
        if wanted is None:
            return self.decoder_norm(last(x)[:, self.buffer :]) + self.output_positions
        return self.decoder_norm(last(x, self.buffer + wanted)) + F.embedding(wanted, self.output_positions)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on what is added. x: (b, n, width)."""

    def __init__(
        self, width: int, attn: nn.Module, *, mlp_ratio: float = 4.0, norm_eps: float = 1e-6, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=norm_eps), attn
        self.norm2, self.mlp = nn.LayerNorm(width, eps=norm_eps), MLP(width, int(mlp_ratio * width), dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """With `keep` (b, m), only the tokens at these places come out, which still attend to all."""
        y = self.attn(self.norm1(x), keep)
        x = (x if keep is None else take(x, keep)) + self.dropout(y)
        return x + self.dropout(self.mlp(self.norm2(x)))


def init_(body: nn.Module) -> None:
    """As published: every Linear xavier-uniform with biases 0, tables and the mask token normal with 0.02."""
    for module in body.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in body.named_parameters():
        if name.endswith(("positions", "mask_token")):
            nn.init.normal_(parameter, std=0.02)
