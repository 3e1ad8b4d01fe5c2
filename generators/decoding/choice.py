"""How one token is chosen from a distribution, and the numbers that choose it: uniform, or normal of continuous ones.

A sample's numbers depend on its own seed alone, so that neither batch size nor process count changes its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from smalti.training.draws import generator


def uniforms(seeds: Tensor | Sequence[int], shape: Sequence[int], *key: int | str) -> Tensor:
    """Uniform numbers in [0, 1), (b, *shape) float64 on the CPU: row i from (seeds[i], key) alone.

    key: what they are for, such as ("token",) or ("confidence", step). Float64, because the smallest step of float32
    would cut the tails off (a float32 Gumbel number cannot exceed 16.6).
    """
    return _rows(torch.rand, seeds, shape, *key)


def normals(seeds: Tensor | Sequence[int], shape: Sequence[int], *key: int | str) -> Tensor:
    """Standard normal numbers, (b, *shape) float32 on the CPU, made in float64: row i from (seeds[i], key) alone."""
    return _rows(torch.randn, seeds, shape, *key).float()


def _rows(draw: Callable[..., Tensor], seeds: Tensor | Sequence[int], shape: Sequence[int], *key: int | str) -> Tensor:
    rows = [
        draw(*shape, generator=generator("sample", int(seed), *key), dtype=torch.float64)
        for seed in (seeds.tolist() if isinstance(seeds, Tensor) else seeds)
    ]
    return torch.stack(rows) if rows else torch.empty(0, *shape, dtype=torch.float64)


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Indices (…) of probabilities (…, v) by uniform (…) in [0, 1): the number of cumulative probabilities ≤ uniform.

    Summed and compared in float64; the sum may differ from 1 by rounding. An index of probability 0 is never chosen.
    """
    cumulative = probabilities.double().cumsum(-1)
    target = uniform.to(cumulative)[..., None] * cumulative[..., -1:]
    # Rounding of the product may reach the whole sum: the last index with any probability is the largest answer.
    last = torch.searchsorted(cumulative, cumulative[..., -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), last)[..., 0]
