"""A rectified flow as head (Liu et al. 2022, arXiv:2209.03003), as FlowAR (Ren et al. 2024, arXiv:2412.15205) and xAR
(Ren et al. 2025, arXiv:2502.20388) have instead of MAR's diffusion, which it replaces with everything else alike.

x_t = (1 − t) · clean + t · noise, t = 1 is noise; the network predicts the velocity noise − clean, and sampling follows
it from 1 to 0 in equal Euler steps. The network: mlp.py, which sees 1000 · t.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from smalti import flow
from smalti.generators.decoding.guidance import guide
from smalti.generators.heads.base import Head, HeadSampling, Noise, warn_if_large
from smalti.generators.heads.mlp import HeadMLP
from smalti.settings import check_sizes
from smalti.tokenizers.quantizers.base import Draws

SCALE = 1000.0  # of t as the network sees it, whose sinusoid is made for 0…1000


class FlowHead(Head):
    """dim: channels c of a token; condition_dim: d, width of the conditions; width, depth: of the network."""

    def __init__(self, *, dim: int, condition_dim: int, width: int = 1024, depth: int = 3) -> None:
        super().__init__()
        check_sizes(dim=dim, condition_dim=condition_dim, width=width, depth=depth)
        self.dim = dim
        self.net = HeadMLP(dim=dim, condition_dim=condition_dim, out=dim, width=width, depth=depth)

    def check(self, sampling: HeadSampling) -> None:
        for field in fields(HeadSampling):
            value = getattr(sampling, field.name)
            if field.name not in ("steps", "annealing", "last_steps") and value != field.default:
                raise ValueError(f"{field.name}={value} is of head=diffusion; leave it out with head=flow")
        if not isinstance(sampling.steps, int):
            raise ValueError(f"steps={list(sampling.steps)}: a flow head has no sections; use one number")

    def draw(self, rows: int, generator: torch.Generator) -> Draws:
        """ "t" (rows,) uniform in [0, 1), "noise" (rows, c)."""
        t = torch.rand(rows, generator=generator)
        return {"t": t, "noise": torch.randn(rows, self.dim, generator=generator)}

    def loss(self, target: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """Mean squared error of the velocity."""
        with torch.autocast(target.device.type, enabled=False):
            noised, velocity = flow.add_noise(target.float(), draws["noise"], draws["t"])
            predicted = self.net(noised, SCALE * draws["t"], condition).float()
            return (predicted - velocity).square().mean(1)

    @torch.no_grad()
    def sample(self, condition: Tensor, *, noise: Noise, sampling: HeadSampling, guidance: float = 1.0) -> Tensor:
        steps, guided = sampling.steps, guidance != 1
        assert isinstance(steps, int)  # see `check`
        times = torch.arange(steps, 0, -1, device=condition.device) / steps
        networks = self.net.steps(condition, SCALE * times)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            network = next(networks)  # of this t: both go from 1 to 0
            return guide(network(x.repeat(2, 1)).float(), guidance) if guided else network(x).float()

        with torch.autocast(condition.device.type, enabled=False):
            x = flow.sample(velocity, noise(0).float(), steps=steps)
        warn_if_large(x)
        return x
