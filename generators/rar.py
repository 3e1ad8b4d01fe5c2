"""RAR: tokens one after the other, trained in random orders first (Yu et al. 2024, arXiv:2411.00776).

[cls, class, t_1 … t_n] -> causal transformer, modulated at each place by the class and the place -> logits of t_1 … t_n

In training an image's tokens are in random order with a probability that falls from 1 to 0; what is sampled is raster
order. Each token carries the position that it has in the image and, "target-aware", that of the token that comes next.
Published weights and their names: smalti/published/rar.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smalti.generators.autoregressive import AutoregressiveGenerator, AutoregressiveSampling
from smalti.generators.base import Condition, GeneratorOutput, accept_codes, indices_of
from smalti.layers.attention import attend
from smalti.layers.cache import KVCache
from smalti.settings import check_shares, check_sizes, read_settings
from smalti.tokenizers.quantizers.base import Draws
from smalti.tokenizers.spec import Tokens, TokenSpec


@dataclass(frozen=True)
class RARSampling(AutoregressiveSampling):
    """Its fields; the values here are those of RAR-B, which uses neither top-k nor top-p."""

    guidance: float = 16.0
    guidance_schedule: str = "power_cosine"
    guidance_power: float = 2.75


class RAR(AutoregressiveGenerator):
    """Published sizes (width, depth, heads, mlp_width): B 768, 24, 16, 3072; L 1024, 24, 16, 4096; XL 1280, 32, 16,
    5120; XXL 1408, 40, 16, 6144.

    dropout: of both halves of a block and inside its MLP; attention_dropout: of attention's probabilities.
    label_dropout: how often training hides the label, which guidance needs. anneal_start, anneal_end: in updates; until
    the first every image's tokens are permuted, from the second on none's. sampling: fields of `RARSampling`; the
    attribute of that name may be changed later.
    activation_checkpointing: compute blocks again in backward instead of keeping what they computed.
    """

    def __init__(
        self,
        *,
        tokens: TokenSpec | Mapping[str, Any],
        num_classes: int | None = None,
        width: int = 768,
        depth: int = 24,
        heads: int = 16,
        mlp_width: int = 3072,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        label_dropout: float = 0.1,
        anneal_start: int = 125000,
        anneal_end: int = 187500,
        sampling: Mapping[str, Any] | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(tokens)
        check_sizes(width=width, depth=depth, heads=heads, mlp_width=mlp_width)
        check_shares(label_dropout=label_dropout, dropout=dropout, attention_dropout=attention_dropout)
        if not 0 <= anneal_start <= anneal_end:
            raise ValueError(f"anneal_start={anneal_start} is not in 0…anneal_end={anneal_end}")
        self.num_classes, self.label_dropout = num_classes, label_dropout
        self.anneal_start, self.anneal_end = anneal_start, anneal_end
        self.sampling = read_settings(RARSampling, "sampling", sampling or {})
        self.checkpointing = activation_checkpointing
        n, v = self.spec.length, self.spec.codebook_size
        assert v is not None  # see `accepts`
        self.v = v
        self.embedding = nn.Embedding(v + 1 + (num_classes or 0) + 1, width)  # codes, one unused, classes, null
        self.cls_token = nn.Parameter(torch.empty(1, width))
        self.position_embedding = nn.Parameter(torch.empty(n + 2, width))
        self.target_embedding = nn.Parameter(torch.empty(n + 2, width))  # the first two are unused
        self.step_embedding = nn.Parameter(torch.empty(n + 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width, dropout, attention_dropout) for _ in range(depth))
        self.norm_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, v)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights and tables normal, of 0.02, cut at ±2; biases, modulations and the first token 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for table in (self.position_embedding, self.target_embedding, self.step_embedding):
            nn.init.trunc_normal_(table, std=0.02)
        nn.init.zeros_(self.cls_token)
        nn.init.zeros_(self.norm_modulation.weight)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.modulation.weight)

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        accept_codes("RAR", spec)

    def random_ratio(self, step: int) -> float:
        """The probability that an image's tokens are permuted in the update after `step` updates."""
        if step < self.anneal_start:
            return 1.0
        if step > self.anneal_end:
            return 0.0
        return 1.0 - (step - self.anneal_start) / max(self.anneal_end - self.anneal_start, 1)

    def draw(self, batch_size: int, generator: torch.Generator, *, step: int) -> Draws:
        """ "order" (b, n) int64, the place in the image of each token of the sequence; "label" (b,) uniforms, whether
        the label is hidden."""
        n = self.spec.length
        uniform = torch.rand(batch_size, generator=generator)
        permutations = torch.rand(batch_size, n, generator=generator).argsort(dim=1)
        return {
            "order": choose_orders(uniform, permutations, self.random_ratio(step)),
            "label": torch.rand(batch_size, generator=generator),
        }

    def forward(self, tokens: Tokens, condition: Condition, draws: Draws) -> GeneratorOutput:
        """The mean cross-entropy of all tokens."""
        indices, order = indices_of(tokens, self.spec), draws["order"]
        labels = self.labels_of(condition, len(indices), indices.device)
        labels = labels.masked_fill(draws["label"] < self.label_dropout, -1)
        sequence = indices.gather(1, order)
        logits = self.logits(sequence[:, :-1], labels, order)
        loss = F.cross_entropy(logits.flatten(0, 1), sequence.flatten())
        with torch.no_grad():
            raster = torch.arange(order.shape[1], device=order.device)
            statistics = {
                "accuracy": (logits.argmax(-1) == sequence).float().mean(),
                "random_order": (order != raster).any(1).float().mean(),
            }
        return GeneratorOutput({"cross_entropy": loss}, statistics)

    def logits(self, sequence: Tensor, labels: Tensor, order: Tensor | None = None) -> Tensor:
        """Logits (b, m + 1, v) float32 of the first m + 1 tokens, of which m are given, (b, m) in their order.

        labels: (b,), −1 for the null condition. order: (b, n), as of `draw`; None: raster.
        """
        x, condition = self.embed(sequence, labels, self.places(order))
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, use_reentrant=False)
            else:
                x = block(x, condition)
        return self.to_logits(x[:, 1:], condition[:, 1:])

    def places(self, order: Tensor | None = None) -> Tensor:
        """What is added to each place of the sequence (b or 1, n + 2, width): its own position and the next token's."""
        order = torch.arange(self.spec.length, device=self.embedding.weight.device)[None] if order is None else order
        own, target = self.position_embedding, self.target_embedding
        start = own[:2].expand(len(order), -1, -1)
        return torch.cat([start, own[2 + order]], dim=1) + F.pad(target[2 + order], (0, 0, 1, 1))

    def embed(self, tokens: Tensor, labels: Tensor, places: Tensor, start: int | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (b, m) behind `start` others, as input of the blocks and condition of each, (b, m, width).

        start: None, cls and class go before them: (b, m + 2, width). places: as of `places`.
        """
        given = self.embedding(self.v + 1 + torch.where(labels < 0, self.num_classes or 0, labels))[:, None]
        x = self.embedding(tokens)
        if start is None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), given, x], dim=1)
        first = 0 if start is None else start + 2
        rows = slice(first, first + x.shape[1])
        return x + places[:, rows], F.silu(given + self.step_embedding[rows])

    def to_logits(self, x: Tensor, condition: Tensor) -> Tensor:
        """x, condition: (b, m, width) behind the blocks. The scale comes first here, other than in the blocks."""
        scale, shift = self.norm_modulation(condition).chunk(2, dim=-1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return self.head(torch.addcmul(shift, x, 1 + scale)).float()

    @property
    def has_null(self) -> bool:
        return self.label_dropout > 0

    def predictor(
        self, condition: Condition, rows: int, *, guided: bool = False, sampling: AutoregressiveSampling | None = None
    ) -> RARPredictor:
        labels = self.labels_of(condition, rows, self.head.weight.device)
        return RARPredictor(self, torch.cat([labels, torch.full_like(labels, -1)]) if guided else labels)


def choose_orders(uniform: Tensor, permutations: Tensor, ratio: float) -> Tensor:
    """The permutations (b, n) where uniform (b,) is below the ratio, raster order elsewhere."""
    raster = torch.arange(permutations.shape[1], device=permutations.device)
    return torch.where(uniform[:, None] < ratio, permutations, raster)


class RARPredictor:
    """A RAR, labels (r,) and what it has read, in raster order; a `Predictor`."""

    def __init__(self, model: RAR, labels: Tensor) -> None:
        self.model, self.labels, self.places = model, labels, model.places()
        self.caches = [KVCache(2 + model.spec.length) for _ in model.blocks]

    def begin(self, tokens: Tensor) -> Tensor:
        x, condition = self._blocks(tokens, None)
        return self.model.to_logits(x[:, 1:], condition[:, 1:])  # nobody reads what follows cls

    def __call__(self, tokens: Tensor, start: int) -> Tensor:
        return self.model.to_logits(*self._blocks(tokens, start))

    def keep(self, rows: int) -> None:
        self.labels = self.labels[:rows]
        for cache in self.caches:
            cache.keep(rows)

    def _blocks(self, tokens: Tensor, start: int | None) -> tuple[Tensor, Tensor]:
        x, condition = self.model.embed(tokens, self.labels, self.places, start)
        for block, cache in zip(self.model.blocks, self.caches, strict=True):
            x = block(x, condition, cache, 0 if start is None else start + 2)
        return x, condition


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by a condition (adaLN-zero), on norms with weights."""

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, dropout, attention_dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, mlp_width, dropout)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, cache: KVCache | None = None, start: int = 0) -> Tensor:
        """x: (b, m, width), rows start…start + m − 1; condition: the same shape, activated already."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        y = self.attn(torch.addcmul(shift1, self.norm1(x), 1 + scale1), cache, start)
        x = torch.addcmul(x, gate1, y)
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))


class Attention(nn.Module):
    """Multi-head self-attention to what precedes; each head's queries and keys are normalised."""

    def __init__(self, width: int, heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        self.heads, self.attention_dropout = heads, attention_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (nn.LayerNorm(width // heads, eps=1e-6) for _ in range(2))
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None, start: int = 0) -> Tensor:
        """x: (b, m, width), rows start…start + m − 1 of a sequence whose earlier ones `cache` holds."""
        m = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if cache is not None:
            k, v = cache.write(start, k, v)
        mask = None
        if start and m > 1:
            mask = torch.ones(m, start + m, dtype=torch.bool, device=x.device).tril(start)
        dropout = self.attention_dropout if self.training else 0.0
        y = attend(q, k, v, attn_mask=mask, is_causal=start == 0, dropout_p=dropout)
        return self.dropout(self.out(y))


class MLP(nn.Module):
    """Linear, exact GELU, Linear, with dropout behind both."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc = nn.Linear(width, hidden)
        self.proj = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, width)."""
        return self.dropout(self.proj(self.dropout(F.gelu(self.fc(x)))))
