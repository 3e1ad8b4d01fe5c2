"""A token's codes one after the other, in view of what a body knows of its place: TokenBridge's dimension-wise head.

z (m, d) -> condition; [condition, code 1 … code q − 1] -> small causal transformer, modulated by the condition at every
step -> logits of code 1 … code q

TokenBridge (Wang et al. 2025, arXiv:2503.16430), section 3.3. The sequence is as long as a token has channels (16), so
that a codebook of 2^bits codes a channel takes the place of one of 2^(16 · bits).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.generators.decoding.choice import inverse_cdf
from smalti.generators.decoding.filters import Filters
from smalti.layers.attention import CausalAttention
from smalti.layers.cache import KVCache
from smalti.layers.mlp import MLP
from smalti.settings import check_sizes


class DimensionHead(nn.Module):
    """codes: q, steps of a token. codebook_size: v of each. condition_dim: d, width of z. width, depth, heads: of the
    transformer, mlp_ratio times as wide inside its MLPs. Published (width, depth, heads): B 768, 4, 8; L 1024, 4, 8;
    H 1024, 6, 8.
    """

    def __init__(
        self,
        *,
        codes: int,
        codebook_size: int,
        condition_dim: int,
        width: int = 1024,
        depth: int = 4,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        check_sizes(codes=codes, codebook_size=codebook_size, condition_dim=condition_dim)
        check_sizes(head_width=width, head_depth=depth, head_heads=heads)
        self.codes, self.codebook_size = codes, codebook_size
        self.condition = nn.Linear(condition_dim, width)
        self.embedding = nn.Embedding((codes - 1) * codebook_size, width)  # a table for each code but the last
        self.positions = nn.Parameter(torch.empty(codes, width))
        self.steps = nn.Parameter(torch.empty(codes, width))  # what a step adds to the condition
        self.blocks = nn.ModuleList(ModulatedBlock(width, heads, mlp_ratio, norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.modulation = nn.Linear(width, 2 * width)
        self.logits = nn.ModuleList(nn.Linear(width, codebook_size) for _ in range(codes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: xavier-uniform with biases 0, modulations 0 (a block begins as the identity), tables normal
        with 0.02, and embeddings with torch's 1."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("modulation.weight"):
                nn.init.zeros_(parameter)
        for table in (self.positions, self.steps):
            nn.init.normal_(table, std=0.02)

    def forward(self, z: Tensor, indices: Tensor, *, shifted_start: bool = False) -> Tensor:
        """Logits (m, q, v) float32 of every code, each from those before it. z: (m, d), indices: (m, q), of which the
        last is not read. shifted_start: see `sample`."""
        condition = self.condition(z)
        tables = torch.arange(self.codes - 1, device=indices.device) * self.codebook_size
        start = condition + self.steps[0] if shifted_start else condition
        x = torch.cat([start[:, None], self.embedding(indices[:, :-1] + tables).to(start.dtype)], dim=1)
        x = self._features(x + self.positions, F.silu(condition[:, None] + self.steps))
        return torch.stack([logits(x[:, code]) for code, logits in enumerate(self.logits)], dim=1).float()

    def loss(self, target: Tensor, z: Tensor) -> Tensor:
        """(m,) float32: cross-entropy of each token's codes, in nats, averaged over the q of them.

        target: indices (m, q). z: (m, d).
        """
        logits = self(z, target)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target).mean(1)

    def sample(self, z: Tensor, uniform: Tensor, *, temperature: float = 1.0, shifted_start: bool = False) -> Tensor:
        """Indices (m, q) from softmax(logits / temperature); temperature 0: argmax. Keys and values are kept.

        z: (m, d). uniform: (m, q) in [0, 1), number j chooses code j by inverse CDF. shifted_start: the sequence begins
        with the condition plus the first step's vector, as in the published sampler, and not with the condition alone,
        as in training. The published numbers were made so.
        """
        choose, condition = Filters(temperature), self.condition(z)
        caches = [KVCache(self.codes) for _ in self.blocks]
        x = condition + self.steps[0] if shifted_start else condition
        chosen: list[Tensor] = []
        for code, logits in enumerate(self.logits):
            if code:
                x = self.embedding(chosen[-1] + (code - 1) * self.codebook_size).to(condition.dtype)
            modulating = F.silu(condition + self.steps[code])[:, None]
            features = self._features((x + self.positions[code])[:, None], modulating, caches, code)
            probabilities = choose(logits(features[:, 0]).double()).softmax(-1)
            chosen.append(inverse_cdf(probabilities, uniform[:, code]))
        return torch.stack(chosen, dim=1)

    def _features(self, x: Tensor, modulating: Tensor, caches: list[KVCache] | None = None, start: int = 0) -> Tensor:
        """x, modulating: (m, k, width), steps start…start + k − 1, those before in `caches`; returns (m, k, width)."""
        for number, block in enumerate(self.blocks):
            x = block(x, modulating, None if caches is None else caches[number], start)
        scale, shift = self.modulation(modulating).chunk(2, dim=-1)  # published in this order here, not in blocks
        x = self.norm(x)
        return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype) * (1 + scale) + shift


class ModulatedBlock(nn.Module):
    """A causal block whose halves are shifted, scaled and gated at every step (DiT's adaLN-zero, Peebles and Xie 2022,
    arXiv:2212.09748); norms have weights of their own, also those of queries and keys."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm_eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=norm_eps) for _ in range(2))
        self.attn = CausalAttention(width, heads, qk_norm=True, qkv_bias=True, out_bias=True)
        self.attn.q_norm, self.attn.k_norm = (nn.LayerNorm(width // heads, eps=1e-6) for _ in range(2))
        self.mlp = MLP(width, int(mlp_ratio * width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, modulating: Tensor, cache: KVCache | None = None, start: int = 0) -> Tensor:
        """x, modulating: (m, k, width), the latter activated already; steps start…start + k − 1 of a sequence."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(modulating).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, cache=cache, start=start)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
