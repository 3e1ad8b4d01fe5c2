"""FlexTok: an image as ordered tokens, of which any prefix decodes (Bachmann et al. 2025, arXiv:2502.13967).

image (b, 3, h, w) in [0, 1] -> latents (b, c, h, w) of a frozen VAE -> [patches, registers] -> transformer in which
register i sees the patches and registers 0…i -> registers -> latents (b, n, d) -> FSQ codes

codes -> tokens, hidden from the keep length on; noised latents -> patches; [patches, tokens] -> transformer, modulated
by the noise level, patches and tokens apart -> velocity (b, c, h, w) of a rectified flow (smalti/flow.py) -> VAE

The published code infers only; what trains is ours. It packs images of any size into one padded sequence; here equal
sizes make a dense batch, and lengths are masks. Published weights and their names: smalti/published/flextok.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smalti.flow import Guidance, NoiseLevels, add_noise, guided, sample
from smalti.layers.adaln import Block, ModulatedBlock, layer_norm, modulate
from smalti.layers.init import init_fan_in_, init_xavier_
from smalti.layers.masks import MODES, among_present, attention_mask
from smalti.layers.mlp import ProjectionHead
from smalti.layers.patches import patchify, unpatchify
from smalti.layers.positions import LearnedPositions, SinCosPositions
from smalti.layers.time import TimestepEmbedding
from smalti.settings import check_choice, check_sizes, read_settings
from smalti.tokenizers.base import Flow, Tokenizer, TokenizerOutput
from smalti.tokenizers.quantizers.base import Draws, Quantizer
from smalti.tokenizers.regularizers import Regularizer, draw_null, hide, kept_mask
from smalti.tokenizers.spec import Tokens, TokenSpec
from smalti.training.draws import generator as generator_of

Pair = tuple[int, int]


@dataclass(frozen=True)
class Positions:
    """Of patches. kind: "sincos"; "learned_sum", "learned_product": of a vector of the row and one of the column.

    grid: rows and columns of the table, by default as many as an image has. scaling, layout: of `SinCosPositions`.
    """

    kind: str = "sincos"
    grid: Sequence[int] | None = None
    scaling: str = "absolute"
    layout: str = "corrected"

    def __post_init__(self) -> None:
        check_choice("positions.kind", self.kind, ("sincos", "learned_sum", "learned_product"))
        if self.kind != "sincos" and (self.scaling, self.layout) != ("absolute", "corrected"):
            raise ValueError(f"positions.kind={self.kind} has neither scaling nor layout; leave them out")

    def build(self, grid: Pair, width: int) -> SinCosPositions | LearnedPositions:
        rows, columns = self.grid or grid
        if self.kind == "sincos":
            return SinCosPositions((rows, columns), width, scaling=self.scaling, layout=self.layout)
        if rows != columns:
            raise ValueError(f"positions.kind={self.kind} needs a square grid, not {rows} × {columns}")
        return LearnedPositions(rows, width, axes=2, combine=self.kind.removeprefix("learned_"))


@dataclass(frozen=True)
class Registers:
    """How many of the n registers an image gets, and which.

    ordering: k registers are the first k ("nested"), or all of them averaged to k ("avg_pool").
    sizes: what k is drawn from in training, all alike; None: n always, as published. at_inference: k; None: n.
    """

    ordering: str = "nested"
    sizes: Sequence[int] | None = None
    at_inference: int | None = None

    def __post_init__(self) -> None:
        check_choice("registers.ordering", self.ordering, ("nested", "avg_pool"))


@dataclass(frozen=True)
class Trunk:
    """A transformer. Published: 64 channels a head, width 64 · depth, everything else as it stands here.

    mask: who attends to whom (`attention_mask`). positions: of the patches.
    """

    width: int
    depth: int
    heads: int
    mask: str = "full"
    positions: Positions = field(default_factory=Positions)
    gated_mlp: bool = True
    mlp_ratio: float = 4.0
    mlp_bias: bool = False
    qk_norm: bool = True
    qkv_bias: bool = False
    proj_bias: bool = False

    def __post_init__(self) -> None:
        check_sizes(width=self.width, depth=self.depth, heads=self.heads)
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        check_choice("mask", self.mask, MODES)

    @property
    def block_options(self) -> dict[str, Any]:
        names = ("gated_mlp", "mlp_ratio", "mlp_bias", "qk_norm", "qkv_bias", "proj_bias")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class EncoderTrunk(Trunk):
    """With causal_last, register i does not depend on registers behind it."""

    mask: str = "causal_last"
    registers: Registers = field(default_factory=Registers)


@dataclass(frozen=True)
class DecoderTrunk(Trunk):
    """modulation_groups: 2, patches and tokens are modulated apart; 1, together.

    time_size, max_timestep: of `TimestepEmbedding`. token_positions: rows of the learned table, None: n.
    null: what stands for all tokens of an image when there is no condition: one vector at every position, "learned" or
    "zero"; "learned_single", the vector once, as the only token.
    """

    modulation_groups: int = 2
    time_size: int = 256
    max_timestep: float = 1000.0
    token_positions: int | None = None
    null: str = "learned"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("null", self.null, ("learned", "zero", "learned_single"))
        if self.modulation_groups not in (1, 2):
            raise ValueError(f"modulation_groups={self.modulation_groups} is neither 1 nor 2")


@dataclass(frozen=True)
class Features:
    """What a representation loss reads: the patches behind block `layer` (the first is 0), projected.

    dim: channels of the projection, of the representation that it shall resemble; None: not projected. hidden_layers,
    hidden_ratio, norm, bias: of the projection (`ProjectionHead`), which serves training only.
    """

    layer: int = 1
    dim: int | None = 1024
    hidden_layers: int = 2
    hidden_ratio: float = 4.0
    norm: bool = True
    bias: bool = True


@dataclass(frozen=True)
class Sampling:
    """How `decode` goes from noise to latents; settings of `smalti.flow` by their names there.

    steps: 20 to 25 published. guidance: the scale w of `Guidance`, 1 is none. apg: projected guidance, whose momentum,
    threshold and eta follow. rescale: share of `Guidance.rescale`.
    """

    steps: int = 25
    solver: str = "euler"
    guidance: float = 7.5
    apg: bool = True
    momentum: float = -0.5
    threshold: float = 2.5
    eta: float = 0.0
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampling.steps={self.steps} is not positive")
        check_choice("sampling.solver", self.solver, ("euler", "heun"))

    def rule(self) -> Guidance:
        return Guidance(self.guidance, self.apg, self.momentum, self.threshold, self.eta, self.rescale)


class FlexTok(Tokenizer):
    """An image of image_size² pixels as num_latent_tokens ordered tokens.

    vae: a frozen tokenizer of continuous tokens on a grid, whose latents are encoded and generated; None: pixels.
    quantizer: published: FSQ with levels 8, 8, 8, 5, 5, 5. encoder, decoder: fields of `EncoderTrunk`, `DecoderTrunk`.
    patch_size: side of the patches of latents (or pixels), or (rows, columns).
    regularizer: draws keep lengths in training; with one, prefixes can be decoded.
    null_dropout: how often training hides all tokens, which guidance needs (0.1 is ours; published: unknown).
    noise: fields of `NoiseLevels`. sampling: fields of `Sampling`; the attribute of that name may be changed later.
    repa: fields of `Features`, for an objective with a representation loss.
    init: "published": xavier-uniform weights, tables of 0.02, heads and modulations zero. "unit", for small models in
    short trainings: weights of fan_in^−½, tables of 1, latents that spread over the codes and gates that are half open
    from the start (published: shut).
    activation_checkpointing: compute blocks again in backward instead of keeping what they computed (published: on).
    """

    def __init__(
        self,
        *,
        image_size: int,
        vae: Tokenizer | None,
        num_latent_tokens: int,
        quantizer: Quantizer,
        encoder: Mapping[str, Any],
        decoder: Mapping[str, Any],
        patch_size: int | Sequence[int] = 2,
        regularizer: Regularizer | None = None,
        null_dropout: float = 0.1,
        noise: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
        repa: Mapping[str, Any] | None = None,
        init: str = "published",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if num_latent_tokens < 1:
            raise ValueError(f"num_latent_tokens={num_latent_tokens} is not positive")
        if not 0 <= null_dropout <= 1:
            raise ValueError(f"null_dropout={null_dropout} is not in [0, 1]")
        check_choice("init", init, ("published", "unit"))
        enc, dec = read_settings(EncoderTrunk, "encoder", encoder), read_settings(DecoderTrunk, "decoder", decoder)
        self.noise_levels = read_settings(NoiseLevels, "noise", noise or {})
        self.sampling = read_settings(Sampling, "sampling", sampling or {})
        if regularizer is not None:
            regularizer.check(num_latent_tokens)
        self.vae = None if vae is None else vae.requires_grad_(False).eval()
        self.latent_shape = _latent_shape(vae, image_size)  # (c, h, w)
        patch = (patch_size, patch_size) if isinstance(patch_size, int) else (patch_size[0], patch_size[1])
        grid = _grid(self.latent_shape, patch, image_size)
        channels = self.latent_shape[0]
        self.encoder = Encoder(enc, channels, grid, patch, num_latent_tokens, quantizer.input_dim)
        self.quantizer = quantizer
        features = None if repa is None else read_settings(Features, "repa", repa)
        self.decoder = Decoder(dec, channels, grid, patch, num_latent_tokens, quantizer.dim, features)
        self.encoder.checkpointing = self.decoder.checkpointing = activation_checkpointing
        self.encoder.reset_parameters(init)
        self.decoder.reset_parameters(init)
        self.regularizer, self.null_dropout = regularizer, null_dropout
        self.spec = TokenSpec(
            kind="continuous" if quantizer.codebook_size is None else "discrete",
            length=num_latent_tokens,
            dim=quantizer.dim,
            image_size=image_size,
            codebook_size=quantizer.codebook_size,
            depth=quantizer.depth,
            prefix_decodable=regularizer is not None,
        )

    @torch.inference_mode()
    def encode(self, images: Tensor, *, length: int | None = None, draws: Draws | None = None) -> Tokens:
        """images: (b, 3, image_size, image_size) float in [0, 1].

        length: how many tokens, 1…n. Where later registers do not change earlier ones (causal_last), only that many are
        computed: the tokens are the first ones of all n. draws: as made by `draw`, for a posterior sample of the VAE as
        the published code has it; without them its mean, and the same tokens always.
        """
        self.check_images(images)
        n, registers = self.spec.length, self.encoder.registers
        length = (registers.at_inference or n) if length is None else length
        if not 1 <= length <= n or (length < n and not self.spec.prefix_decodable):
            possible = f"1 to {n}" if self.spec.prefix_decodable else f"all {n} (it was trained without a regularizer)"
            raise ValueError(f"length={length}: this tokenizer has {possible}")
        count = length if self.encoder.nested or registers.sizes is not None else n
        quantized = self.quantizer(self.encoder(self._latents(images, draws), count))
        rest = n - count
        indices = quantized.indices
        if indices is not None:
            indices = F.pad(indices, (0, rest) if indices.ndim == 2 else (0, 0, 0, rest))
        return Tokens.full(F.pad(quantized.latents, (0, 0, 0, rest)), indices).prefix(length)

    @torch.inference_mode()
    def decode(self, tokens: Tokens, *, seed: int = 0, noise: Tensor | None = None, **sampling: Any) -> Tensor:
        """Images (b, 3, h, w) in [0, 1], clamped, from noise.

        noise: (b, c, h, w) standard normal; None: drawn for each image from `seed` and its place in the batch.
        sampling: fields of `Sampling`, instead of those in `self.sampling`.
        """
        if noise is None:
            noise = torch.empty(len(tokens), *self.latent_shape)
            for i, image in enumerate(noise):
                image.normal_(generator=generator_of("decode", seed, i))
        return self.to_images(self.sample_latents(tokens, noise, **sampling)).clamp(0, 1)

    def forward(self, images: Tensor, draws: Draws | None = None) -> TokenizerOutput:
        """`flow`, at one noise level an image. Raises ValueError without draws: a flow is trained on noise."""
        self.check_images(images)
        if draws is None:
            raise ValueError("a flow is trained on noise: pass draws=tokenizer.draw(batch_size, generator)")
        clean = self._latents(images, draws)
        counts = draws.get("registers")
        quantized = self.quantizer(self.encoder(clean, counts), _part(draws, "quantizer"))
        lengths = draws["lengths"]
        context = self.decoder.context(quantized.latents, lengths, draws["null"], counts)
        noised, target = add_noise(clean, draws["noise"].to(clean), draws["sigma"])
        velocity, features = self.decoder(noised, draws["sigma"], context)
        seen = lengths.to(velocity.device, non_blocking=True).masked_fill(draws["null"], 0)
        return TokenizerOutput(quantized, flow=Flow(velocity, target, draws["sigma"], seen, features))

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        """ "lengths" (b,) of kept tokens and "null" (b,) for none at all; "sigma" (b,) and "noise" (b, c, h, w) of the
        flow; "registers" (b,) where their number varies; "quantizer.…" and "vae.…", whatever those need."""
        n = self.spec.length
        draws = {"lengths": torch.full((batch_size,), n)}
        if self.regularizer is not None:
            draws |= self.regularizer.draw(batch_size, n, generator)
        draws["null"] = draw_null(batch_size, self.null_dropout, generator)
        draws["sigma"] = self.noise_levels.draw(batch_size, generator)
        draws["noise"] = torch.randn(batch_size, *self.latent_shape, generator=generator, device=generator.device)
        if self.encoder.registers.sizes is not None:
            sizes = torch.tensor(self.encoder.registers.sizes)
            draws["registers"] = sizes[torch.randint(len(sizes), (batch_size,), generator=generator)]
        draws |= _named(self.quantizer.draw(batch_size, n, generator), "quantizer")
        if self.vae is not None:
            draws |= _named(self.vae.draw(batch_size, generator), "vae")
        return draws

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.vae is not None:
            self.vae.eval()
        return self

    @property
    def features_dim(self) -> int | None:
        """Channels of the features that a training forward gives, None where it gives none."""
        return None if self.decoder.features_of is None else self.decoder.features_dim

    def leave_out_features(self) -> None:
        """For an objective that reads none: neither computed nor exported any more."""
        self.decoder.features_of = None
        self.decoder.projection = nn.Identity()
        self.arguments["repa"] = None

    def sample_latents(self, tokens: Tokens, noise: Tensor, **sampling: Any) -> Tensor:
        """The flow from noise (b, c, h, w) to latents under the kept tokens.

        Both branches of guidance are one batch; what does not depend on the noise level is computed once.
        """
        settings = replace(self.sampling, **sampling)
        codes, lengths = self.tokens_to_latents(tokens), self.kept(tokens)
        noise = noise.to(codes.device, torch.float32)
        guidance = settings.rule()
        if guidance.active:
            null = torch.arange(2 * len(codes), device=codes.device) >= len(codes)
            context = self.decoder.context(codes.repeat(2, 1, 1), lengths.repeat(2), null)
        else:
            context = self.decoder.context(codes, lengths)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            # All images are at the same noise level: one modulation serves them.
            return self.decoder(x, t[:1], context)[0].float()

        step = guided(velocity, guidance) if guidance.active else velocity
        return sample(step, noise, steps=settings.steps, solver=settings.solver) if len(codes) else noise

    def to_images(self, latents: Tensor) -> Tensor:
        """Latents (b, c, h, w) as images (b, 3, h, w) in about [0, 1]; those of a VAE as its `decode` gives them."""
        if self.vae is None:
            return (latents + 1) / 2
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(Tokens.full(rearrange(latents, "b c h w -> b (h w) c")))

    def _latents(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """(b, c, h, w) float32, of about unit variance, without gradient."""
        if self.vae is None:
            return 2 * images.float() - 1
        drawn = _part(draws or {}, "vae")
        with torch.autocast(images.device.type, enabled=False):
            given: dict[str, Any] = {"draws": drawn} if drawn else {}
            latents = self.vae.encode(images, **given).values.float()
        latents = rearrange(latents, "b (h w) c -> b c h w", h=self.latent_shape[1])
        # `encode` runs in inference mode, whose tensors no gradient may pass by; a copy is an ordinary tensor.
        return latents if torch.is_inference_mode_enabled() else latents.clone()


class RegisterTokens(nn.Module):
    """The encoder's learned input tokens (n, width)."""

    def __init__(self, n: int, width: int, settings: Registers) -> None:
        super().__init__()
        sizes = settings.sizes
        if sizes is not None and not all(1 <= size <= n for size in sizes):
            raise ValueError(f"registers.sizes={list(sizes)} are not all in 1…{n}")
        if settings.at_inference is not None and not 1 <= settings.at_inference <= n:
            raise ValueError(f"registers.at_inference={settings.at_inference} is not in 1…{n}")
        self.ordering, self.sizes, self.at_inference = settings.ordering, sizes, settings.at_inference
        self.tokens = nn.Parameter(torch.empty(n, width))

    def forward(self, count: int | Tensor | None = None) -> Tensor:
        """count: None, all n; a number k, (1, k, width); (b,) int64, (b, n, width), of which the first k_i count."""
        if count is None or (self.ordering == "nested" and isinstance(count, Tensor)):
            return self.tokens[None]
        if self.ordering == "nested":
            return self.tokens[None, :count]
        counts = count if isinstance(count, Tensor) else torch.tensor([count])
        pooled = _averaging(counts.to(self.tokens.device), len(self.tokens)).to(self.tokens) @ self.tokens
        return pooled if isinstance(count, Tensor) else pooled[:, :count]


