"""A Gaussian bottleneck: the encoder gives mean and log-variance, KL to the standard normal is the price.

Kingma and Welling 2013, arXiv:1312.6114; in tokenizers as in Rombach et al. 2021, arXiv:2112.10752,
and TiTok's VAE models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smalti.tokenizers.quantizers.base import Draws, Quantized, Quantizer


class GaussianQuantizer(Quantizer):
    """Continuous latents. dim: d, channels of a latent token; the encoder gives 2·d, means first."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim={dim} is not positive")
        self.dim, self.input_dim = dim, 2 * dim

    def posterior(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, (b, n, d) float32 each; the log-variance is kept in [−30, 20]."""
        mean, log_variance = moments.float().chunk(2, dim=-1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def divergence(self, moments: Tensor) -> Tensor:
        """KL of the posterior to the standard normal, (b, n): summed over channels, not over tokens."""
        mean, log_variance = self.posterior(moments)
        return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(-1)

    def forward(self, latents: Tensor, draws: Draws | None = None) -> Quantized:
        """latents: (b, n, 2·d) moments. Returns mean + std · draws["noise"], or the mean without draws.

        losses: "kl", summed over tokens and channels, mean over the batch: the objective's weight is small (1e-6).
        """
        if latents.ndim != 3 or latents.shape[-1] != self.input_dim:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: expected (b, n, 2·dim={self.input_dim})")
        with torch.autocast(latents.device.type, enabled=False):
            mean, log_variance = self.posterior(latents)
            kl = self.divergence(latents).sum() / len(latents)
            sample = mean
            if draws is not None:
                sample = mean + (0.5 * log_variance).exp() * draws["noise"].to(mean)
        return Quantized(sample.to(latents.dtype), None, {"kl": kl}, {"kl": kl.detach()})

    def lookup(self, indices: Tensor) -> Tensor:
        raise ValueError("a Gaussian bottleneck has no codebook: its tokens are the latents themselves")

    def draw(self, batch_size: int, length: int, generator: torch.Generator) -> Draws:
        """Under "noise" (b, n, d), standard normal."""
        shape = (batch_size, length, self.dim)
        return {"noise": torch.randn(shape, generator=generator, device=generator.device)}
