"""GPT over image tokens: LlamaGen's decoder-only transformer (Sun et al. 2024, arXiv:2406.06525).

[condition, tokens 0…n − 2] -> Llama's blocks (RMSNorm, rotary positions, SwiGLU, no biases) -> logits of tokens 0…n − 1

The condition is one token, the class, or the projected features of a text. Rotary positions are those of the grid where
tokens have one, else of the sequence, so that it also models 1-D tokens; where prefixes of them decode, prefixes of any
length can be generated. Published weights and their names: smalti/published/llamagen.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.generators.autoregressive import AutoregressiveGenerator, AutoregressiveSampling, cross_entropy
from smalti.generators.base import Condition, GeneratorOutput, accept_codes, indices_of
from smalti.layers.attention import CausalAttention
from smalti.layers.cache import KVCache
from smalti.layers.drop import DropPath
from smalti.layers.mlp import MLP, FeedForward, llama_hidden
from smalti.layers.norms import RMSNorm
from smalti.layers.rotary import Rotary
from smalti.settings import check_choice, check_shares, check_sizes, read_settings
from smalti.tokenizers.quantizers.base import Draws
from smalti.tokenizers.spec import Tokens, TokenSpec


@dataclass(frozen=True)
class GPTSampling(AutoregressiveSampling):
    """Its fields, with values that change nothing."""


class GPT(AutoregressiveGenerator):
    """LlamaGen's GPT. Published sizes (width, depth, heads): B 768, 12, 12; L 1024, 24, 16; XL 1280, 36, 20;
    XXL 1536, 48, 24; 3B 3200, 24, 32.

    kv_heads: of keys and values; None: as many as `heads`. hidden: of SwiGLU; None: `llama_hidden(width)`.
    num_classes: of labels; without classes and text it is unconditional. text_dim: channels of text features instead
    of labels; text_length: how many of them at most, as many tokens the condition is. label_dropout: how often training
    hides the condition (labels or text), which guidance needs. null_text: what stands for no text, "learned"
    (features), or "fixed", random ones that are never trained, as published.
    positions: "rope", or "learned", one vector for each token. condition_rope: of `Rotary`; LlamaGen's is "zero".
    token_dropout: of the input, condition included; residual_dropout, mlp_dropout: of the two halves of a block;
    drop_path: of both, of whole samples, from 0 in the first block to this in the last one.
    sampling: fields of `GPTSampling`; the attribute of that name may be changed later.
    """

    def __init__(
        self,
        *,
        tokens: TokenSpec | Mapping[str, Any],
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        kv_heads: int | None = None,
        hidden: int | None = None,
        num_classes: int | None = None,
        text_dim: int | None = None,
        text_length: int = 120,
        label_dropout: float = 0.1,
        null_text: str = "learned",
        positions: str = "rope",
        rope_base: float = 10000.0,
        condition_rope: str = "identity",
        norm_eps: float = 1e-5,
        token_dropout: float = 0.1,
        residual_dropout: float = 0.1,
        mlp_dropout: float = 0.1,
        drop_path: float = 0.0,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tokens)
        check_choice("positions", positions, ("rope", "learned"))
        check_choice("null_text", null_text, ("learned", "fixed"))
        if num_classes is not None and text_dim is not None:
            raise ValueError(f"num_classes={num_classes} and text_dim={text_dim} exclude each other; set one of them")
        check_sizes(width=width, depth=depth, heads=heads, kv_heads=kv_heads, hidden=hidden)
        check_sizes(text_dim=text_dim, text_length=text_length)
        check_shares(label_dropout=label_dropout, drop_path=drop_path)
        codes = self.spec.codebook_size
        assert codes is not None
        self.num_classes, self.text_dim, self.label_dropout = num_classes, text_dim, label_dropout
        self.text_length = None if text_dim is None else text_length
        self.sampling = read_settings(GPTSampling, "sampling", sampling or {})
        self.condition: ClassCondition | TextCondition
        if text_dim is None:
            self.condition = ClassCondition(num_classes, width, null=label_dropout > 0 or num_classes is None)
        else:
            self.condition = TextCondition(text_dim, text_length, width, learned=null_text == "learned")
        self.token_embedding = nn.Embedding(codes, width)
        self.dropout = nn.Dropout(token_dropout)
        rates = [drop_path * layer / max(depth - 1, 1) for layer in range(depth)]
        self.blocks = nn.ModuleList(
            Block(
                width,
                CausalAttention(width, heads, kv_heads=kv_heads),
                FeedForward(width, hidden=hidden or llama_hidden(width)),
                eps=norm_eps,
                dropout=(residual_dropout, mlp_dropout),
                drop_path=rate,
            )
            for rate in rates
        )
        self.rotary: Rotary | None = None
        if positions == "rope":
            grid = self.spec.grid or (self.spec.length,)
            self.rotary = Rotary(width // heads, grid, self.condition.length, condition_rope, rope_base)
        else:
            self.position_embedding = nn.Embedding(self.spec.length, width)
        self.norm = RMSNorm(width, norm_eps)
        self.head = nn.Linear(width, codes, bias=False)
        self.reset_parameters()

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        accept_codes("GPT", spec)

    def reset_parameters(self) -> None:
        """As published: normal with 0.02, norms 1, and a head of zeros (every token is equally probable)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def draw(self, batch_size: int, generator: torch.Generator, *, step: int) -> Draws:
        """ "drop" (b,) uniform numbers: the condition is hidden where they are below `label_dropout`."""
        return {"drop": torch.rand(batch_size, generator=generator)}

    def forward(
        self, tokens: Tokens, condition: Condition, draws: Draws, weight: Tensor | None = None
    ) -> GeneratorOutput:
        """Cross-entropy of every token that is kept. weight: (b,) of each sample's tokens; None: all count alike."""
        if isinstance(self.condition, TextCondition) and condition.features is None:
            raise ValueError("no text features in this batch: this generator learns from them; set text_dim=null")
        indices = indices_of(tokens, self.spec)
        logits = self.logits(indices, condition, draws["drop"] < self.label_dropout)
        return GeneratorOutput({"cross_entropy": cross_entropy(logits, indices, tokens.lengths, weight)})

    def logits(self, indices: Tensor, condition: Condition, dropped: Tensor | None = None) -> Tensor:
        """Logits (b, n, v) float32 of tokens 0…n − 1, each from those before it and the condition.

        indices: (b, n), of which the last one is not read. dropped: (b,) bool, where the condition is hidden.
        """
        start, present = self.begin(condition, len(indices), dropped)
        x = torch.cat([start, self.embed(indices[:, :-1], 0)], dim=1)
        x = self.trunk(x, 0, present)[:, start.shape[1] - 1 :]
        return self.head(x).float()

    def begin(self, condition: Condition, rows: int, dropped: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The condition's tokens (rows, c, width), and which of them may be attended to, (rows, c) bool; None: all."""
        if isinstance(self.condition, TextCondition):
            return self.condition(condition, rows, dropped)
        labels = self.labels_of(condition, rows, self.token_embedding.weight.device)
        return self.condition(labels, dropped), None

    def embed(self, indices: Tensor, start: int) -> Tensor:
        """Tokens (b, m) that stand at start…start + m − 1, as (b, m, width)."""
        x = self.token_embedding(indices)
        return x if self.rotary else x + self.position_embedding.weight[start : start + indices.shape[1]]

    def trunk(
        self, x: Tensor, start: int, present: Tensor | None = None, caches: list[KVCache] | None = None
    ) -> Tensor:
        """Blocks and norm over x (b, m, width), rows start…start + m − 1 of condition and tokens.

        present: (b, c) bool, condition tokens that may be attended to; None: all. caches: one a block, of earlier rows.
        """
        x = self.dropout(x)
        rotary = self.rotary.table(x.device)[start : start + x.shape[1]] if self.rotary else None
        mask = None if present is None else causal_mask(present, start, x.shape[1])
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary=rotary, mask=mask, cache=None if caches is None else caches[layer], start=start)
        return self.norm(x)

    @property
    def has_null(self) -> bool:
        return self.label_dropout > 0

    def predictor(
        self, condition: Condition, rows: int, *, guided: bool = False, sampling: AutoregressiveSampling | None = None
    ) -> GPTPredictor:
        if not guided:
            return GPTPredictor(self, *self.begin(condition, rows))
        dropped = torch.arange(2 * rows, device=self.token_embedding.weight.device) >= rows
        return GPTPredictor(self, *self.begin(condition.repeat(2), 2 * rows, dropped))


