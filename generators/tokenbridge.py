"""TokenBridge: MAR's masked autoencoder over a continuous tokenizer's tokens made discrete, which a head writes code by
code (Wang et al. 2025, arXiv:2503.16430).

indices (b, n, q), some tokens known -> the numbers they stand for -> masked autoencoder -> z (b, m, d) of the unknown
ones -> head: q codes of a token one after the other, each of 2^bits

Tokens are those of a `BridgedTokenizer`: one code a channel, in the order in which they are predicted. Body: mar.py,
head: heads/dimensions.py. Published weights and their names: smalti/published/tokenbridge.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smalti.generators.base import Condition, Generator, GeneratorOutput, refuse
from smalti.generators.decoding.choice import uniforms
from smalti.generators.decoding.filters import Filters
from smalti.generators.decoding.guidance import guide, scales_by_tokens
from smalti.generators.decoding.schedules import tokens_per_iteration
from smalti.generators.heads.dimensions import DimensionHead
from smalti.generators.mar import MaskedAutoencoder, check_mask_ratio, draw_known, draw_orders
from smalti.layers.attention import take
from smalti.settings import check_shares, check_sizes, override, read_settings
from smalti.tokenizers.quantizers.base import Draws
from smalti.tokenizers.spec import Tokens, TokenSpec


@dataclass(frozen=True)
class TokenBridgeSampling:
    """How `generate` goes from no token to all.

    iterations: in which all tokens are predicted, see `tokens_per_iteration`; at most as many as tokens, None: one
    token at a time, which is the published 256 of 256 tokens. temperature: of every code, 0: argmax. guidance: scale w
    of uncond + w · (cond − uncond) of what the head is given (z, not logits), 1 is none. guidance_schedule: "linear" or
    "constant", of `scales_by_tokens`. shifted_start: see `DimensionHead.sample`; published numbers were made with it.
    """

    iterations: int | None = None
    temperature: float = 1.0
    guidance: float = 1.0
    guidance_schedule: str = "linear"
    shifted_start: bool = False

    def __post_init__(self) -> None:
        check_sizes(iterations=self.iterations)
        Filters(self.temperature)
        scales_by_tokens(self.guidance, [1], self.guidance_schedule)


@dataclass(frozen=True)
class Iteration:
    """What one iteration did: indices (b, n, q), 0 where not known yet; `wanted` (b, m), the places it predicted, from
    z (b, m, d), guided; its guidance scale."""

    indices: Tensor
    wanted: Tensor
    z: Tensor
    scale: float


@dataclass(frozen=True)
class SampleDraws:
    """The random numbers of samples. order: (b, n) places, that of the token which is predicted first first. uniform:
    (b, n, q) in [0, 1), for the codes of the token at each place."""

    order: Tensor
    uniform: Tensor

    @classmethod
    def of(cls, seeds: Tensor, spec: TokenSpec, device: torch.device) -> SampleDraws:
        """Each sample's from its own seed alone."""
        order = uniforms(seeds, (spec.length,), "order").argsort(-1)
        return cls(order.to(device), uniforms(seeds, (spec.length, spec.depth), "codes").to(device))


