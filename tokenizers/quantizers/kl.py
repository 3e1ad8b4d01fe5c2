"""A Gaussian bottleneck: the encoder gives mean and log-variance, KL to the standard normal is the price.

Kingma and Welling 2013, arXiv:1312.6114; in tokenizers as in Rombach et al. 2021, arXiv:2112.10752,
and TiTok's VAE models. One scale for all latents, which generators want to be of about unit variance: the former,
section D.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smalti.tokenizers.quantizers.base import Draws, Quantized, Quantizer


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

    @property
    def known(self) -> bool:
        """Whether it was given or measured; until then latents are left as they are."""
        return self.given is not None or bool(self.batches > 0)

    @torch.no_grad()
    def measure(self, latents: Tensor) -> None:
        """Take note of the latents of a training batch, not scaled."""
        if self.given is None:
            self.batches += 1
            self.variance.lerp_(latents.float().var(), (1 / self.batches).clamp(min=0.01))

    @torch.no_grad()
    def set_variance(self, variance: float) -> None:
        """Take a variance that was measured elsewhere. Raises ValueError where the factor is given."""
        if self.given is not None:
            raise ValueError(f"scaling_factor={self.given} is given; build the model with null to measure it")
        self.batches.fill_(1)
        self.variance.fill_(variance)


class GaussianQuantizer(Quantizer):
    """Continuous latents.

    dim: d, channels of a latent token; the encoder gives 2·d, means first. scaling_factor: of `LatentScale`, for
    tokenizers that have no such argument themselves; 1: tokens are the latents as they are.
    """

    def __init__(self, *, dim: int, scaling_factor: float | None = 1.0) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim={dim} is not positive")
        self.dim, self.input_dim = dim, 2 * dim
        self.scale = LatentScale(scaling_factor)

    @staticmethod
    def posterior(moments: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, (…, d) float32 each, of moments (…, 2·d); the log-variance is kept in [−30, 20]."""
        mean, log_variance = moments.float().chunk(2, dim=-1)
        return mean, log_variance.clamp(-30.0, 20.0)

    @staticmethod
    def sample(moments: Tensor, noise: Tensor | None) -> Tensor:
        """mean + std · noise, (…, d) float32, of moments (…, 2·d) and standard normal noise; None: the mean."""
        mean, log_variance = GaussianQuantizer.posterior(moments)
        return mean if noise is None else mean + (0.5 * log_variance).exp() * noise.to(mean)

    def divergence(self, moments: Tensor) -> Tensor:
        """KL of the posterior to the standard normal, (b, n): summed over channels, not over tokens."""
        mean, log_variance = self.posterior(moments)
        return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(-1)

    def forward(self, latents: Tensor, draws: Draws | None = None) -> Quantized:
        """latents: (b, n, 2·d) moments. Returns mean + std · draws["noise"], or the mean without draws; not scaled.

        losses: "kl", summed over tokens and channels, mean over the batch: the objective's weight is small (1e-6).
        """
        if latents.ndim != 3 or latents.shape[-1] != self.input_dim:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: expected (b, n, 2·dim={self.input_dim})")
        with torch.autocast(latents.device.type, enabled=False):
            kl = self.divergence(latents).sum() / len(latents)
            sample = self.sample(latents, None if draws is None else draws["noise"])
            if self.training and torch.is_grad_enabled():
                self.scale.measure(sample)
        return Quantized(sample.to(latents.dtype), None, {"kl": kl}, {"kl": kl.detach()})

    def lookup(self, indices: Tensor) -> Tensor:
        raise ValueError("a Gaussian bottleneck has no codebook: its tokens are the latents themselves")

    def draw(self, batch_size: int, length: int, generator: torch.Generator) -> Draws:
        """Under "noise" (b, n, d), standard normal."""
        shape = (batch_size, length, self.dim)
        return {"noise": torch.randn(shape, generator=generator, device=generator.device)}
