"""The diffusion of MAR's head: cosine schedule, learned variance, fewer timesteps (Nichol and Dhariwal 2021,
arXiv:2102.09672, "improved DDPM").

x_t = √ᾱ_t · clean + √(1 − ᾱ_t) · noise; the network predicts the noise, ε, and where log σ² lies between that of the
posterior q(x_{t−1} | x_t, clean) and log β_t. Tables are float64; what is made with them has the network's dtype.

Written out because diffusers' DDPMScheduler has float32 tables (ᾱ of the last timestep is 2.4e-9), no variational term,
and neither the sections nor the clipped timesteps that published settings need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.generators.heads.base import HeadSampling

PIXEL = 1 / 255  # half-width of the bins of the variational term at t = 0: published, though latents are no pixels


def cosine_alpha_bars(steps: int) -> Tensor:
    """ᾱ (steps,) of every timestep, float64: cos²((s + 0.008) / 1.008 · π/2), each β at most 0.999."""
    s = torch.arange(steps + 1, dtype=torch.float64) / steps
    squared = ((s + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - (1 - squared[1:] / squared[:-1]).clamp(max=0.999)).cumprod(0)


def kept_timesteps(sampling: HeadSampling, total: int) -> list[int]:
    """The timesteps of 0…total − 1 that sampling goes through, ascending.

    "even": each section's first and last, and what lies evenly between them, rounded half to even. "stride": every i-th
    from 0, with the smallest i that gives so many; where there is none, of as many timesteps less as it takes. Those
    above max_timestep are then moved there. Raises ValueError where there are fewer timesteps than steps.
    """
    sections = sampling.steps if isinstance(sampling.steps, tuple) else (sampling.steps,)
    if sum(sections) > total:
        raise ValueError(f"steps={sampling.steps}: this diffusion has {total} timesteps; use at most as many")
    kept = _strided(sections[0], total) if sampling.spacing == "stride" else _sections(sections, total)
    if sampling.max_timestep is not None:
        kept = {min(t, sampling.max_timestep) for t in kept}
    if max(kept) == 0:
        raise ValueError(
            f"steps={sampling.steps} keeps timestep 0 only, where there is no noise to remove; use 2 or more"
        )
    return sorted(kept)


def _sections(counts: Sequence[int], total: int) -> set[int]:
    kept, start = set(), 0
    for i, count in enumerate(counts):
        size = total // len(counts) + (i < total % len(counts))
        if count > size:
            raise ValueError(f"steps={list(counts)}: section {i + 1} has {size} timesteps; use at most as many")
        stride, position = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):  # summed, not multiplied: rounding to a timestep is as published then
            kept.add(start + round(position))
            position += stride
        start += size
    return kept


def _strided(count: int, total: int) -> set[int]:
    for end in range(total, count, -1):
        kept = range(0, end, -(-end // count))
        if len(kept) == count:
            return set(kept)
    return set(range(count))


@dataclass(frozen=True)
class Step:
    """x ← x_scale · x + eps_scale · ε + std · noise, with std = exp(log_std + log_std_range · v); v is what the network
    says of the variance, from −1, the posterior's, to 1, β. noisy: whether there is noise at all."""

    timestep: int
    x_scale: float
    eps_scale: float
    log_std: float
    log_std_range: float
    noisy: bool

    def mean(self, x: Tensor, eps: Tensor) -> Tensor:
        """Of what x (m, c) becomes."""
        return self.x_scale * x + self.eps_scale * eps

    def std(self, v: Tensor) -> Tensor:
        """(m, c), as v."""
        return (self.log_std + self.log_std_range * v).exp()


