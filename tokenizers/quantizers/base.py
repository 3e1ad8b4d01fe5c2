"""The contract of a bottleneck between a tokenizer's encoder and decoder."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from smalti.registry import Described

Draws = dict[str, Tensor]


@dataclass(frozen=True)
class Quantized:
    """What a quantizer makes of latents.

    latents: (b, n, d) in the input's dtype, with the straight-through (or reparametrised) gradient.
    indices: (b, n) int64, (b, n, q) for residual and product quantizers, None for continuous bottlenecks.
    losses: named 0-d terms; their sum is the quantizer loss, which the objective weighs.
    statistics: named 0-d detached figures for the log.
    """

    latents: Tensor
    indices: Tensor | None
    losses: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module, metaclass=Described):
    """A bottleneck. Computes in float32 whatever autocast says; the straight-through gradient stands here only.

    codebook_size: v, None when continuous. dim: d, channels of a latent token that the decoder reads.
    input_dim: channels that the encoder must give (2·d for a Gaussian's mean and log-variance).
    depth: q, codes a token.
    """

    codebook_size: int | None = None
    depth: int = 1
    dim: int
    input_dim: int

    @abstractmethod
    def forward(self, latents: Tensor, draws: Draws | None = None) -> Quantized:
        """latents: (b, n, input_dim). `draws` as made by `draw`; without them the result is deterministic."""

    @abstractmethod
    def lookup(self, indices: Tensor) -> Tensor:
        """Latents (b, n, d) of indices (b, n) or (b, n, q). Continuous bottlenecks raise ValueError."""

    def draw(self, batch_size: int, length: int, generator: torch.Generator) -> Draws:
        """The random numbers of one training forward, on the generator's device; empty when it needs none."""
        return {}