class GPTPredictor:
    """A GPT, a condition, and the keys and values of what it has read; a `Predictor`."""

    def __init__(self, model: GPT, start: Tensor, present: Tensor | None) -> None:
        self.model, self.start = model, start
        self.present = None if present is None or bool(present.all()) else present
        self.caches = [KVCache(start.shape[1] + model.spec.length) for _ in model.blocks]

    def begin(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.start, self.model.embed(tokens, 0)], dim=1)
        x = self.model.trunk(x, 0, self.present, self.caches)[:, self.start.shape[1] - 1 :]
        return self.model.head(x).float()

    def __call__(self, tokens: Tensor, start: int) -> Tensor:
        x = self.model.embed(tokens, start)
        x = self.model.trunk(x, self.start.shape[1] + start, self.present, self.caches)
        return self.model.head(x).float()

    def keep(self, rows: int) -> None:
        self.start = self.start[:rows]
        self.present = None if self.present is None else self.present[:rows]
        for cache in self.caches:
            cache.keep(rows)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout and drop path on what is added."""

    def __init__(
        self,
        width: int,
        attn: CausalAttention,
        mlp: FeedForward,
        *,
        eps: float,
        dropout: tuple[float, float],
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm_1, self.attn = RMSNorm(width, eps), attn
        self.norm_2, self.mlp = RMSNorm(width, eps), mlp
        self.dropout_1, self.dropout_2 = nn.Dropout(dropout[0]), nn.Dropout(dropout[1])
        self.drop_path_1, self.drop_path_2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        """x: (b, m, width); attention: arguments of `CausalAttention`."""
        y = self.attn(self.norm_1(x), **attention)
        x = x + (self.drop_path_1(self.dropout_1(y)) if self.training else y)
        y = self.mlp(self.norm_2(x))
        return x + (self.drop_path_2(self.dropout_2(y)) if self.training else y)


class ClassCondition(nn.Module):
    """A class as one token: a row of a table, whose last one (with `null`) stands for no class."""

    length = 1

    def __init__(self, num_classes: int | None, width: int, *, null: bool) -> None:
        super().__init__()
        self.num_classes, self.null = num_classes or 0, null
        self.embedding = nn.Embedding(self.num_classes + null, width)

    def forward(self, labels: Tensor, dropped: Tensor | None) -> Tensor:
        """labels: (rows,), −1 for no class; returns (rows, 1, width). Raises ValueError on CPUs where there is none but
        none was ever hidden in training (elsewhere looking would make the host wait)."""
        if dropped is not None:
            labels = labels.masked_fill(dropped, -1)
        if not self.null and labels.device.type == "cpu" and bool((labels < 0).any()):
            raise ValueError("no label, but with label_dropout=0 this generator was never trained without one")
        return self.embedding(labels.where(labels >= 0, self.num_classes))[:, None]


class TextCondition(nn.Module):
    """Text features as `length` tokens, padded at the front; `null` (length, dim) stands for no text."""

    null: Tensor

    def __init__(self, dim: int, length: int, width: int, *, learned: bool) -> None:
        super().__init__()
        self.length = length
        self.mlp = MLP(dim, width, width, bias=False, gelu="tanh")
        null = torch.randn(length, dim) / dim**0.5
        if learned:
            self.null = nn.Parameter(null)
        else:
            self.register_buffer("null", null)

    def forward(self, condition: Condition, rows: int, dropped: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(rows, length, width), and (rows, length) bool, true where there is text; None: everywhere.

        A text that is hidden keeps its own mask, as published.
        """
        if condition.labels is not None:
            raise ValueError("labels given, but this generator takes text features")
        if condition.features is None:
            return self.mlp(self.null.expand(rows, -1, -1)), None
        features, present = self.padded(condition)
        if dropped is not None:
            features = torch.where(dropped[:, None, None], self.null, features)
        return self.mlp(features), present

    def padded(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """Features (b, length, dim), the real ones last and in their order, the others 0; and which are real."""
        assert condition.features is not None
        features = condition.features.to(self.null)
        b, count, dim = features.shape
        if count > self.length or dim != self.null.shape[1]:
            raise ValueError(
                f"text features of shape {tuple(features.shape)}: this generator takes (b, up to {self.length}, "
                f"{self.null.shape[1]})"
            )
        given = condition.mask
        mask = torch.ones(b, count, dtype=torch.bool) if given is None else given.bool()
        mask = mask.to(features.device)
        order = mask.int().argsort(dim=1, stable=True)
        mask = mask.gather(1, order)
        features = features.gather(1, order[..., None].expand(-1, -1, dim)) * mask[..., None]
        front = self.length - count
        return F.pad(features, (0, 0, front, 0)), F.pad(mask, (front, 0))


def causal_mask(present: Tensor, start: int, m: int) -> Tensor:
    """(b, 1, m, start + m): rows start… of a sequence that begins with condition tokens, which are attended to where
    present (b, c); the absent ones see themselves (an empty row has no softmax)."""
    end = start + m
    rest = max(end - present.shape[1], 0)
    columns = F.pad(present[:, :end], (0, rest), value=True)[:, None, None]
    rows = torch.ones(m, end, dtype=torch.bool, device=present.device).tril(start)
    itself = torch.ones(m, end, dtype=torch.bool, device=present.device).triu(start) & rows
    return (rows & columns) | itself
