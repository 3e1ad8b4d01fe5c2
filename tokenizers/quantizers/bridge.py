"""Dimension-wise quantisation after training, without any: each channel of a continuous token is rounded on its own.

latents (b, n, d) -> each number by itself to the nearest of v = 2^bits levels, the same ones for all channels
-> indices (b, n, d) in [0, v). TokenBridge (Wang et al. 2025, arXiv:2503.16430), section 3.2. The levels are the means
of a standard normal variable between its v-quantiles, cut at ±std_range and stretched over a range.

The published range is ±5 for latents of unit variance. Were they normal, levels between quantiles would all be equally
frequent over ±3, but ±5 is closer to them: it has a sixth of the error at 6 bits (6.6e-4 against 4.0e-3), nearly the
least that any range has, since the density of levels of least error is the cube root of the density of the data, a
normal one √3 times as wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from smalti.settings import check_sizes
from smalti.tokenizers.quantizers.base import Draws, Quantized, Quantizer

KL16_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)  # published, for MAR's KL-16


def gaussian_boundaries(bits: int, std_range: float) -> Tensor:
    """(v + 1,) float32: the v-quantiles of a standard normal variable, cut at ±std_range."""
    shares = torch.linspace(0, 1, 2**bits + 1, dtype=torch.float64)
    return torch.special.ndtri(shares).clamp(-std_range, std_range).float()


def gaussian_levels(bits: int, std_range: float) -> Tensor:
    """(v,) float32: the mean of a standard normal variable between neighbouring boundaries.

    In float32 as published, which moves the outer ones by up to 3e-5 (8 bits). Between two boundaries that are equal it
    is 0: from 10 bits on (±3) the outer levels are then useless.
    """
    edges = gaussian_boundaries(bits, std_range)
    density = (-0.5 * edges.square()).exp() / math.sqrt(2 * math.pi)
    share = (0.5 * (1 + torch.erf(edges / math.sqrt(2)))).diff()
    return -density.diff() / share.where(share != 0, 1e-10)


class BridgeQuantizer(Quantizer):
    """dim: d ≥ 2, channels of a token and codes of it. bits: of each, at most 9 at the published std_range.

    low, high: what the levels' scale, −std_range…std_range, is stretched over; the last levels lie inside of it.
    means, deviations: (d,) of each channel, which is first brought to mean 0 and deviation 1; None: it is left as it
    is, as published for latents that are scaled by one number. order: indices have channel order[j] at place j, which
    is the order that a generator predicts them in (`KL16_ORDER` is the published one); None: as the channels are.
    """

    codebook_size: int
    levels: Tensor
    values: Tensor
    means: Tensor
    deviations: Tensor
    order: Tensor

    def __init__(
        self,
        *,
        dim: int,
        bits: int = 6,
        low: float = -5.0,
        high: float = 5.0,
        std_range: float = 3.0,
        means: Sequence[float] | None = None,
        deviations: Sequence[float] | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_sizes(bits=bits)
        if dim < 2:
            raise ValueError(f"dim={dim}: tokens of one channel have no dimensions to be told apart; use 2 or more")
        if not low < high or std_range <= 0:
            raise ValueError(
                f"low={low}, high={high}, std_range={std_range}: low must be below high, std_range above 0"
            )
        check_levels(bits, std_range)
        for name, given in (("means", means), ("deviations", deviations), ("order", order)):
            if given is not None and len(given) != dim:
                raise ValueError(f"{name} has {len(given)} numbers for dim={dim}; give one for each channel")
        if deviations is not None and min(deviations) <= 0:
            raise ValueError(f"deviations={list(deviations)} are not all positive")
        if order is not None and sorted(order) != list(range(dim)):
            raise ValueError(f"order={list(order)} does not name each of the channels 0 to {dim - 1} once")
        self.dim = self.input_dim = self.depth = dim
        self.codebook_size, self.bits = 2**bits, bits
        self.low, self.high, self.std_range = low, high, std_range
        buffers = {
            "levels": gaussian_levels(bits, std_range),
            "means": torch.zeros(dim) if means is None else torch.tensor(means, dtype=torch.float32),
            "deviations": torch.ones(dim) if deviations is None else torch.tensor(deviations, dtype=torch.float32),
            "order": torch.arange(dim) if order is None else torch.tensor(order, dtype=torch.int64),
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("values", self._stretch(self.levels), persistent=False)

    def forward(self, latents: Tensor, draws: Draws | None = None) -> Quantized:
        """latents: (b, n, d). Draws nothing. No losses. Latents are of the channels' own order, indices of `order`."""
        if latents.ndim != 3 or latents.shape[-1] != self.dim:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: expected (b, n, d={self.dim})")
        with torch.autocast(latents.device.type, enabled=False):
            indices = self.nearest(((latents.detach().float() - self.means) / self.deviations)[..., self.order])
            nearest = self.lookup(indices)
            values = nearest + (latents - latents.detach())  # the gradient goes straight through
        return Quantized(values.to(latents.dtype), indices)

    def nearest(self, numbers: Tensor) -> Tensor:
        """Indices (…) of the nearest level to each of numbers (…), which have mean 0 and deviation 1.

        Not the bin that a number lies in: a level is the mean of its bin, and the middle between two is no boundary.
        """
        scaled = (numbers - self.low) / (self.high - self.low) * (2 * self.std_range) - self.std_range
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        return torch.bucketize(scaled, middles)

    def lookup(self, indices: Tensor) -> Tensor:
        """Latents (b, n, d) float32 of indices (b, n, d)."""
        numbers = torch.empty(indices.shape, dtype=torch.float32, device=indices.device)
        numbers[..., self.order] = self.values[indices]
        return numbers * self.deviations + self.means

    def _stretch(self, levels: Tensor) -> Tensor:
        return (levels + self.std_range) / (2 * self.std_range) * (self.high - self.low) + self.low


def check_levels(bits: int, std_range: float) -> None:
    """Raises ValueError where the levels do not rise: outer quantiles lie beyond ±std_range, and are cut to nothing."""
    most = 1
    while bool((gaussian_boundaries(most + 1, std_range).diff() > 0).all()):
        most += 1
    if bits > most:
        raise ValueError(
            f"bits={bits}: of {2**bits:,} quantiles the outer ones lie beyond std_range={std_range:g} and have no "
            f"level of their own; use at most {most}"
        )


def low_frequency_share(latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """(d,): how much of each channel's variance lies in low frequencies, of latents (b, h·w, d) on a grid.

    Low: at most an eighth of a cycle a token in both directions, of a half that a grid has; differences between the
    pictures' means are of frequency 0. Orders channels as TokenBridge does, whose own analysis is not published.
    """
    h, w = grid
    centred = latents.double() - latents.double().mean((0, 1))
    energy = torch.fft.fft2(centred.unflatten(1, (h, w)), dim=(1, 2)).abs().square().sum(0)  # (h, w, d)
    low = [torch.fft.fftfreq(side).abs() <= 1 / 8 for side in (h, w)]
    share = energy[low[0]][:, low[1]].sum((0, 1)) / energy.sum((0, 1)).clamp(min=1e-30)
    return share
