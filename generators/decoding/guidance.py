"""Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598): one rule, and scales that vary by step.

The scale is w of uncond + w · (cond − uncond); 1 is no guidance. Papers that write cond + w · (cond − uncond) mean ours
minus 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from smalti.settings import check_choice

SCHEDULES = ("constant", "linear", "power_cosine")


def guide(logits: Tensor, scale: float) -> Tensor:
    """uncond + scale · (cond − uncond) of logits (2b, …), whose first half is conditional; returns (b, …)."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def scales(
    scale: float, steps: int, schedule: str = "constant", *, power: float = 3.0, until: int | None = None
) -> list[float]:
    """The guidance scale of every step s = 0…steps − 1.

    schedule: "constant"; "linear", 1 + (scale − 1) · s / steps; "power_cosine",
    1 + (scale − 1) · (1 − cos π(s / steps)^power) / 2, whose power 0 is constant. until: steps that are guided at all
    (None: every one); the others have scale 1.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} of guidance is not known; use one of {', '.join(SCHEDULES)}")
    guided = steps if until is None else min(until, steps)
    shares = {
        "constant": lambda s: 1.0,
        "linear": lambda s: s / steps,
        "power_cosine": lambda s: (1 - math.cos(math.pi * (s / steps) ** power)) / 2,
    }
    share = shares[schedule]
    return [1 + (scale - 1) * share(s) for s in range(guided)] + [1.0] * (steps - guided)


def scales_by_tokens(scale: float, counts: Sequence[int], schedule: str = "linear") -> list[float]:
    """The guidance scale of iterations that predict so many tokens each.

    schedule: "constant", or "linear" in the share of tokens that are known after the iteration, of which the last one
    counts all but one: 1 + (scale − 1) · share, as MAR has it.
    """
    check_choice("guidance_schedule", schedule, ("constant", "linear"))
    n = sum(counts)
    shares = [1.0] * len(counts) if schedule == "constant" else [min(k, n - 1) / n for k in accumulate(counts)]
    return [1 + (scale - 1) * share for share in shares]
