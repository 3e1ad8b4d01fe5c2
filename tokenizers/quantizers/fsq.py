"""Finite scalar quantization: each channel is rounded to one of a few levels (Mentzer et al. 2023, arXiv:2309.15505).

z (b, n, d) -> tanh-bounded to the span of L_i levels -> nearest integer -> values in [−1, 1].
Gradients go straight through. The codebook is the product of the levels and has no weights. Training noise as in
FlexTok (arXiv:2502.13967).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from smalti.tokenizers.quantizers.base import Draws, Quantized, Quantizer


class FSQ(Quantizer):
    """Codes are d integers, channel i one of levels[i]; index = Σ integer_i · basis_i, channel 0 the fastest.

    levels: at least 2 each; published for FlexTok: 8, 8, 8, 5, 5, 5 (64,000 codes).

    Noise, in training and only with draws; off by default, and what FlexTok's weights were trained with is not known:
    drop_probability: a sample's latents pass unrounded (its indices are those of the nearest codes).
    corrupt_probability: a share of a sample's tokens becomes random codes, which no gradient passes; the share is
    uniform in corrupt_share (low, high).

    Published, both are drawn once a batch when sequences are packed; here once a sample. Published indices are
    float32 sums, cut to integers; here they are integers all along. They differ where the sums round: at some levels
    from 26 on, and for unrounded samples.
    """

    codebook_size: int
    levels: Tensor
    basis: Tensor

    def __init__(
        self,
        *,
        levels: Sequence[int],
        drop_probability: float = 0.0,
        corrupt_probability: float = 0.0,
        corrupt_share: Sequence[float] = (0.5, 0.5),
    ) -> None:
        super().__init__()
        levels = list(levels)
        if not levels or min(levels) < 2:
            raise ValueError(f"levels={levels}: give one number from 2 on for each channel of a token")
        if math.prod(levels) >= 2**62:
            raise ValueError(f"levels={levels} make {math.prod(levels)} codes, more than an int64 index can count")
        for name, value in (("drop_probability", drop_probability), ("corrupt_probability", corrupt_probability)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} is not in [0, 1]")
        if len(corrupt_share) != 2 or not 0 <= corrupt_share[0] <= corrupt_share[1] <= 1:
            raise ValueError(f"corrupt_share={list(corrupt_share)} is not a range (low, high) in [0, 1]")
        self.dim = self.input_dim = len(levels)
        self.codebook_size = math.prod(levels)
        self.drop_probability, self.corrupt_probability = drop_probability, corrupt_probability
        self.corrupt_share = (corrupt_share[0], corrupt_share[1])

        basis = [math.prod(levels[:channel]) for channel in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.int64), persistent=False)
        self.register_buffer("basis", torch.tensor(basis, dtype=torch.int64), persistent=False)

    def forward(self, latents: Tensor, draws: Draws | None = None) -> Quantized:
        """latents: (b, n, d), any float dtype, not bounded. Returns values in [−1, 1] in that dtype. No losses.

        draws: as made by `draw`; where a kind of noise has none, it is left out.
        """
        if latents.ndim != 3 or latents.shape[-1] != self.dim:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: expected (b, n, d={self.dim})")
        draws = draws or {}
        with torch.autocast(latents.device.type, enabled=False):
            bounded = self.bound(latents)
            integers = bounded.round()
            indices = self._index(integers)
            values = bounded + (integers - bounded).detach()
            if "drop" in draws:
                drop = draws["drop"] < self.drop_probability
                values = torch.where(drop[:, None, None], bounded, values)
            values = values / self._unit
            if "corrupt" in draws:
                low, high = self.corrupt_share
                share = low + (high - low) * draws["corrupt_share"]
                chosen = draws["corrupt_tokens"] < share[:, None]
                chosen &= (draws["corrupt"] < self.corrupt_probability)[:, None]
                indices = torch.where(chosen, draws["corrupt_indices"], indices)
                values = torch.where(chosen[..., None], self.lookup(draws["corrupt_indices"]), values)
        return Quantized(values.to(latents.dtype), indices)

    def lookup(self, indices: Tensor) -> Tensor:
        """Values (…, d) in [−1, 1], float32, of indices (…) int64."""
        digits = indices[..., None] // self.basis % self.levels
        return (digits - self.levels // 2) / self._unit

    def bound(self, latents: Tensor) -> Tensor:
        """tanh(z + shift) · half − offset, float32: (…, d) that round to the integers −⌊L/2⌋ … ⌊(L − 1)/2⌋."""
        half = (self.levels - 1) * (1 + 1e-3) / 2  # a little wider, so that the end levels are reached
        offset = 0.5 * (1 - self.levels % 2)  # an even number of levels lies around −½
        return (latents.float() + (offset / half).atanh()).tanh() * half - offset

    def draw(self, batch_size: int, length: int, generator: torch.Generator) -> Draws:
        """Uniform draws in [0, 1), for the kinds of noise that are on: "drop", "corrupt", "corrupt_share" (b,) and
        "corrupt_tokens" (b, n); "corrupt_indices" (b, n) int64, random codes."""
        draws: Draws = {}
        if self.drop_probability > 0:
            draws["drop"] = torch.rand(batch_size, generator=generator, device=generator.device)
        if self.corrupt_probability > 0:
            for name in ("corrupt", "corrupt_share"):
                draws[name] = torch.rand(batch_size, generator=generator, device=generator.device)
            shape = (batch_size, length)
            draws["corrupt_tokens"] = torch.rand(shape, generator=generator, device=generator.device)
            draws["corrupt_indices"] = torch.randint(
                self.codebook_size, shape, generator=generator, device=generator.device
            )
        return draws

    @property
    def _unit(self) -> Tensor:
        """(d,): what an integer is divided by, L // 2."""
        return (self.levels // 2).float()

    def _index(self, integers: Tensor) -> Tensor:
        return ((integers.long() + self.levels // 2) * self.basis).sum(-1)
