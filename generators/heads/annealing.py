"""Diffusion step annealing (Zhao et al. 2025, arXiv:2505.20297): the more tokens are known, the fewer steps the next
ones need, since they are nearly determined. Training-free.

MAR: 64 iterations, linearly from 50 steps to 5, with timesteps clipped at 950. The same rule with scales or clusters
for iterations gives the steps of FlowAR (25 to 15 over 5 scales) and xAR (50 to 15 over 4 clusters).
"""

from __future__ import annotations

import math
from collections.abc import Callable

# How far the number of steps is above the lowest, as a share, at iteration s of 0…last.
ANNEALINGS: dict[str, Callable[[int, int], float]] = {
    "linear": lambda s, last: (last - s) / last,
    "cosine": lambda s, last: (math.cos(math.pi * s / last) + 1) / 2,
    "two-stage": lambda s, last: 1.0 if s < last / 2 else 0.0,
    "constant": lambda s, last: 0.0,
}


def annealed_steps(annealing: str, iteration: int, iterations: int, first: int, last: int) -> int:
    """Steps of iteration 0…iterations − 1: from `first` to `last`, rounded down.

    An only iteration is a first one (the published rule divides by zero there). The timesteps that a diffusion then
    runs may be fewer: those that `max_timestep` makes equal are one.
    """
    share = ANNEALINGS[annealing](iteration, max(iterations - 1, 1))
    return last + int(share * (first - last))
