"""Mask schedules of masked generators: how many tokens are unknown, in training and in sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "arccos": lambda t: torch.acos(t) / (math.pi / 2),
    "cosine": lambda t: torch.cos(t * math.pi / 2),
    "linear": lambda t: 1 - t,
    "root": lambda t: 1 - t.sqrt(),
    "square": lambda t: 1 - t**2,
}


def masked_share(schedule: str, uniform: Tensor) -> Tensor:
    """How much of a training sequence is masked, in [1e-6, 1]; uniform: in [0, 1], how far decoding has come."""
    return SCHEDULES[schedule](uniform).clamp(1e-6, 1)


def random_mask(schedule: str, uniform: Tensor, order: Tensor) -> Tensor:
    """The masks (b, n) bool of a training batch, at least one token of each sample masked.

    uniform: (b,), as of `masked_share`; the number is rounded half to even. order: (b, n) uniforms, whose argsort says
    which tokens: position i is masked where the entry i of that permutation, not its rank, is below the number.
    """
    count = (order.shape[1] * masked_share(schedule, uniform)).round().clamp(min=1)
    return order.argsort(dim=-1) < count[:, None]


def stay_masked(schedule: str, n: int, left: int, done: float) -> int:
    """Tokens of n that stay masked when the share `done` of the steps is behind, of `left` masked ones before.

    Rounded down, but at least one fewer than before, and never fewer than one: the last step predicts all that is left.
    """
    share = float(SCHEDULES[schedule](torch.tensor(done, dtype=torch.float64)))
    return max(1, min(left - 1, math.floor(n * share)))


def tokens_per_iteration(n: int, iterations: int) -> list[int]:
    """How many of n tokens each iteration predicts, few at first: after iteration s = 1…iterations, n · cos(π/2 · s /
    iterations) are left, rounded down, but at least one token is predicted in each (MAR).

    Raises ValueError for more iterations than tokens.
    """
    if not 1 <= iterations <= n:
        raise ValueError(
            f"iterations={iterations} for {n} tokens: each predicts one or more; use 1 to {n}, or null for {n}"
        )
    left = [n]
    for s in range(1, iterations):  # not `stay_masked`, whose cosine rounds otherwise where n · cos is nearly whole
        left.append(max(1, min(left[-1] - 1, math.floor(n * math.cos(math.pi / 2 * s / iterations)))))
    return [before - after for before, after in pairwise([*left, 0])]


def mask_ratio(uniform: Tensor, least: float) -> Tensor:
    """Ratios in [least, 1] by inverse CDF of uniform numbers in [0, 1): normal with mean 1 and standard deviation 0.25,
    truncated (MAR). In float64."""
    low = torch.special.ndtr(torch.tensor((least - 1) / 0.25, dtype=torch.float64))
    return (1 + 0.25 * torch.special.ndtri(low + uniform.double() * (0.5 - low))).clamp(least, 1)
