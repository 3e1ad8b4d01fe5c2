"""MAR: continuous tokens, several at a time and in any order, each from a small diffusion (Li et al. 2024,
arXiv:2406.11838).

tokens (b, n, c), some of them known -> masked autoencoder -> z (b, m, d) of the unknown ones -> head: p(token | z)

The encoder sees known tokens only, the decoder all places; both see both ways. `MaskedAutoencoder` is that body, which
TokenBridge shares; `CausalTransformer` is the body of the paper's autoregressive variants. Heads: generators/heads/.
Published weights and their names: smalti/published/mar.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from smalti.generators.base import Condition, Generator, GeneratorOutput, accept_latents, latents_of
from smalti.generators.decoding.choice import normals, uniforms
from smalti.generators.decoding.guidance import scales_by_tokens
from smalti.generators.decoding.schedules import mask_ratio, tokens_per_iteration
from smalti.generators.heads.base import Head, HeadSampling, Noise
from smalti.generators.heads.diffusion import DiffusionHead
from smalti.generators.heads.flow import FlowHead
from smalti.layers.attention import CausalAttention, SelfAttention, take
from smalti.layers.cache import KVCache
from smalti.layers.mlp import MLP
from smalti.settings import check_choice, check_shares, check_sizes, override, read_settings
from smalti.tokenizers.quantizers.base import Draws
from smalti.tokenizers.spec import Tokens, TokenSpec

HEADS: dict[str, type[Head]] = {"diffusion": DiffusionHead, "flow": FlowHead}
Predictor = Callable[[Tensor, Tensor, int, int], Tensor]  # see `MaskedAutoencoder.predictor`


@dataclass(frozen=True)
class MARSampling(HeadSampling):
    """How `generate` goes from no token to all; further fields as of `HeadSampling`.

    iterations: in which all tokens are predicted, see `tokens_per_iteration`; at most as many as tokens, None: one
    token at a time, which is the published 256 of MAR's 256 tokens. guidance: scale w of uncond + w · (cond − uncond)
    of what the head's network says, 1 is none. guidance_schedule: "linear" or "constant", of `scales_by_tokens`.
    """

    iterations: int | None = None
    guidance: float = 1.0
    guidance_schedule: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(iterations=self.iterations)
        scales_by_tokens(self.guidance, [1], self.guidance_schedule)


@dataclass(frozen=True)
class Iteration:
    """What one iteration did: tokens (b, n, c), 0 where not known yet; `wanted` (b, m), the places it predicted, from z
    (b, m, d), or (2b, m, d) under guidance, with the conditional rows first; its guidance scale."""

    tokens: Tensor
    wanted: Tensor
    z: Tensor
    scale: float


class SampleDraws:
    """The random numbers of samples, each sample's from its own seed alone.

    order: (b, n), the places of tokens, that of the one which is predicted first first.
    """

    def __init__(self, seeds: Tensor, n: int, channels: int, device: torch.device, order: str) -> None:
        self.seeds, self.channels, self.device = seeds, channels, device
        if order == "random":
            self.order = uniforms(seeds, (n,), "order").argsort(-1).to(device)
        else:
            self.order = torch.arange(n, device=device).expand(len(seeds), -1)

    def noise(self, iteration: int, wanted: Tensor, steps: int) -> Noise:
        """The head's numbers in an iteration of so many steps, a row for each of the wanted tokens (b, m)."""

        @cache  # all of an iteration's at once, and those of steps only where steps add noise
        def numbers(kind: str, count: int) -> tuple[Tensor, ...]:
            shape = (count, wanted.shape[1], self.channels)
            return normals(self.seeds, shape, kind, iteration).to(self.device).transpose(0, 1).flatten(1, 2).unbind(0)

        return lambda k: numbers("start", 1)[0] if k == 0 else numbers("steps", steps - 1)[k - 1]


