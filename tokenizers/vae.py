"""What variational autoencoders on a grid share: the Gaussian posterior, and latents scaled for a flow or diffusion.

image (b, 3, h, w) -> mean and log-variance (b, 2·c, h / f, w / f) -> latents (b, n, c), scaled -> image. Kingma and
Welling 2013, arXiv:1312.6114; one scale for all latents as in Rombach et al. 2021, arXiv:2112.10752, section D.1.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from einops import rearrange
from torch import Tensor

from smalti.tokenizers.base import Tokenizer, TokenizerOutput
from smalti.tokenizers.quantizers.base import Draws
from smalti.tokenizers.quantizers.kl import GaussianQuantizer, LatentScale
from smalti.tokenizers.spec import Tokens, TokenSpec


class VAE(Tokenizer):
    """A continuous tokenizer with a grid of tokens. A method gives `moments` and `pixels`.

    scaling_factor: of `LatentScale`. sample_posterior: whether `encode` with draws, and who trains on its tokens, takes
    a sample of the posterior, as the published FlexTok and MAR do; without draws `encode` always gives the mean.
    """

    quantizer: GaussianQuantizer

    def __init__(
        self, *, image_size: int, factor: int, channels: int, scaling_factor: float | None, sample_posterior: bool
    ) -> None:
        super().__init__()
        if image_size < factor or image_size % factor:
            below = max(image_size // factor, 1) * factor
            raise ValueError(f"image_size={image_size} is not a multiple of {factor}; use {below} or {below + factor}")
        if channels < 1:
            raise ValueError(f"latent_channels={channels} is not positive")
        self.quantizer = GaussianQuantizer(dim=channels)
        self.scale = LatentScale(scaling_factor)
        self.sample_posterior = sample_posterior
        grid = image_size // factor
        self.spec = TokenSpec(
            kind="continuous", length=grid * grid, dim=channels, image_size=image_size, grid=(grid, grid)
        )

    @abstractmethod
    def moments(self, images: Tensor) -> Tensor:
        """Means and log-variances (b, 2·c, h / f, w / f), means first, of images (b, 3, h, w) in [0, 1] of any size."""

    @abstractmethod
    def pixels(self, latents: Tensor) -> Tensor:
        """Images (b, 3, f·h, f·w) in about [0, 1] of latents (b, c, h, w) that are not scaled."""

    @property
    def latent_scale(self) -> LatentScale:
        return self.scale

    @property
    def has_posterior(self) -> bool:
        return self.sample_posterior

    @torch.inference_mode()
    def encode(self, images: Tensor, *, draws: Draws | None = None) -> Tokens:
        """images: (b, 3, image_size, image_size) float in [0, 1]. Latents are scaled, tokens row-major."""
        moments = self._token_moments(images)
        quantized = self.quantizer(moments, draws if self.sample_posterior else None)
        return self.scaled(quantized)

    @torch.inference_mode()
    def decode(self, tokens: Tokens, *, seed: int = 0) -> Tensor:
        """Images (b, 3, h, w) in [0, 1] of scaled latents. Draws nothing: no `seed` used."""
        return self._pixels(self.tokens_to_latents(tokens)).clamp(0, 1)

    @torch.inference_mode()
    def moments_of(self, images: Tensor) -> Tensor:
        return self._token_moments(images)

    def forward(self, images: Tensor, draws: Draws | None = None) -> TokenizerOutput:
        """A sample of the posterior with draws. quantized.latents are not scaled."""
        quantized = self.quantizer(self._token_moments(images), draws)
        if self.training and torch.is_grad_enabled():
            self.scale.measure(quantized.latents)
        return TokenizerOutput(quantized, reconstruction=self._pixels(quantized.latents))

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        return self.quantizer.draw(batch_size, self.spec.length, generator)

    def _token_moments(self, images: Tensor) -> Tensor:
        """(b, n, 2·c) of images, checked."""
        self.check_images(images)
        return rearrange(self.moments(images), "b d h w -> b (h w) d")

    def _pixels(self, latents: Tensor) -> Tensor:
        assert self.spec.grid is not None
        return self.pixels(rearrange(latents, "b (h w) d -> b d h w", h=self.spec.grid[0]))