class TokenBridge(Generator):
    """Sizes (width, depth, heads; head_width, head_depth, head_heads) of the published models: B 768, 12, 12; 768, 4,
    8. L 1024, 16, 16; 1024, 4, 8. H 1280, 20, 16; 1024, 6, 8.

    width, depth, heads, decoder_width, decoder_depth, decoder_heads, mlp_ratio, norm_eps, buffer, dropout,
    attention_dropout: of the body, see `MaskedAutoencoder`; mlp_ratio and norm_eps also of the head. num_classes: of
    labels, None: unconditional. mask_ratio_min: of training, the least share of tokens that are to be predicted.
    label_dropout: how often training hides the label, which guidance needs. head_width, head_depth, head_heads: of
    `DimensionHead`. sampling: fields of `TokenBridgeSampling`.
    """

    levels: Tensor

    def __init__(
        self,
        *,
        tokens: TokenSpec | Mapping[str, Any],
        num_classes: int | None = None,
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
        mask_ratio_min: float = 0.7,
        label_dropout: float = 0.1,
        head_width: int = 768,
        head_depth: int = 4,
        head_heads: int = 8,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tokens)
        check_shares(label_dropout=label_dropout)
        check_mask_ratio(mask_ratio_min)
        levels, v = self.spec.levels, self.spec.codebook_size
        assert levels is not None and v is not None  # see `accepts`
        self.num_classes, self.label_dropout, self.mask_ratio_min = num_classes, label_dropout, mask_ratio_min
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32), persistent=False)
        self.class_embedding = nn.Embedding((num_classes or 0) + 1, width)  # the last row stands for no class
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        self.body = MaskedAutoencoder(
            length=self.spec.length,
            dim=self.spec.dim,
            width=width,
            depth=depth,
            heads=heads,
            decoder_width=decoder_width,
            decoder_depth=decoder_depth,
            decoder_heads=decoder_heads,
            mlp_ratio=mlp_ratio,
            norm_eps=norm_eps,
            buffer=buffer,
            dropout=dropout,
            attention_dropout=attention_dropout,
        )
        self.head = DimensionHead(
            codes=self.spec.depth,
            codebook_size=v,
            condition_dim=self.body.out_width,
            width=head_width,
            depth=head_depth,
            heads=head_heads,
            mlp_ratio=mlp_ratio,
            norm_eps=norm_eps,
        )
        self.sampling = read_settings(TokenBridgeSampling, "sampling", sampling or {})
        self.iterations(self.sampling)

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        if spec.levels is None:
            kind = "continuous" if spec.kind == "continuous" else "other"
            way_out = {
                "continuous": "bridge that tokenizer first: python export.py bridge=TOKENIZER output=DIR",
                "other": "use one that was bridged (export.py bridge=DIR), or generator=maskgit",
            }
            raise refuse("TokenBridge", spec, "it predicts one code a channel of a bridged tokenizer", way_out[kind])

    @property
    def has_null(self) -> bool:
        return self.label_dropout > 0

    def classes_of(self, labels: Tensor) -> Tensor:
        """(b, width) of labels (b,), −1 for the null condition."""
        return self.class_embedding(labels.where(labels >= 0, self.num_classes or 0))

    def numbers(self, indices: Tensor) -> Tensor:
        """What the encoder reads of indices (b, n, q): the levels that they stand for, (b, n, q)."""
        return self.levels[indices]

    def forward(self, tokens: Tokens, condition: Condition, draws: Draws) -> GeneratorOutput:
        """Cross-entropy of the codes of unknown tokens, in nats, mean over codes and tokens."""
        indices = self.indices_of(tokens)
        labels = self.labels_of(condition, len(indices), indices.device)
        labels = labels.masked_fill(draws["label"] < self.label_dropout, -1)
        known, wanted = draws["order"].tensor_split([int(draws["lengths"])], dim=1)
        z = self.body.at(self.numbers(indices), known, wanted, self.classes_of(labels))
        loss = self.head.loss(take(indices, wanted).flatten(0, 1), z.flatten(0, 1)).mean()
        return GeneratorOutput({"cross_entropy": loss})

    def draw(self, batch_size: int, generator: torch.Generator, *, step: int) -> Draws:
        """ "order" (b, n), places in the order of prediction; "lengths" (), how many of the first ones are known, drawn
        once for the batch; "label" (b,) uniform, whether the label is hidden."""
        return {
            "order": draw_orders(batch_size, self.spec.length, generator),
            "lengths": draw_known(self.spec.length, generator, self.mask_ratio_min),
            "label": torch.rand(batch_size, generator=generator),
        }

    def iterations(self, settings: TokenBridgeSampling) -> list[int]:
        """How many tokens each iteration predicts. Raises ValueError for more iterations than tokens."""
        try:
            return tokens_per_iteration(self.spec.length, settings.iterations or self.spec.length)
        except ValueError as error:
            raise ValueError(f"sampling.{error}") from error

    @torch.inference_mode()
    def generate(
        self,
        condition: Condition,
        *,
        seeds: Tensor,
        length: int | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> Tokens:
        """A prefix of `length` tokens is cut from all. sampling: fields of `TokenBridgeSampling`, instead of those in
        `self.sampling`."""
        self.check_condition(condition)
        length = self.check_length(length)
        settings = override(self.sampling, "sampling", sampling)
        if not condition.empty:
            self.check_guidance(settings.guidance)
        device = self.class_embedding.weight.device
        draws = SampleDraws.of(seeds, self.spec, device)
        indices = torch.zeros(draws.uniform.shape, dtype=torch.int64, device=device)
        for iteration in self.decode(self.labels_of(condition, len(seeds), device), settings, draws):
            indices = iteration.indices
        return Tokens.full(None, indices).prefix(length)

    def decode(self, labels: Tensor, settings: TokenBridgeSampling, draws: SampleDraws) -> Iterator[Iteration]:
        """The iterations from no token to all, for labels (b,), −1 for the null condition."""
        counts = self.iterations(settings)
        scales = scales_by_tokens(settings.guidance, counts, settings.guidance_schedule)
        conditional = bool((labels >= 0).any())
        classes = self.classes_of(torch.cat([labels, torch.full_like(labels, -1)]))
        indices = torch.zeros(draws.uniform.shape, dtype=torch.int64, device=labels.device)
        done = 0
        for count, scale in zip(counts, scales, strict=True):
            known, wanted = draws.order[:, :done], draws.order[:, done : done + count]
            # Both branches are one batch of the body; the head sees one z, whatever the guidance.
            branches = 2 if scale != 1 and conditional else 1
            rows = len(labels) * branches
            seen, places = (x.repeat(branches, 1) for x in (known, wanted))
            z = self.body.at(self.numbers(indices).repeat(branches, 1, 1), seen, places, classes[:rows])
            z = guide(z, scale) if branches == 2 else z
            made = self.head.sample(
                z.flatten(0, 1),
                take(draws.uniform, wanted).flatten(0, 1),
                temperature=settings.temperature,
                shifted_start=settings.shifted_start,
            )
            made = made.view(*wanted.shape, -1)
            indices = indices.scatter(1, wanted[..., None].expand_as(made), made)
            done += count
            yield Iteration(indices, wanted, z, scale)

    def indices_of(self, tokens: Tokens) -> Tensor:
        """Indices (b, n, q); raises ValueError where a batch is not of the tokens that this was built for."""
        indices, shape = tokens.indices, (self.spec.length, self.spec.depth)
        if indices is None or tuple(indices.shape[1:]) != shape:
            given = None if indices is None else tuple(indices.shape)
            raise ValueError(
                f"tokens.indices of shape {given}: this generator was built for (b, {shape[0]}, {shape[1]})"
            )
        return indices
