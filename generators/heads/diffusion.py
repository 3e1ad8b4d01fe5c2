"""MAR's diffusion loss (Li et al. 2024, arXiv:2406.11838): p(token | condition) as a small diffusion model.

Trained by ε's squared error plus the variational bound, which teaches the variance alone; sampled step by step from
noise, under guidance with ε of both branches. The schedule: diffusion_process.py; the network: mlp.py.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import torch
from torch import Tensor

from smalti.generators.decoding.guidance import guide
from smalti.generators.heads.base import Head, HeadSampling, Noise, warn_if_large
from smalti.generators.heads.diffusion_process import DiffusionProcess, Step, kept_timesteps, variational_bits
from smalti.generators.heads.mlp import HeadMLP
from smalti.settings import check_sizes
from smalti.tokenizers.quantizers.base import Draws


class DiffusionHead(Head):
    """dim: channels c of a token; condition_dim: d, width of the conditions; width, depth: of the network;
    timesteps: of the diffusion, which training draws from."""

    def __init__(
        self, *, dim: int, condition_dim: int, width: int = 1024, depth: int = 3, timesteps: int = 1000
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, condition_dim=condition_dim, width=width, depth=depth)
        if timesteps < 2:
            raise ValueError(f"timesteps={timesteps}: a diffusion needs 2 or more")
        self.dim, self.timesteps = dim, timesteps
        self.net = HeadMLP(dim=dim, condition_dim=condition_dim, out=2 * dim, width=width, depth=depth)

    @cached_property
    def tables(self) -> Tensor:
        """(timesteps, 5) float32 of the training diffusion: √ᾱ, √(1 − ᾱ), weight of ε in the mean, logarithms of the
        posterior variance and of β. No buffer, which a model's dtype would be imposed on."""
        process = DiffusionProcess(self.timesteps)
        bars, betas = process.alpha_bars, process.betas
        columns = (bars.sqrt(), (1 - bars).sqrt(), process.eps_weights, process.posterior_log_variance, betas.log())
        return torch.stack(columns, dim=1).float()

    def check(self, sampling: HeadSampling) -> None:
        for some in (sampling.at(0, 2), sampling.at(1, 2)):  # the first of an annealing, and the last
            kept_timesteps(some, self.timesteps)

    def draw(self, rows: int, generator: torch.Generator) -> Draws:
        """ "t" (rows,) int64 of 0…timesteps − 1, "noise" (rows, c)."""
        t = torch.randint(self.timesteps, (rows,), generator=generator)
        return {"t": t, "noise": torch.randn(rows, self.dim, generator=generator)}

    def loss(self, target: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """Mean squared error of ε plus the variational term in bits."""
        squared_error, bits = self.losses(target, condition, draws)
        return squared_error + bits

    def losses(self, target: Tensor, condition: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The two terms of each row, (m,) float32: mean squared error of ε, and the variational term in bits."""
        target, t, noise = target.float(), draws["t"], draws["noise"]
        with torch.autocast(target.device.type, enabled=False):
            tables = self.tables.to(t.device)[t]
            noised = tables[:, :1] * target + tables[:, 1:2] * noise
            eps, v = self.net(noised, t, condition).float().chunk(2, dim=-1)
            error = eps - noise
            return error.square().mean(1), variational_bits(error.detach(), v, target, tables[:, 2:], t == 0)

    @torch.no_grad()
    def sample(self, condition: Tensor, *, noise: Noise, sampling: HeadSampling, guidance: float = 1.0) -> Tensor:
        steps, guided = sampling_steps(sampling, self.timesteps), guidance != 1
        times = torch.tensor([step.timestep for step in steps], device=condition.device)
        x = noise(0).float()
        with torch.autocast(x.device.type, enabled=False):
            for k, (step, network) in enumerate(zip(steps, self.net.steps(condition, times), strict=True), start=1):
                eps, v = network(x.repeat(2, 1) if guided else x).float().chunk(2, dim=-1)
                if guided:  # ε alone: the variance is the conditional branch's own
                    eps, v = guide(eps, guidance), v[: len(x)]
                x = step.mean(x, eps)
                if step.noisy:
                    x = x + sampling.temperature * step.std(v) * noise(k)
        warn_if_large(x)
        return x


@lru_cache(maxsize=1024)
def sampling_steps(sampling: HeadSampling, timesteps: int) -> list[Step]:
    """The steps of a sampling without annealing, in their order, of a diffusion of so many timesteps."""
    process = DiffusionProcess(timesteps, kept_timesteps(sampling, timesteps))
    return process.ancestral() if sampling.sampler == "ancestral" else process.ddim(sampling.eta)