class Encoder(nn.Module):
    """[patches, registers] through the transformer; the registers come out, normalised and projected to (b, k, d)."""

    checkpointing = False

    def __init__(self, size: EncoderTrunk, channels: int, grid: Pair, patch: Pair, n: int, d: int) -> None:
        super().__init__()
        self.mask, self.patch = size.mask, patch
        self.patch_embed = nn.Linear(channels * patch[0] * patch[1], size.width)
        self.positions = size.positions.build(grid, size.width)
        self.registers = RegisterTokens(n, size.width, size.registers)
        self.blocks = nn.ModuleList(Block(size.width, size.heads, **size.block_options) for _ in range(size.depth))
        self.head = nn.Linear(size.width, d)

    def reset_parameters(self, init: str) -> None:
        _init(self, init)
        if init == "published":
            nn.init.zeros_(self.head.weight)

    @property
    def nested(self) -> bool:
        """Whether the first k registers come out the same, however many there are."""
        return self.registers.ordering == "nested" and self.mask != "full"

    def patches(self, latents: Tensor) -> Tensor:
        """(b, c, h, w) as embedded patches (b, h', w', width) with their positions."""
        return _embed_patches(latents, self.patch, self.patch_embed, self.positions)

    def forward(self, latents: Tensor, count: int | Tensor | None = None) -> Tensor:
        """latents: (b, c, h, w). count: registers to take, a number or (b,); None: all n.

        Returns (b, k, d), or (b, n, d) of which the first k_i of each sample count.
        """
        patches = self.patches(latents).flatten(1, 2)
        registers = self.registers(count).expand(len(latents), -1, -1)
        sizes = (patches.shape[1], registers.shape[1])
        mask = attention_mask(sizes, self.mask, latents.device)
        if isinstance(count, Tensor):
            present = F.pad(kept_mask(count, sizes[1], latents.device), (sizes[0], 0), value=True)
            mask = among_present(mask, present)
        x = torch.cat([patches, registers.to(patches.dtype)], dim=1)
        *before, last = self.blocks
        for block in before:
            x = _run(block, self.checkpointing, x, mask)
        x = _run(last, self.checkpointing, x, mask, slice(sizes[0], None))  # nobody reads the patches
        return self.head(layer_norm(x))


