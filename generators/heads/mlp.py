"""The network of heads: an MLP over one token, modulated by its noise level and condition (MAR's denoising MLP, Li et
al. 2024, arXiv:2406.11838; modulation as in DiT, Peebles and Xie 2022, arXiv:2212.09748).

token (m, c) -> width -> residual blocks, each norm · (1 + scale) + shift, Linear, SiLU, Linear, gate -> (m, out)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.layers.init import init_xavier_
from smalti.layers.time import TimestepEmbedding

EPS = 1e-6  # of every norm
# Of modulations that are computed ahead: samplings of 25 steps at width 1024, depth 6 take 0.4 (2 rows), 0.6 (16) and
# 0.8 (48) of the time of one step after another (one CPU thread).
ROWS = 512

Modulation = tuple[Tensor, ...]  # (m, width) each


class HeadMLP(nn.Module):
    """dim: channels c of a token; condition_dim: d; out: channels of the output; `depth` blocks of `width`."""

    def __init__(self, *, dim: int, condition_dim: int, out: int, width: int, depth: int) -> None:
        super().__init__()
        self.time = TimestepEmbedding(width, 256, max_period=10000.0)
        self.condition = nn.Linear(condition_dim, width)
        self.input = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        parts = [3] * depth + [2]  # of each block, and before the output
        self.modulations = nn.ModuleList(nn.Linear(width, n * width) for n in parts)
        self.output = nn.Linear(width, out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform with zero biases; the time embedding normal, of 0.02; modulations and the output zero, so that
        blocks change nothing and the output is 0."""
        init_xavier_(self)
        for linear in (self.time.fc, self.time.proj):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (*self.modulations, self.output):
            nn.init.zeros_(linear.weight)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """(m, out), in the weights' dtype. x: (m, c); t: (m,) in 0…1000; condition: (m, d)."""
        return self._layers(self._modulations(self.time(t) + self._embed(condition)), x)

    def steps(self, condition: Tensor, times: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        """For each of times (s,), in their order, the network x (m, c) -> (m, out) with condition (m, d).

        What does not depend on x is computed ahead: the condition's embedding once, modulations for several times in
        one product, which reads each of their matrices (three of a block's five) once instead of once a time.
        """
        embedded = self._embed(condition)
        for some in self.time(times).split(max(1, ROWS // max(1, len(embedded)))):
            ahead = self._modulations(some[:, None] + embedded)
            for i in range(len(some)):
                yield partial(self._layers, [tuple(part[i] for part in parts) for parts in ahead])

    def _embed(self, condition: Tensor) -> Tensor:
        return self.condition(condition.to(self.condition.weight.dtype))

    def _modulations(self, y: Tensor) -> list[Modulation]:
        """(shift, 1 + scale, gate) of each block and (shift, 1 + scale) before the output, of y (…, width)."""
        y = F.silu(y)
        parts = (linear(y).split(y.shape[-1], dim=-1) for linear in self.modulations)
        return [(shift, 1 + scale, *gate) for shift, scale, *gate in parts]

    def _layers(self, modulations: list[Modulation], x: Tensor) -> Tensor:
        x = self.input(x.to(self.input.weight.dtype))
        for block, modulation in zip(self.blocks, modulations[:-1], strict=True):
            x = block(x, *modulation)
        shift, scale = modulations[-1]
        return self.output(torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), scale))


class Block(nn.Module):
    """x + gate · MLP(norm(x) · scale + shift), with x and modulations of (m, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.fc = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        h = self.proj(F.silu(self.fc(torch.addcmul(shift, self.norm(x), scale))))
        return torch.addcmul(x, gate, h)
