"""Whether draws come from a distribution that is known exactly, and how surely another one would be noticed."""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor

FALSE_ALARM = 1e-4  # of a right sampler


def assert_drawn_from(draws: Tensor, expected: Tensor) -> None:
    """draws: (N,) cells; expected: (K,) their probabilities, float64. Cells of fewer than 5 expected draws are one."""
    counts, expected = torch.bincount(draws, minlength=len(expected)).double(), expected.double()
    assert abs(float(expected.sum()) - 1) < 1e-6
    counts, probabilities = _merged(counts, expected, len(draws)), _merged(expected, expected, len(draws))
    wanted = probabilities * len(draws)
    statistic = float(((counts - wanted) ** 2 / wanted).sum())
    assert statistic < stats.chi2.ppf(1 - FALSE_ALARM, len(wanted) - 1), f"{statistic} over {len(wanted)} cells"


def power(expected: Tensor, other: Tensor, draws: int) -> float:
    """The probability that `assert_drawn_from(…, expected)` fails for so many draws from another distribution."""
    p, q = (_merged(x.double(), expected.double(), draws) for x in (expected, other))
    critical = stats.chi2.ppf(1 - FALSE_ALARM, len(p) - 1)
    return float(stats.ncx2.sf(critical, len(p) - 1, draws * float(((q - p) ** 2 / p).sum())))


def _merged(values: Tensor, expected: Tensor, draws: int) -> Tensor:
    """The cells that are expected often enough, and the sum of the others, where there are any."""
    often = expected * draws >= 5
    rest = values[~often].sum()[None]
    return torch.cat([values[often], rest]) if float(expected[~often].sum()) * draws > 0 else values[often]