@dataclass(frozen=True)
class Context:
    """What the decoder knows of an image whatever the noise level: tokens (b, n, width) with positions, hidden where
    they are not kept; present (b, n) bool, which of them exist, None: all."""

    tokens: Tensor
    present: Tensor | None = None


class Decoder(nn.Module):
    """[noised patches, tokens] through the modulated transformer; the patches come out as a velocity."""

    checkpointing = False

    def __init__(
        self, size: DecoderTrunk, channels: int, grid: Pair, patch: Pair, n: int, d: int, features: Features | None
    ) -> None:
        super().__init__()
        width = size.width
        self.mask, self.patch, self.groups, self.null = size.mask, patch, size.modulation_groups, size.null
        self.token_embed = nn.Linear(d, width)
        self.token_positions = LearnedPositions(size.token_positions or n, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        if size.null != "zero":
            self.null_token = nn.Parameter(torch.empty(width))
        self.patch_embed = nn.Linear(channels * patch[0] * patch[1], width)
        self.positions = size.positions.build(grid, width)
        self.time = TimestepEmbedding(width, size.time_size, size.max_timestep)
        self.blocks = nn.ModuleList(
            ModulatedBlock(width, size.heads, self.groups, **size.block_options) for _ in range(size.depth)
        )
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, channels * patch[0] * patch[1])
        self.features_of: int | None = None
        if features is not None:
            if not 0 <= features.layer < size.depth:
                raise ValueError(f"repa.layer={features.layer}: the decoder has blocks 0 to {size.depth - 1}")
            self.features_of = features.layer
            self.features_dim = width if features.dim is None else features.dim
            self.projection: nn.Module = nn.Identity()
            if features.dim is not None:
                layers, options = features.hidden_layers + 1, {"norm": features.norm, "bias": features.bias}
                self.projection = ProjectionHead(
                    width, features.dim, layers=layers, ratio=features.hidden_ratio, **options
                )

    def reset_parameters(self, init: str) -> None:
        _init(self, init)
        for block in self.blocks:
            assert isinstance(block, ModulatedBlock)
            nn.init.zeros_(block.modulation.weight)
            if init == "unit":
                block.open_gates_(0.5)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.head.weight)

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (b, n, d) as tokens (b, n, width) with their positions."""
        return self.token_embed(codes.to(self.token_embed.weight.dtype)) + self.token_positions(codes.shape[1])

    def context(
        self,
        codes: Tensor,
        lengths: Tensor | None = None,
        null: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Context:
        """codes: (b, n, d). lengths: (b,) how many to keep, None: all. null: (b,) bool, images without condition.

        Hidden tokens are all the same vector, without a position. counts: (b,) how many codes an image has at all.
        """
        tokens = self.embed(codes)
        n, device = tokens.shape[1], tokens.device
        if lengths is not None:
            tokens = hide(tokens, lengths, self.mask_token)
        present = None if counts is None else kept_mask(counts, n, device)
        if null is not None:
            vector = torch.zeros_like(tokens[0, 0]) if self.null == "zero" else self.null_token.to(tokens.dtype)
            tokens = torch.where(null[:, None, None], vector, tokens)
            if self.null == "learned_single":
                first = torch.arange(n, device=device) == 0
                present = torch.ones_like(tokens[..., 0], dtype=torch.bool) if present is None else present
                present = torch.where(null[:, None], first, present)
        return Context(tokens, present)

    def patches(self, noised: Tensor) -> Tensor:
        """(b, c, h, w) as embedded patches (b, h', w', width) with their positions."""
        return _embed_patches(noised, self.patch, self.patch_embed, self.positions)

    def forward(self, noised: Tensor, sigma: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """noised: (b, c, h, w), sigma: (b,) or (1,) noise levels in [0, 1], 1 is noise alone.

        Returns the velocity (b, c, h, w), and features (b, h'·w', …) where a representation loss asks for them.
        """
        grid = self.patches(noised)
        tokens = context.tokens.to(grid.dtype)
        rows, patches, n = grid.shape[1], grid.shape[1] * grid.shape[2], tokens.shape[1]
        mask = attention_mask((patches, n), self.mask, noised.device)
        if context.present is not None:
            mask = among_present(mask, F.pad(context.present, (patches, 0), value=True))
        condition = F.silu(self.time(sigma))
        sizes = (patches, n) if self.groups == 2 else (patches + n,)
        x = torch.cat([grid.flatten(1, 2), tokens], dim=1)
        features = None
        for layer, block in enumerate(self.blocks):
            keep = patches if layer == len(self.blocks) - 1 else None  # nobody reads the tokens
            x = _run(block, self.checkpointing, x, condition, sizes, mask, keep)
            if layer == self.features_of and torch.is_grad_enabled():
                features = self.projection(x[:, :patches])
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        x = self.head(modulate(layer_norm(x), shift, scale, (patches,)))
        return unpatchify(rearrange(x, "b (h w) d -> b h w d", h=rows), self.patch), features


def _embed_patches(x: Tensor, patch: Pair, embed: nn.Linear, positions: nn.Module) -> Tensor:
    embedded = embed(patchify(x.to(embed.weight.dtype), patch))
    return embedded + positions(*embedded.shape[1:3]).to(embedded.dtype)


def _run(block: nn.Module, again: bool, *inputs: Any) -> Tensor:
    """A block, whose inner values are computed again in backward when `again`."""
    if again and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


def _averaging(counts: Tensor, n: int) -> Tensor:
    """(b, n, n) matrices whose first k rows average n vectors to k, as adaptive average pooling does; the rest is 0."""
    i, k = torch.arange(n, device=counts.device), counts[:, None]
    start, end = i * n // k, -((-(i + 1) * n) // k)
    inside = (i >= start[..., None]) & (i < end[..., None]) & (i < k)[..., None]
    return inside / (end - start)[..., None]


@torch.no_grad()
def _init(tower: Encoder | Decoder, init: str) -> None:
    """Weights by the rule, biases zero; tables and lone vectors normal, of 0.02 or 1 ("unit")."""
    (init_xavier_ if init == "published" else init_fan_in_)(tower)
    for name, parameter in tower.named_parameters():
        if name.rpartition(".")[2] in ("tables", "tokens", "mask_token", "null_token"):
            nn.init.trunc_normal_(parameter, std=0.02 if init == "published" else 1.0)


def _latent_shape(vae: Tokenizer | None, image_size: int) -> tuple[int, int, int]:
    if vae is None:
        return 3, image_size, image_size
    spec = vae.spec
    if spec.kind != "continuous" or spec.grid is None:
        raise ValueError(
            f"vae={type(vae).__name__} gives {spec.kind} tokens, grid={spec.grid}; give one of latents on a grid"
        )
    if spec.image_size != image_size:
        raise ValueError(f"image_size={image_size} but the vae is for {spec.image_size}; use that, or another vae")
    return spec.dim, *spec.grid


def _grid(shape: tuple[int, int, int], patch: Pair, image_size: int) -> Pair:
    if shape[1] % patch[0] or shape[2] % patch[1]:
        raise ValueError(
            f"patch_size={list(patch)} does not divide the {shape[1]} × {shape[2]} latents of image_size={image_size}"
        )
    return shape[1] // patch[0], shape[2] // patch[1]


def _named(draws: Draws, part: str) -> Draws:
    return {f"{part}.{name}": value for name, value in draws.items()}


def _part(draws: Draws, part: str) -> Draws:
    """The draws of a part, without its name before theirs; empty where there are none."""
    return {name.removeprefix(f"{part}."): value for name, value in draws.items() if name.startswith(f"{part}.")}
