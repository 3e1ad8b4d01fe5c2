"""What variational autoencoders on a grid share: the Gaussian posterior, and latents scaled for a flow or diffusion.

image (b, 3, h, w) -> mean and log-variance (b, 2·c, h / f, w / f) -> latents (b, n, c), scaled -> image. Kingma and
Welling 2013, arXiv:1312.6114; one scale for all latents as in Rombach et al. 2021, arXiv:2112.10752, section D.1.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from einops import rearrange
from torch import Tensor, nn

from smalti.tokenizers.base import Tokenizer, TokenizerOutput
from smalti.tokenizers.quantizers.base import Draws, Quantized
from smalti.tokenizers.quantizers.kl import GaussianQuantizer
from smalti.tokenizers.spec import Tokens, TokenSpec


class LatentScale(nn.Module):
    """Latents to a standard deviation of about 1, and back.

    factor: what latents are multiplied by; None: 1 over the standard deviation of all their values, which training
    forwards measure (a running mean over some hundred batches) and checkpoints keep.
    """

    variance: Tensor
    batches: Tensor

    def __init__(self, factor: float | None) -> None:
        super().__init__()
        if factor is not None and factor <= 0:
            raise ValueError(f"scaling_factor={factor} is not positive; use null to measure it in training")
        self.given = factor
        if factor is None:
            self.register_buffer("variance", torch.ones(()))
            self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @property
    def factor(self) -> float | Tensor:
        return self.variance.rsqrt() if self.given is None else self.given

    @torch.no_grad()
    def measure(self, latents: Tensor) -> None:
        """Take note of the latents of a training batch, not scaled."""
        if self.given is None:
            self.batches += 1
            self.variance.lerp_(latents.float().var(), (1 / self.batches).clamp(min=0.01))


class VAE(Tokenizer):
    """A continuous tokenizer with a grid of tokens. A method gives `moments` and `pixels`.

    scaling_factor: of `LatentScale`. sample_posterior: whether `encode` with draws takes a sample of the posterior, as
    the published FlexTok does; without draws it always gives the mean.
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

    @torch.inference_mode()
    def encode(self, images: Tensor, *, draws: Draws | None = None) -> Tokens:
        """images: (b, 3, image_size, image_size) float in [0, 1]. Latents are scaled, tokens row-major."""
        self.check_images(images)
        quantized = self._posterior(images, draws if self.sample_posterior else None)
        return Tokens.full(quantized.latents * self.scale.factor)

    @torch.inference_mode()
    def decode(self, tokens: Tokens, *, seed: int = 0) -> Tensor:
        """Images (b, 3, h, w) in [0, 1] of scaled latents. Draws nothing: no `seed` used."""
        return self._pixels(self.tokens_to_latents(tokens) / self.scale.factor).clamp(0, 1)

    def forward(self, images: Tensor, draws: Draws | None = None) -> TokenizerOutput:
        """A sample of the posterior with draws. quantized.latents are not scaled."""
        self.check_images(images)
        quantized = self._posterior(images, draws)
        if self.training and torch.is_grad_enabled():
            self.scale.measure(quantized.latents)
        return TokenizerOutput(quantized, reconstruction=self._pixels(quantized.latents))

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        return self.quantizer.draw(batch_size, self.spec.length, generator)

    def _posterior(self, images: Tensor, draws: Draws | None) -> Quantized:
        return self.quantizer(rearrange(self.moments(images), "b d h w -> b (h w) d"), draws)

    def _pixels(self, latents: Tensor) -> Tensor:
        assert self.spec.grid is not None
        return self.pixels(rearrange(latents, "b (h w) d -> b d h w", h=self.spec.grid[0]))