class MAR(Generator):
    """Sizes (width, depth, heads; head_depth, head_width) of the published models: B 768, 12, 12; 6, 1024. L 1024, 16,
    16; 8, 1280. H 1280, 20, 16; 12, 1536.

    width, depth, heads, decoder_width, decoder_depth, decoder_heads, mlp_ratio, norm_eps, buffer, dropout,
    attention_dropout: of the body, see `MaskedAutoencoder`. num_classes: of labels, None: unconditional.
    patch_size: side p of squares of the grid that are one token of p² · c channels.
    attention: "bidirectional", or "causal", the paper's AR: no encoder, a decoder as deep as both, one token after the
    other. order: "random", or "raster", in which tokens are predicted, in training and sampling.
    mask_ratio_min: of training, the least share of tokens that are to be predicted (bidirectional).
    label_dropout: how often training hides the label, which guidance needs.
    head: "diffusion" or "flow", of head_width and head_depth. loss_repeats: how often the head's loss is drawn for each
    token and z. sampling: fields of `MARSampling`.
    """

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
        patch_size: int = 1,
        attention: str = "bidirectional",
        order: str = "random",
        mask_ratio_min: float = 0.7,
        label_dropout: float = 0.1,
        head: str = "diffusion",
        head_width: int = 1024,
        head_depth: int = 6,
        loss_repeats: int = 4,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tokens)
        check_choice("attention", attention, ("bidirectional", "causal"))
        check_choice("order", order, ("random", "raster"))
        check_choice("head", head, HEADS)
        check_sizes(patch_size=patch_size, loss_repeats=loss_repeats, head_width=head_width, head_depth=head_depth)
        check_shares(label_dropout=label_dropout)
        check_mask_ratio(mask_ratio_min)
        self.num_classes, self.label_dropout = num_classes, label_dropout
        self.patch_size, self.order, self.causal = patch_size, order, attention == "causal"
        self.mask_ratio_min, self.loss_repeats = mask_ratio_min, loss_repeats
        self.n, self.channels = self.places()
        options: dict[str, Any] = {"length": self.n, "dim": self.channels, "width": width, "depth": depth}
        options |= {"heads": heads, "mlp_ratio": mlp_ratio, "norm_eps": norm_eps, "buffer": buffer}
        options |= {"dropout": dropout, "attention_dropout": attention_dropout}
        decoder: dict[str, Any] = {
            "decoder_width": decoder_width,
            "decoder_depth": decoder_depth,
            "decoder_heads": decoder_heads,
        }
        self.body: MaskedAutoencoder | CausalTransformer
        if not self.causal:
            self.body = MaskedAutoencoder(**options, **decoder)
        elif given := [name for name, value in decoder.items() if value is not None]:
            raise ValueError(
                f"{given[0]}={decoder[given[0]]} with attention=causal, which has no decoder; leave it out"
            )
        else:
            self.body = CausalTransformer(**{**options, "depth": 2 * depth}, target_aware=order == "random")
        self.class_embedding = nn.Embedding((num_classes or 0) + 1, width)  # the last row stands for no class
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        self.head = HEADS[head](
            dim=self.channels, condition_dim=self.body.out_width, width=head_width, depth=head_depth
        )
        self.sampling = read_settings(MARSampling, "sampling", sampling or {})
        self.check_sampling()

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        accept_latents("MAR", spec)

    @property
    def has_null(self) -> bool:
        return self.label_dropout > 0

    def check_sampling(self) -> None:
        self.iterations(self.sampling)

    def places(self) -> tuple[int, int]:
        """How many tokens the body sees, and their channels. Raises ValueError where patches do not fit."""
        p, grid = self.patch_size, self.spec.grid
        if p == 1:
            return self.spec.length, self.spec.dim
        if grid is None:
            raise ValueError(f"patch_size={p}: these tokens have no grid; use 1")
        if grid[0] % p or grid[1] % p:
            raise ValueError(f"patch_size={p} does not divide the grid of {grid[0]} × {grid[1]} tokens")
        return self.spec.length // p**2, self.spec.dim * p**2

    def patchify(self, latents: Tensor) -> Tensor:
        """(b, n, d) of the tokenizer as (b, n / p², p² · d) of the body: channel, then row and column in the patch."""
        if self.patch_size == 1:
            return latents
        return rearrange(latents, "b (h i w j) c -> b (h w) (c i j)", **self._axes())

    def unpatchify(self, patches: Tensor) -> Tensor:
        """The inverse of `patchify`."""
        if self.patch_size == 1:
            return patches
        return rearrange(patches, "b (h w) (c i j) -> b (h i w j) c", **self._axes())

    def _axes(self) -> dict[str, int]:
        assert self.spec.grid is not None  # see `places`
        p, (h, w) = self.patch_size, self.spec.grid
        return {"i": p, "j": p, "h": h // p, "w": w // p}

    def classes_of(self, labels: Tensor) -> Tensor:
        """(b, width) of labels (b,), −1 for the null condition."""
        return self.class_embedding(labels.where(labels >= 0, self.num_classes or 0))

    def forward(self, tokens: Tokens, condition: Condition, draws: Draws) -> GeneratorOutput:
        """The head's loss, mean of the unknown tokens and of the numbers drawn for each."""
        latents = self.patchify(latents_of(tokens, self.spec))
        labels = self.labels_of(condition, len(latents), latents.device)
        labels = labels.masked_fill(draws["label"] < self.label_dropout, -1)
        known, wanted = draws["order"].tensor_split([int(draws["lengths"])], dim=1)
        z = self.body.at(latents, known, wanted, self.classes_of(labels))
        target, z = (x.flatten(0, 1).repeat(self.loss_repeats, 1) for x in (take(latents, wanted), z))
        return GeneratorOutput({"head": self.head.loss(target, z, draws).mean()})

    def draw(self, batch_size: int, generator: torch.Generator, *, step: int) -> Draws:
        """ "order" (b, n), places in the order of prediction; "lengths" (), how many of the first ones are known, drawn
        once for the batch; "label" (b,) uniform, whether the label is hidden; and the head's own."""
        order = draw_orders(batch_size, self.n, generator, self.order)
        known = (
            torch.zeros((), dtype=torch.int64) if self.causal else draw_known(self.n, generator, self.mask_ratio_min)
        )
        rows = self.loss_repeats * batch_size * (self.n - int(known))
        label = torch.rand(batch_size, generator=generator)
        return {"order": order, "lengths": known, "label": label, **self.head.draw(rows, generator)}

    def iterations(self, settings: MARSampling) -> list[int]:
        """How many tokens each iteration predicts. Raises ValueError for settings that this model does not have."""
        try:
            self.head.check(settings)
            counts = tokens_per_iteration(self.n, settings.iterations or self.n)
            if self.causal and len(counts) != self.n:
                raise ValueError(f"iterations={len(counts)}: attention=causal predicts one token at a time; use null")
        except ValueError as error:
            raise ValueError(f"sampling.{error}") from error
        return counts

    @torch.inference_mode()
    def generate(
        self,
        condition: Condition,
        *,
        seeds: Tensor,
        length: int | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> Tokens:
        """A prefix of `length` tokens is cut from all. sampling: fields of `MARSampling`, instead of those in
        `self.sampling`."""
        self.check_condition(condition)
        length = self.check_length(length)
        settings = override(self.sampling, "sampling", sampling)
        if not condition.empty:
            self.check_guidance(settings.guidance)
        device = self.class_embedding.weight.device
        draws = SampleDraws(seeds, self.n, self.channels, device, self.order)
        made = torch.zeros(len(seeds), self.n, self.channels, device=device)
        for iteration in self.decode(self.labels_of(condition, len(seeds), device), settings, draws):
            made = iteration.tokens
        return Tokens.full(self.unpatchify(made)).prefix(length)

    def decode(self, labels: Tensor, settings: MARSampling, draws: SampleDraws) -> Iterator[Iteration]:
        """The iterations from no token to all, for labels (b,), −1 for the null condition."""
        counts = self.iterations(settings)
        scales = scales_by_tokens(settings.guidance, counts, settings.guidance_schedule)
        guided = any(scale != 1 for scale in scales) and bool((labels >= 0).any())
        branches = 2 if guided else 1  # of one batch
        predict = self.body.predictor(self.classes_of(torch.cat([labels, torch.full_like(labels, -1)][:branches])))
        tokens = torch.zeros(*draws.order.shape, self.channels, device=labels.device)
        known = 0
        for s, (count, scale) in enumerate(zip(counts, scales, strict=True)):
            z = predict(tokens.repeat(branches, 1, 1), draws.order.repeat(branches, 1), known, count)
            wanted, chosen = draws.order[:, known : known + count], settings.at(s, len(counts))
            steps = chosen.steps if isinstance(chosen.steps, int) else sum(chosen.steps)
            made = self.head.sample(
                z.flatten(0, 1),
                noise=draws.noise(s, wanted, steps),
                sampling=chosen,
                guidance=scale if guided else 1.0,
            )
            places = wanted[..., None].expand(-1, -1, self.channels)
            tokens = tokens.scatter(1, places, made.view(places.shape).to(tokens))
            known += count
            yield Iteration(tokens, wanted, z, scale)


def check_mask_ratio(mask_ratio_min: float) -> None:
    """Raises ValueError unless it is a share of tokens, and not 0."""
    if not 0 < mask_ratio_min <= 1:
        raise ValueError(f"mask_ratio_min={mask_ratio_min} is not in (0, 1]")


def draw_orders(b: int, n: int, generator: torch.Generator, order: str = "random") -> Tensor:
    """(b, n) int64, the places of tokens in the order of their prediction: a permutation for each sample, or all in
    "raster" order."""
    if order == "raster":
        return torch.arange(n).expand(b, -1)
    return torch.rand(b, n, generator=generator).argsort(-1)


def draw_known(n: int, generator: torch.Generator, mask_ratio_min: float) -> Tensor:
    """() int64: how many of n tokens a batch's encoder sees, by one draw of `mask_ratio`."""
    ratio = mask_ratio(torch.rand((), generator=generator, dtype=torch.float64), mask_ratio_min)
    return torch.tensor(known_tokens(n, float(ratio)))


def known_tokens(n: int, ratio: float) -> int:
    """Tokens of n that are not masked; the number of masked ones is rounded up."""
    return n - math.ceil(n * ratio)


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

    def predictor(self, classes: Tensor) -> Predictor:
        """For sampling: (tokens (b, n, c), order (b, n), known, count) -> z (b, count, out_width) of those places of
        `order` that come behind the `known` first ones. classes: (b, width), embedded."""
        return lambda tokens, order, known, count: self.at(
            tokens, order[:, :known], order[:, known : known + count], classes
        )

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


class CausalTransformer(nn.Module):
    """The body of the paper's autoregressive variants: z of each token from those before it in an order.

    [class in `buffer` slots, token 0 … token n − 2], in the order of prediction; the last slot says what token 0 is. No
    encoder; further arguments as of `MaskedAutoencoder`. target_aware: a token also carries the place of the one that
    follows it, which a transformer cannot know where orders are random.
    Source: arXiv:2406.11838, section 3.4 and Table 1; its code is not published, so that details are ours.
    """

    def __init__(
        self,
        *,
        length: int,
        dim: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        norm_eps: float,
        buffer: int,
        dropout: float,
        attention_dropout: float,
        target_aware: bool,
    ) -> None:
        super().__init__()
        check_sizes(length=length, dim=dim, width=width, depth=depth, heads=heads, buffer=buffer)
        check_shares(dropout=dropout, attention_dropout=attention_dropout)
        self.length, self.buffer, self.out_width = length, buffer, width
        self.embed = nn.Linear(dim, width)
        self.positions = nn.Parameter(torch.empty(buffer + length, width))
        self.target_positions = nn.Parameter(torch.empty(length, width)) if target_aware else None
        self.input_norm = nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(
                width,
                CausalAttention(width, heads, qkv_bias=True, out_bias=True, dropout=attention_dropout),
                mlp_ratio=mlp_ratio,
                norm_eps=norm_eps,
                dropout=dropout,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.output_positions = nn.Parameter(torch.empty(length, width))
        init_(self)

    def at(self, tokens: Tensor, known: Tensor, wanted: Tensor, classes: Tensor) -> Tensor:
        """z (b, m, width) at the `wanted` places (b, m), which come behind the `known` ones (b, k): each in view of all
        tokens before it, wanted ones included. tokens: (b, n, c); classes: (b, width), embedded."""
        order = torch.cat([known, wanted], dim=1)
        x = torch.cat([self.start(classes, order[:, :1]), self.rows(tokens, order[:, :-1], order[:, 1:])], dim=1)
        x = self.trunk(x)[:, self.buffer - 1 + known.shape[1] :]
        return x + F.embedding(wanted, self.output_positions)

    def predictor(self, classes: Tensor) -> Predictor:
        """As of `MaskedAutoencoder`, for one token at a time, and each is computed once."""
        caches = [KVCache(self.buffer + self.length - 1) for _ in self.blocks]

        def predict(tokens: Tensor, order: Tensor, known: int, count: int) -> Tensor:
            wanted = order[:, known : known + count]
            if known == 0:
                x = self.trunk(self.start(classes, wanted), caches=caches)[:, -1:]
            else:
                row = self.rows(tokens, order[:, known - 1 : known], wanted)
                x = self.trunk(row, self.buffer + known - 1, caches)
            return x + F.embedding(wanted, self.output_positions)

        return predict

    def start(self, classes: Tensor, first: Tensor) -> Tensor:
        """The slots (b, buffer, width); first: (b, 1), the place of the first token."""
        x = classes[:, None] + self.positions[: self.buffer]
        return torch.cat([x[:, :-1], self.aim(x[:, -1:], first)], dim=1)

    def rows(self, tokens: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        """Tokens (b, n, c) at places (b, m), which the tokens at `targets` (b, m) follow; (b, m, width)."""
        x = self.embed(take(tokens, places)) + F.embedding(places, self.positions[self.buffer :])
        return self.aim(x, targets)

    def aim(self, x: Tensor, targets: Tensor) -> Tensor:
        return x if self.target_positions is None else x + F.embedding(targets, self.target_positions)

    def trunk(self, x: Tensor, start: int = 0, caches: list[KVCache] | None = None) -> Tensor:
        """Blocks over rows start…start + m − 1, (b, m, width). caches: one a block, of earlier rows."""
        x = self.input_norm(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache=None if caches is None else caches[layer], start=start)
        return self.norm(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on what is added. x: (b, n, width)."""

    def __init__(
        self, width: int, attn: nn.Module, *, mlp_ratio: float = 4.0, norm_eps: float = 1e-6, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=norm_eps), attn
        self.norm2, self.mlp = nn.LayerNorm(width, eps=norm_eps), MLP(width, int(mlp_ratio * width), dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, keep: Tensor | None = None, **attention: Any) -> Tensor:
        """With `keep` (b, m), only the tokens at these places come out, which still attend to all. attention: further
        arguments of a `CausalAttention`."""
        if keep is not None:
            attention["keep"] = keep
        y = self.attn(self.norm1(x), **attention)
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
