"""VQ-GAN: an image as a grid of codes (Esser et al. 2021, arXiv:2012.09841) in LlamaGen's form (arXiv:2406.06525).

image (b, 3, h, w) in [0, 1] -> [−1, 1] -> convolutions, halved between levels -> 1×1 -> latents (b, n, d) -> codes
-> 1×1 -> convolutions, doubled between levels -> image. Attention at the coarsest level only.

Five levels (1, 1, 2, 2, 4) make codes of 16 × 16 pixels (f16), four (1, 2, 2, 4) of 8 × 8 (f8). The codebook is small
in width and large in number, 16,384 × 8, and compared by angle: `VectorQuantizer(distance="cosine", init="unit")`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from smalti.layers.convolution import group_norm
from smalti.tokenizers.base import Tokenizer, TokenizerOutput
from smalti.tokenizers.quantizers.base import Draws, Quantizer
from smalti.tokenizers.quantizers.kl import GaussianQuantizer
from smalti.tokenizers.spec import Tokens, TokenSpec


class VQGAN(Tokenizer):
    """image_size: side in pixels, a multiple of 2^(levels − 1); the network itself takes any such size.

    channels: width at full resolution; channel_mult: its factor at each level, finest first; decoder_channel_mult: of
    the decoder, null: the same. num_res_blocks: of each level of the encoder; the decoder has one more.
    z_channels: between the networks and the 1×1 convolutions to and from the quantizer's dim. norm_groups: of every
    group normalisation. dropout: in residual blocks (0 in every published recipe).
    """

    def __init__(
        self,
        *,
        image_size: int,
        quantizer: Quantizer,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4),
        decoder_channel_mult: Sequence[int] | None = None,
        num_res_blocks: int = 2,
        z_channels: int = 256,
        norm_groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        decoder_channel_mult = channel_mult if decoder_channel_mult is None else decoder_channel_mult
        if len(decoder_channel_mult) != len(channel_mult):
            raise ValueError(
                f"decoder_channel_mult={list(decoder_channel_mult)} has {len(decoder_channel_mult)} levels and "
                f"channel_mult={list(channel_mult)} {len(channel_mult)}; give both the same number, or null"
            )
        factor = 2 ** (len(channel_mult) - 1)
        if image_size < factor or image_size % factor:
            below = max(image_size // factor, 1) * factor
            raise ValueError(
                f"image_size={image_size} is not a multiple of {factor} (channel_mult has {len(channel_mult)} levels); "
                f"use {below} or {below + factor}"
            )
        sizes: dict[str, Any] = {"channels": channels, "z_channels": z_channels, "groups": norm_groups}
        sizes |= {"dropout": dropout}
        self.encoder = Encoder(channel_mult, blocks=num_res_blocks, **sizes)
        self.quant_conv = nn.Conv2d(z_channels, quantizer.input_dim, 1)
        self.quantizer = quantizer
        self.post_quant_conv = nn.Conv2d(quantizer.dim, z_channels, 1)
        self.decoder = Decoder(decoder_channel_mult, blocks=num_res_blocks + 1, **sizes)
        grid = image_size // factor
        self.spec = TokenSpec(
            kind="continuous" if quantizer.codebook_size is None else "discrete",
            length=grid * grid,
            dim=quantizer.dim,
            image_size=image_size,
            codebook_size=quantizer.codebook_size,
            depth=quantizer.depth,
            grid=(grid, grid),
        )

    @property
    def last_layer(self) -> Tensor:
        """The weight that makes the pixels, for adversarial terms that are weighed by gradients."""
        return self.decoder.conv_out.weight

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tokens:
        """images: (b, 3, h, w) float in [0, 1]. Tokens are row-major; a Gaussian bottleneck gives its mean, scaled."""
        self.check_images(images)
        return self.scaled(self.quantizer(rearrange(self.features(images), "b d h w -> b (h w) d")))

    @property
    def has_posterior(self) -> bool:
        return isinstance(self.quantizer, GaussianQuantizer)

    @torch.inference_mode()
    def moments_of(self, images: Tensor) -> Tensor:
        if not self.has_posterior:
            return super().moments_of(images)
        self.check_images(images)
        return rearrange(self.features(images), "b d h w -> b (h w) d")

    @torch.inference_mode()
    def decode(self, tokens: Tokens, *, seed: int = 0) -> Tensor:
        """Images (b, 3, h, w) in [0, 1]. Indices are looked up where there are any. Draws nothing: no `seed` used."""
        assert self.spec.grid is not None
        latents = self.tokens_to_latents(tokens)
        return self.pixels(rearrange(latents, "b (h w) d -> b d h w", h=self.spec.grid[0])).clamp(0, 1)

    def forward(self, images: Tensor, draws: Draws | None = None) -> TokenizerOutput:
        self.check_images(images)
        features = self.features(images)
        quantized = self.quantizer(rearrange(features, "b d h w -> b (h w) d"), draws)
        latents = rearrange(quantized.latents, "b (h w) d -> b d h w", h=features.shape[2])
        return TokenizerOutput(quantized, reconstruction=self.pixels(latents))

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        return self.quantizer.draw(batch_size, self.spec.length, generator)

    def features(self, images: Tensor) -> Tensor:
        """Images (b, 3, h, w) in [0, 1] to what is quantised, (b, d, h / f, w / f); any multiple of f as h and w."""
        return self.quant_conv(self.encoder((images * 2 - 1).to(self.quant_conv.weight.dtype)))

    def pixels(self, latents: Tensor) -> Tensor:
        """Quantised latents (b, d, h, w) to images (b, 3, f·h, f·w), meant for [0, 1], not clamped; float32."""
        latents = latents.to(self.post_quant_conv.weight.dtype)
        # In bfloat16 the sum alone would cost a grey level.
        return (self.decoder(self.post_quant_conv(latents)).float() + 1) / 2


class Encoder(nn.Module):
    """(b, 3, h, w) in [−1, 1] -> (b, z_channels, h / f, w / f), f = 2^(levels − 1)."""

    def __init__(
        self, channel_mult: Sequence[int], *, channels: int, blocks: int, z_channels: int, groups: int, dropout: float
    ) -> None:
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(before, width, blocks, groups, dropout, attention=i == last, resize=Halve if i < last else None)
            for i, (before, width) in enumerate(zip([channels, *widths[:-1]], widths, strict=True))
        )
        self.mid = middle(widths[-1], groups, dropout)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(b, z_channels, h, w) -> (b, 3, f·h, f·w) in about [−1, 1], f = 2^(levels − 1). Levels coarsest first."""

    def __init__(
        self, channel_mult: Sequence[int], *, channels: int, blocks: int, z_channels: int, groups: int, dropout: float
    ) -> None:
        super().__init__()
        widths = [channels * mult for mult in reversed(channel_mult)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], groups, dropout)
        self.levels = nn.ModuleList(
            Level(before, width, blocks, groups, dropout, attention=i == 0, resize=Double if i < last else None)
            for i, (before, width) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True))
        )
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """Residual blocks of one resolution, attention after each where asked for, then a change of resolution or none."""

    def __init__(
        self,
        channels: int,
        width: int,
        blocks: int,
        groups: int,
        dropout: float,
        *,
        attention: bool,
        resize: type[Halve] | type[Double] | None,
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResidualBlock(width if i else channels, width, groups, dropout) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(width, groups) for _ in range(blocks if attention else 0))
        self.resize = nn.Identity() if resize is None else resize(width)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.resize(x)


def middle(width: int, groups: int, dropout: float) -> nn.Sequential:
    """Between encoder levels and its output, and between the decoder's input and its levels."""
    return nn.Sequential(
        ResidualBlock(width, width, groups, dropout),
        Attention(width, groups),
        ResidualBlock(width, width, groups, dropout),
    )


class ResidualBlock(nn.Module):
    """x + f(x), f = two (group norm, SiLU, 3×3 convolution); a 1×1 convolution of x where the width changes."""

    def __init__(self, channels: int, width: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.norm2 = group_norm(width, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        f = self.conv1(F.silu(self.norm1(x)))
        f = self.conv2(self.dropout(F.silu(self.norm2(f))))
        return self.shortcut(x) + f


class Attention(nn.Module):
    """x + full attention of one head over all positions of a grid (b, c, h, w)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (rearrange(part(normed), "b c h w -> b 1 (h w) c") for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(mixed, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Halve(nn.Module):
    """A 3×3 convolution of stride 2 behind one row and column of zeros, right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """Every pixel twice a side, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
