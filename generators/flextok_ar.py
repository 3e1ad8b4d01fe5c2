"""FlexTok's generator: a transformer that writes FlexTok's ordered tokens one after the other (Bachmann et al. 2025,
arXiv:2502.13967; the released models are EPFL-VILAB's flextok_ar, on apple/ml-l3m).

[start, tokens 0…n − 2] + positions, start + class -> pre-norm blocks, with cross-attention to text where there is one
-> logits of tokens 0…n − 1; a picture is the prefix of them that one likes.

Other than in LlamaGen's GPT the class has no token of its own, positions are added, norms are LayerNorms with a gain,
queries and keys are normalised, and text is attended to. Published weights and names: smalti/published/flextok_ar.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.generators.autoregressive import AutoregressiveGenerator, AutoregressiveSampling, cross_entropy
from smalti.generators.base import Condition, GeneratorOutput, accept_codes, indices_of
from smalti.layers.attention import CausalAttention, attend
from smalti.layers.cache import KVCache
from smalti.layers.mlp import MLP, FeedForward, llama_hidden
from smalti.layers.positions import sincos
from smalti.settings import check_choice, check_shares, check_sizes, read_settings
from smalti.tokenizers.quantizers.base import Draws
from smalti.tokenizers.spec import Tokens, TokenSpec


@dataclass(frozen=True)
class FlexTokARSampling(AutoregressiveSampling):
    """Published: guidance 1.5 for classes and 3.0 for text, else as it stands.

    null_class: what the class is under the null condition: "none"; or "first", as the published code has it by mistake,
    none for the first token that is chosen and class 0 for all others (pictures of the released models show it).
    """

    null_class: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("null_class", self.null_class, ("none", "first"))


class FlexTokAR(AutoregressiveGenerator):
    """Published sizes: width 64 · depth, depth heads; with text d12, d18, d26, d36 (113 M to 3.06 B parameters).

    hidden: of the MLP; None: `llama_hidden(width)`, or 4 · width where it is not gated. num_classes: of labels.
    text_dim: channels of text features instead. label_dropout: how often training hides the condition.
    null_length: how many features of an empty text stand for no text, which `set_null_text` gives (0: not known yet);
    None: one learned feature instead. positions: "learned", or "sincos", fixed ones that the start does not have.
    gated_mlp: SwiGLU; else GELU. bias: of the projections of attention and of a GELU's MLP. head_bias: of the head.
    qk_norm, final_norm: whether there is one. sampling: fields of `FlexTokARSampling`.
    """

    null_text: Tensor
    positions: Tensor

    def __init__(
        self,
        *,
        tokens: TokenSpec | Mapping[str, Any],
        width: int = 1152,
        depth: int = 18,
        heads: int = 18,
        hidden: int | None = None,
        num_classes: int | None = None,
        text_dim: int | None = None,
        label_dropout: float = 0.1,
        null_length: int | None = None,
        positions: str = "learned",
        gated_mlp: bool = True,
        bias: bool = False,
        head_bias: bool = False,
        qk_norm: bool = True,
        final_norm: bool = True,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tokens)
        check_choice("positions", positions, ("learned", "sincos"))
        if num_classes is not None and text_dim is not None:
            raise ValueError(f"num_classes={num_classes} and text_dim={text_dim} exclude each other; set one of them")
        check_sizes(width=width, depth=depth, heads=heads, hidden=hidden, text_dim=text_dim)
        check_shares(label_dropout=label_dropout)
        n, codes = self.spec.length, self.spec.codebook_size
        assert codes is not None
        self.num_classes, self.text_dim, self.label_dropout = num_classes, text_dim, label_dropout
        self.sampling = read_settings(FlexTokARSampling, "sampling", sampling or {})
        self.start = nn.Parameter(torch.empty(width))
        self.token_embedding = nn.Embedding(codes, width)
        if positions == "learned":
            self.positions = nn.Parameter(torch.empty(n, width))
        else:
            self.register_buffer("positions", _positions(self.spec.grid or (n, 1), width), persistent=False)
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes, width)
        if text_dim is not None:
            self.text = MLP(text_dim, text_dim, width, bias=False, gelu="tanh")
            if null_length is None:
                self.null_text = nn.Parameter(torch.empty(1, text_dim))
            else:
                self.register_buffer("null_text", torch.zeros(null_length, text_dim))
        inner = hidden or (llama_hidden(width) if gated_mlp else 4 * width)
        self.blocks = nn.ModuleList(
            Block(
                width,
                CausalAttention(width, heads, qk_norm=qk_norm, out_bias=bias),
                CrossAttention(width, heads, qk_norm=qk_norm, out_bias=bias) if text_dim else None,
                FeedForward(width, hidden=inner, bias=bias) if gated_mlp else MLP(width, inner, bias=bias),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, bias=False) if final_norm else nn.Identity()
        self.head = nn.Linear(width, codes, bias=head_bias)
        self.reset_parameters()

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        accept_codes("FlexTokAR", spec)

    def reset_parameters(self) -> None:
        """Weights and tables normal with 0.02, biases and the head 0 (ours; the published start is not known)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, table in self.named_parameters(recurse=False):
            nn.init.normal_(table, std=1.0 if name == "null_text" else 0.02)
        nn.init.zeros_(self.head.weight)

    @torch.no_grad()
    def set_null_text(self, features: Tensor) -> None:
        """What stands for no text: features (k, c) of an empty one, by the encoder that made all others."""
        if self.text_dim is None or features.ndim != 2 or features.shape[1] != self.text_dim:
            raise ValueError(f"features of shape {tuple(features.shape)} for a generator with text_dim={self.text_dim}")
        place = self.start
        self._parameters.pop("null_text", None)
        self.register_buffer("null_text", features.to(place.device, place.dtype, copy=True))
        self.arguments["null_length"] = len(features)

    @property
    def has_null(self) -> bool:
        return self.label_dropout > 0 if self.text_dim is None else len(self.null_text) > 0

    def check_guidance(self, guidance: float) -> None:
        if guidance != 1 and self.text_dim is not None and not self.has_null:
            raise ValueError(f"guidance={guidance}: nothing stands for no text yet; give set_null_text its features")
        super().check_guidance(guidance)

    def draw(self, batch_size: int, generator: torch.Generator, *, step: int) -> Draws:
        """ "drop" (b,) uniform numbers: the condition is hidden where they are below `label_dropout`."""
        return {"drop": torch.rand(batch_size, generator=generator)}

    def forward(
        self, tokens: Tokens, condition: Condition, draws: Draws, weight: Tensor | None = None
    ) -> GeneratorOutput:
        """Cross-entropy of every token that is kept. weight: (b,) of each sample's tokens; None: all count alike."""
        if self.text_dim is not None and condition.features is None:
            raise ValueError("no text features in this batch: this generator learns from them; set text_dim=null")
        indices = indices_of(tokens, self.spec)
        logits = self.logits(indices, condition, draws["drop"] < self.label_dropout)
        return GeneratorOutput({"cross_entropy": cross_entropy(logits, indices, tokens.lengths, weight)})

    def logits(self, indices: Tensor, condition: Condition, dropped: Tensor | None = None) -> Tensor:
        """Logits (b, n, v) float32 of tokens 0…n − 1, each from those before it and the condition.

        indices: (b, n), of which the last one is not read. dropped: (b,) bool, where the condition is hidden.
        """
        x = self.embed(indices[:, :-1], self.classes_of(condition, len(indices), dropped))
        text = self.text_of(condition, len(indices), dropped)
        for block, read in zip(self.blocks, self.read(text), strict=True):
            x = block(x, read)
        return self.head(self.norm(x)).float()

    def embed(self, indices: Tensor, labels: Tensor) -> Tensor:
        """Start and tokens (b, m) that follow it, as (b, m + 1, width). labels: (b,), −1 for none."""
        start = self.start.expand(len(indices), 1, -1)
        if self.num_classes is not None:
            given = self.class_embedding(labels.clamp(min=0)) * (labels >= 0)[:, None]
            start = start + given[:, None]
        return torch.cat([start, self.token_embedding(indices)], 1) + self.positions[: indices.shape[1] + 1]

    def classes_of(self, condition: Condition, rows: int, dropped: Tensor | None) -> Tensor:
        """(rows,) classes, −1 for none."""
        if self.text_dim is not None:
            if condition.labels is not None:
                raise ValueError("labels given, but this generator takes text features")
            return torch.full((rows,), -1, device=self.start.device)
        labels = self.labels_of(condition, rows, self.start.device)
        return labels if dropped is None else labels.masked_fill(dropped, -1)

    def text_of(self, condition: Condition, rows: int, dropped: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """(rows, l, width) to attend to and (rows, 1, 1, l) bool, true where there is text (None: everywhere)."""
        if self.text_dim is None:
            return None
        null = self.null_text
        if condition.features is None:
            return self.text(null.expand(rows, -1, -1)), None
        features = condition.features.to(null)
        b, count, _ = features.shape
        given = condition.mask
        mask = torch.ones(b, count, dtype=torch.bool) if given is None else given.bool()
        mask = mask.to(null.device)
        if dropped is not None:
            length = max(count, len(null))
            features, mask = F.pad(features, (0, 0, 0, length - count)), F.pad(mask, (0, length - count))
            features = torch.where(dropped[:, None, None], F.pad(null, (0, 0, 0, length - len(null))), features)
            mask = torch.where(dropped[:, None], torch.arange(length, device=null.device) < len(null), mask)
        return self.text(features), mask[:, None, None]

    def read(self, text: tuple[Tensor, Tensor | None] | None) -> list[Read | None]:
        """What each block attends to of `text_of`."""
        return [None if text is None else cast(Block, block).cross.read(*text) for block in self.blocks]

    def predictor(
        self, condition: Condition, rows: int, *, guided: bool = False, sampling: AutoregressiveSampling | None = None
    ) -> FlexTokARPredictor:
        settings = sampling or self.sampling
        assert isinstance(settings, FlexTokARSampling)
        dropped = None
        if guided:
            condition = condition.repeat(2)
            dropped = torch.arange(2 * rows, device=self.start.device) >= rows
            rows *= 2
        labels, text = self.classes_of(condition, rows, dropped), self.text_of(condition, rows, dropped)
        later = labels.clamp(min=0) if guided and settings.null_class == "first" and text is None else None
        return FlexTokARPredictor(self, labels, text, later)


class FlexTokARPredictor:
    """A FlexTokAR, its condition, and what it has read; a `Predictor`.

    later_labels: classes from the second token on that is chosen, where they change (`null_class`).
    """

    def __init__(
        self,
        model: FlexTokAR,
        labels: Tensor,
        text: tuple[Tensor, Tensor | None] | None,
        later_labels: Tensor | None = None,
    ) -> None:
        self.model, self.labels, self.later_labels = model, labels, later_labels
        self.read = model.read(text)
        self.caches = [KVCache(model.spec.length) for _ in model.blocks]
        self.first = torch.empty(0)

    def begin(self, tokens: Tensor) -> Tensor:
        self.first = tokens
        return self._run(self.model.embed(tokens, self.labels), 0)

    def __call__(self, tokens: Tensor, start: int) -> Tensor:
        if self.later_labels is not None:  # everything was read under another class
            self.labels, self.later_labels = self.later_labels, None
            self.begin(self.first[: len(self.labels)])
        positions = self.model.positions[start + 1 : start + 1 + tokens.shape[1]]
        return self._run(self.model.token_embedding(tokens) + positions, start + 1)

    def _run(self, x: Tensor, start: int) -> Tensor:
        for block, read, cache in zip(self.model.blocks, self.read, self.caches, strict=True):
            x = block(x, read, cache, start)
        return self.model.head(self.model.norm(x)).float()

    def keep(self, rows: int) -> None:
        self.labels = self.labels[:rows]
        self.later_labels = None if self.later_labels is None else self.later_labels[:rows]
        self.read = [None if read is None else read.keep(rows) for read in self.read]
        for cache in self.caches:
            cache.keep(rows)


@dataclass(frozen=True)
class Read:
    """What a block attends to of a text: keys and values (b, heads, l, width / heads), mask (b, 1, 1, l) or None."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None

    def keep(self, rows: int) -> Read:
        return Read(self.keys[:rows], self.values[:rows], None if self.mask is None else self.mask[:rows])


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to a text."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool, out_bias: bool) -> None:
        super().__init__()
        self.head_width = width // heads
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=out_bias)
        self.q_norm, self.k_norm = (
            nn.LayerNorm(self.head_width, bias=False) if qk_norm else nn.Identity() for _ in range(2)
        )

    def read(self, text: Tensor, mask: Tensor | None) -> Read:
        """Keys and values of a text (b, l, width)."""
        keys, values = (part.unflatten(-1, (-1, self.head_width)) for part in self.kv(text).chunk(2, dim=-1))
        return Read(self.k_norm(keys).transpose(1, 2), values.transpose(1, 2), mask)

    def forward(self, x: Tensor, read: Read) -> Tensor:
        """x: (b, m, width)."""
        q = self.q_norm(self.q(x).unflatten(-1, (-1, self.head_width))).transpose(1, 2)
        return self.out(attend(q, read.keys, read.values, attn_mask=read.mask))


class Block(nn.Module):
    """x + attention(norm(x)), x + cross-attention(norm(x)) where there is text, x + mlp(norm(x))."""

    def __init__(self, width: int, attn: CausalAttention, cross: CrossAttention | None, mlp: nn.Module) -> None:
        super().__init__()
        self.norm_1, self.attn = nn.LayerNorm(width, bias=False), attn
        if cross is not None:
            self.norm_2, self.cross = nn.LayerNorm(width, bias=False), cross
        self.norm_3, self.mlp = nn.LayerNorm(width, bias=False), mlp

    def forward(self, x: Tensor, read: Read | None, cache: KVCache | None = None, start: int = 0) -> Tensor:
        """x: (b, m, width), rows start…start + m − 1 of a sequence whose earlier ones `cache` holds."""
        x = x + self.attn(self.norm_1(x), cache=cache, start=start)
        if read is not None:
            x = x + self.cross(self.norm_2(x), read)
        return x + self.mlp(self.norm_3(x))


def _positions(grid: tuple[int, int], width: int) -> Tensor:
    """(n, width): nothing for the start; for the tokens, sines and cosines of their column, then of their row."""
    rows, columns = sincos(grid, width).flatten(0, 1)[:-1].chunk(2, dim=-1)
    return F.pad(torch.cat([columns, rows], dim=-1), (0, 0, 1, 0))
