"""Rectified flow: noise levels, guidance and samplers (Liu et al. 2022, arXiv:2209.03003, as FlexTok uses it).

x_t = t · noise + (1 − t) · clean, so that t = 1 is noise alone; the velocity is dx/dt = noise − clean, and sampling
integrates it from 1 to 0. Noise levels are written σ where they are trained on and t where they are stepped through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # x (b, …) and t (b,) to dx/dt (b, …); guidance: of (b, c, h, w)


@dataclass(frozen=True)
class NoiseLevels:
    """The distribution of σ in training.

    distribution: "uniform"; "logit_normal", sigmoid of a standard normal; "mode", 1 − u − s·(cos²(πu/2) − 1 + u) with
    s = mode_scale, which favours the middle (Esser et al. 2024, arXiv:2403.03206, eq. 20; FlexTok: 0.25).
    stratified: one draw from each of b equal shares of the distribution instead of b independent ones.
    shift: then moves the levels by `shift_levels`, above 1 towards noise.
    """

    distribution: str = "mode"
    mode_scale: float = 0.25
    stratified: bool = False
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.distribution not in ("uniform", "logit_normal", "mode"):
            raise ValueError(f"distribution={self.distribution!r} is not known; use uniform, logit_normal or mode")
        if not -1 <= self.mode_scale <= 1.75:
            raise ValueError(f"mode_scale={self.mode_scale} is not in −1…1.75, where levels stay in order")
        if self.shift <= 0:
            raise ValueError(f"shift={self.shift} is not positive; 1 leaves the levels where they are")

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """σ (b,) in [0, 1] of one batch."""
        normal = self.distribution == "logit_normal" and not self.stratified
        random = torch.randn if normal else torch.rand
        return self(random(batch_size, generator=generator, device=generator.device))

    def __call__(self, draws: Tensor) -> Tensor:
        """σ (b,) of draws (b,): standard normal ones for an unstratified "logit_normal", else uniform in [0, 1)."""
        u = draws
        if self.stratified:
            u = (torch.arange(len(draws), device=draws.device) + draws) / len(draws)
        if self.distribution == "logit_normal":
            sigma = (torch.erfinv(2 * u - 1) * 2**0.5 if self.stratified else u).sigmoid()
        elif self.distribution == "mode":
            sigma = 1 - u - self.mode_scale * ((torch.pi / 2 * u).cos().square() - 1 + u)
        else:
            sigma = u
        return sigma if self.shift == 1 else shift_levels(sigma, self.shift)


def shift_levels(sigma: Tensor, factor: float | Tensor) -> Tensor:
    """a·σ / (1 + (a − 1)·σ): levels moved towards noise for a > 1 (Esser et al. 2024, eq. 23; FlexTok's video release).

    Larger images need more noise to hide as much: a = √(h·w) / (side of the images that the levels were chosen for).
    """
    return factor * sigma / (1 + (factor - 1) * sigma)


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(noised, target): σ·noise + (1 − σ)·clean, and the velocity noise − clean. clean: (b, …), sigma: (b,)."""
    level = sigma.to(clean.dtype).view(-1, *(1 for _ in clean.shape[1:]))
    return level * noise + (1 - level) * clean, noise - clean


@dataclass(frozen=True)
class Guidance:
    """How a conditional and an unconditional velocity make one.

    scale: w; a function of t (b,) gives (b,). 1 is no guidance, and only then the second branch is not computed.
    projected: adaptive projected guidance (Sadat et al. 2024, arXiv:2410.02416) instead of classifier-free guidance;
    FlexTok applies it to the velocity, with momentum −0.5, threshold 2.5, eta 0.
    momentum: weight of the earlier differences; 0: none. threshold: largest norm of a difference over (c, h, w); at
    0 or below there is none. eta: share of the part along the conditional velocity that is kept.
    rescale: then `rescale` the result by this share; mimic_scale: then `rescale_to_mimic` instead.
    """

    scale: float | Callable[[Tensor], Tensor] = 1.0
    projected: bool = False
    momentum: float = -0.5
    threshold: float = 2.5
    eta: float = 0.0
    rescale: float = 0.0
    mimic_scale: float | None = None

    @property
    def active(self) -> bool:
        """Whether an unconditional branch is needed."""
        return callable(self.scale) or self.scale != 1.0

    def at(self, t: Tensor) -> float | Tensor:
        """The scale at levels t (b,), shaped to multiply (b, c, h, w)."""
        return self.scale(t)[:, None, None, None] if callable(self.scale) else self.scale


def guided(both: Velocity, guidance: Guidance) -> Velocity:
    """A velocity under guidance, of one that computes both branches as one batch.

    both: x (2b, c, h, w), t (2b,) to velocities of which the first half is conditional. Projected guidance remembers
    differences from call to call: make a new one for every sampling.
    """
    running: Tensor | None = None

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        nonlocal running
        conditional, unconditional = both(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        difference, scale = conditional - unconditional, guidance.at(t)
        if guidance.projected:
            running = difference if running is None else difference + guidance.momentum * running
            parallel, orthogonal = project(cap(running, guidance.threshold), conditional)
            v = conditional + (scale - 1) * (orthogonal + guidance.eta * parallel)
        else:
            v = unconditional + scale * difference
        if guidance.mimic_scale is not None:
            return rescale_to_mimic(v, conditional, unconditional, guidance.mimic_scale)
        return rescale(v, conditional, guidance.rescale) if guidance.rescale > 0 else v

    return velocity


def cap(difference: Tensor, threshold: float) -> Tensor:
    """Each image's (c, h, w) shortened to a norm of at most `threshold`; unchanged where that is 0 or below."""
    if threshold <= 0:
        return difference
    norm = difference.flatten(1).norm(dim=1)[:, None, None, None]
    return difference * (threshold / norm).clamp(max=1)


def project(difference: Tensor, onto: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of (b, c, h, w) along and across `onto`, image by image, computed in float64 where there is one."""
    exact = torch.float32 if difference.device.type == "mps" else torch.float64
    d, direction = difference.to(exact), torch.nn.functional.normalize(onto.to(exact).flatten(1)).view_as(onto)
    parallel = (d * direction).sum((1, 2, 3), keepdim=True) * direction
    return parallel.to(difference.dtype), (d - parallel).to(difference.dtype)


def rescale(velocity: Tensor, conditional: Tensor, share: float = 0.7, *, channel_wise: bool = True) -> Tensor:
    """A guided velocity with its spread brought back to the conditional one's (Lin et al. 2023, arXiv:2305.08891).

    share: 1 all the way, 0 not at all. channel_wise: spread over (h, w) of each channel, else over (c, h, w).
    """
    dims = (2, 3) if channel_wise else (1, 2, 3)
    ratio = conditional.std(dims, keepdim=True) / velocity.std(dims, keepdim=True)
    return velocity * (share * ratio + 1 - share)


def rescale_to_mimic(
    velocity: Tensor,
    conditional: Tensor,
    unconditional: Tensor,
    mimic_scale: float = 4.0,
    quantile: float = 0.997,
    *,
    channel_wise: bool = True,
) -> Tensor:
    """A velocity of a high guidance scale with the range of a lower one (FlexTok's video release: dynamic rescaling).

    Around the mean of the conditional velocity: the `quantile` of |velocity| becomes the largest |v| that mimic_scale
    would give around its own mean; never stretched.
    """
    dims = (2, 3) if channel_wise else (1, 2, 3)
    mimic = unconditional + mimic_scale * (conditional - unconditional)
    centre = conditional.mean(dims, keepdim=True)
    away = (velocity - centre).float()
    largest = (mimic - mimic.mean(dims, keepdim=True)).abs().amax(dims, keepdim=True)
    reached = away.abs().flatten(dims[0]).quantile(quantile, dim=-1).view_as(largest)
    return (away * (largest / reached).clamp(max=1)).to(velocity.dtype) + centre


def sample(velocity: Velocity, noise: Tensor, *, steps: int, solver: str = "euler") -> Tensor:
    """Integrate from noise (b, …) at t = 1 to t = 0 in equal steps; the result is a clean image or latent.

    solver: "euler", as published: x ← x − v(x, t) / steps at t = 1, …, 1/steps. "heun": of second order; each step but
    the last takes a second velocity at its end and goes along the mean of both, 2·steps − 1 evaluations in all. The
    last stays Euler's: no network saw t = 0 in training, and one such step does not lower the order.

    Written out because diffusers' FlowMatchHeunDiscreteScheduler puts its second-to-last level at 1/1000 whatever the
    number of steps: with two, one is lost. Its FlowMatchEulerDiscreteScheduler agrees with ours (tests/test_flow.py).
    """
    if steps < 1:
        raise ValueError(f"steps={steps} is not positive")
    if solver not in ("euler", "heun"):
        raise ValueError(f"solver={solver!r} is not known; use 'euler' or 'heun'")
    x = noise
    for step in range(steps, 0, -1):
        v = velocity(x, x.new_full((len(x),), step / steps))
        if solver == "heun" and step > 1:
            end = velocity(x - v / steps, x.new_full((len(x),), (step - 1) / steps))
            v = (v + end) / 2
        x = x - v / steps
    return x
