"""MaskGIT-VQGAN: an image as a grid of codes, 16 pixels a side each (Chang et al. 2022, arXiv:2202.04200).

image (b, 3, h, w) in [0, 1], not normalised -> convolutions, halved at every level but the last -> latents (b, n, d)
-> codes -> convolutions, doubled at every level but the last -> image. No attention. TiTok's first stage predicts its
codes, TiTok's second stage starts from its decoder.

Published weights are a port of the original JAX ones; they depend on `shortcut="published"` (see ResidualBlock).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from smalti.layers.convolution import group_norm
from smalti.tokenizers.base import Tokenizer, TokenizerOutput
from smalti.tokenizers.quantizers.base import Draws, Quantizer
from smalti.tokenizers.spec import Tokens, TokenSpec


class MaskGITVQGAN(Tokenizer):
    """image_size: side in pixels, a multiple of 2^(levels − 1); the network itself takes any such size.

    channels: width at full resolution; channel_mult: its factor at each level, finest first. num_res_blocks: at each
    level, and in the middle. shortcut: "input" (a residual block as usual) or "published", see ResidualBlock.
    quantizer: its dim is the number of channels between encoder and decoder.
    """

    def __init__(
        self,
        *,
        image_size: int,
        quantizer: Quantizer,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        shortcut: str = "input",
    ) -> None:
        super().__init__()
        factor = 2 ** (len(channel_mult) - 1)
        if image_size < factor or image_size % factor:
            below = max(image_size // factor, 1) * factor
            raise ValueError(
                f"image_size={image_size} is not a multiple of {factor} (channel_mult has {len(channel_mult)} levels); "
                f"use {below} or {below + factor}"
            )
        sizes: dict[str, Any] = {"channels": channels, "channel_mult": channel_mult, "num_res_blocks": num_res_blocks}
        self.encoder = PixelEncoder(dim=quantizer.input_dim, shortcut=shortcut, **sizes)
        self.quantizer = quantizer
        self.decoder = PixelDecoder(dim=quantizer.dim, shortcut=shortcut, **sizes)
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
        """images: (b, 3, h, w) float in [0, 1]. Tokens are row-major; a Gaussian bottleneck gives its mean."""
        self.check_images(images)
        quantized = self.quantizer(self._latents(images))
        return Tokens.full(quantized.latents, quantized.indices)

    @torch.inference_mode()
    def decode(self, tokens: Tokens, *, seed: int = 0) -> Tensor:
        """Images (b, 3, h, w) in [0, 1]. Indices are looked up where there are any. Draws nothing: no `seed` used."""
        return self._pixels(self.tokens_to_latents(tokens)).clamp(0, 1)

    def forward(self, images: Tensor, draws: Draws | None = None) -> TokenizerOutput:
        self.check_images(images)
        quantized = self.quantizer(self._latents(images), draws)
        return TokenizerOutput(quantized, reconstruction=self._pixels(quantized.latents))

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        return self.quantizer.draw(batch_size, self.spec.length, generator)

    def _latents(self, images: Tensor) -> Tensor:
        features = self.encoder(images.to(self.decoder.conv_out.weight.dtype))
        return rearrange(features, "b d h w -> b (h w) d")

    def _pixels(self, latents: Tensor) -> Tensor:
        assert self.spec.grid is not None
        latents = latents.to(self.decoder.conv_out.weight.dtype)
        return self.decoder(rearrange(latents, "b (h w) d -> b d h w", h=self.spec.grid[0]))


class PixelEncoder(nn.Module):
    """(b, 3, h, w) -> (b, dim, h / f, w / f), f = 2^(levels − 1)."""

    def __init__(
        self,
        *,
        dim: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        shortcut: str = "input",
    ) -> None:
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            Level(before, width, num_res_blocks, shortcut)
            for before, width in zip([channels, *widths[:-1]], widths, strict=True)
        )
        self.mid = nn.Sequential(*(ResidualBlock(widths[-1], widths[-1], shortcut) for _ in range(num_res_blocks)))
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for index, level in enumerate(self.down):
            x = level(x)
            if index < len(self.down) - 1:
                x = F.avg_pool2d(x, 2)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class PixelDecoder(nn.Module):
    """(b, dim, h, w) -> (b, 3, f·h, f·w), f = 2^(levels − 1). Levels are numbered from the finest."""

    def __init__(
        self,
        *,
        dim: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        shortcut: str = "input",
    ) -> None:
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid = nn.Sequential(*(ResidualBlock(widths[-1], widths[-1], shortcut) for _ in range(num_res_blocks)))
        self.up = nn.ModuleList(
            Level(before, width, num_res_blocks, shortcut, upsample=index > 0)
            for index, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class ResidualBlock(nn.Module):
    """x + f(x) with f = two (group norm, SiLU, 3×3 convolution); a 1×1 convolution where the width changes.

    shortcut "input": skip(x) + f(x), as intended. "published": f(x) + skip(f(x)); the input is not added at all, and
    the 1×1 convolution is as wide as the output on both sides. The published weights were trained with that.
    """

    def __init__(self, channels: int, width: int, shortcut: str) -> None:
        super().__init__()
        if shortcut not in ("input", "published"):
            raise ValueError(f"shortcut={shortcut!r} is not known; use 'input' or 'published'")
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm2 = group_norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.published = shortcut == "published"
        self.same_width = channels == width
        if not self.same_width:
            self.nin_shortcut = nn.Conv2d(width if self.published else channels, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        f = self.conv1(F.silu(self.norm1(x)))
        f = self.conv2(F.silu(self.norm2(f)))
        if self.same_width:
            return x + f
        return self.nin_shortcut(f if self.published else x) + f


class Level(nn.Module):
    """The residual blocks of one resolution; then, in the decoder, pixels doubled and a 3×3 convolution."""

    def __init__(self, channels: int, width: int, blocks: int, shortcut: str, upsample: bool = False) -> None:
        super().__init__()
        pairs = pairwise([channels] + [width] * blocks)
        self.block = nn.Sequential(*(ResidualBlock(before, after, shortcut) for before, after in pairs))
        self.upsample = upsample
        if upsample:
            self.upsample_conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest")) if self.upsample else x