class DiffusionProcess:
    """Tables (s,) float64 of the kept timesteps, ascending; each step goes to the kept timestep before.

    alpha_bars, previous: ᾱ here and at the step's end, 1 for the first. betas: 1 − ᾱ / previous. posterior_variance:
    of q(x_{t−1} | x_t, clean), with its logarithm, whose first entry, −∞, is replaced by the second.
    """

    def __init__(self, total: int, timesteps: Sequence[int] | None = None) -> None:
        """timesteps: the kept ones of 0…total − 1; None: all of them."""
        self.timesteps = list(range(total)) if timesteps is None else list(timesteps)
        self.alpha_bars = cosine_alpha_bars(total)[self.timesteps]
        self.previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bars[:-1]])
        self.betas = 1 - self.alpha_bars / self.previous
        self.posterior_variance = self.betas * (1 - self.previous) / (1 - self.alpha_bars)
        self.posterior_log_variance = torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()

    @property
    def eps_weights(self) -> Tensor:
        """β / (√α · √(1 − ᾱ)): how much of ε the mean of an ancestral step takes away (Ho et al. 2020,
        arXiv:2006.11239, eq. 11)."""
        return self.betas / ((1 - self.betas) * (1 - self.alpha_bars)).sqrt()

    def ancestral(self) -> list[Step]:
        """The steps of p(x_{t−1} | x_t), in the order of sampling; the last adds no noise."""
        low, high = self.posterior_log_variance / 2, self.betas.log() / 2  # log std at v = −1 and 1
        return self._steps((1 - self.betas).rsqrt(), -self.eps_weights, (low + high) / 2, (high - low) / 2)

    def ddim(self, eta: float) -> list[Step]:
        """The steps of Song et al. 2020, arXiv:2010.02502, eq. 12, in the order of sampling, whatever v is."""
        std = eta * self.posterior_variance.sqrt()
        x_scale = (self.previous / self.alpha_bars).sqrt()
        eps_scale = (1 - self.previous - std**2).sqrt() - x_scale * (1 - self.alpha_bars).sqrt()
        return self._steps(x_scale, eps_scale, std.log(), torch.zeros_like(std))

    def _steps(self, *columns: Tensor) -> list[Step]:
        """columns: x_scale, eps_scale, log_std and log_std_range, (s,) each."""
        steps: list[Step] = []
        for t, *row in zip(self.timesteps, *(column.tolist() for column in columns), strict=True):
            x_scale, eps_scale, log_std, log_std_range = row
            steps.append(Step(t, x_scale, eps_scale, log_std, log_std_range, bool(steps) and math.isfinite(log_std)))
        return steps[::-1]


def variational_bits(error: Tensor, v: Tensor, clean: Tensor, tables: Tensor, first: Tensor) -> Tensor:
    """The term of the variational bound of each row, mean over channels, in bits: (m,).

    error: (m, c), predicted minus true noise; v: (m, c); clean: (m, c); tables: (m, 3), eps_weights, logarithm of the
    posterior variance and of β; first: (m,) bool, whether t = 0.
    KL(posterior ‖ prediction), and at t = 0 −log p(clean | x_1) of a bin around it.
    Source: Nichol and Dhariwal 2021, eq. 4–7 and 15; Ho et al. 2020, eq. 13 (bins).
    """
    weight, low, high = tables[:, :, None].unbind(1)
    log_variance = low + (v + 1) / 2 * (high - low)
    deviation = weight * error  # of means: x_t is one of clean and true noise, so that this is all they differ by
    divergence = (log_variance - low - 1 + (low - log_variance).exp() + deviation**2 * (-log_variance).exp()) / 2
    inverse_std = (-log_variance / 2).exp()
    above, below = ((deviation + side) * inverse_std for side in (PIXEL, -PIXEL))
    bits = torch.where(first[:, None], -_log_bin(clean, _normal_cdf(above), _normal_cdf(below)), divergence)
    return bits.mean(1) / math.log(2)


def _log_bin(clean: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """Logarithm of the probability between two values of the CDF; of all beyond one for clean values at the edges."""
    probability = torch.where(clean < -0.999, above, torch.where(clean > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The approximation that the published bound has."""
    return (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()) / 2
