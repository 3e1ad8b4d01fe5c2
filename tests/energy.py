"""Whether two samples come from one distribution: the energy distance (Székely and Rizzo 2004) by permutations."""

from __future__ import annotations

import torch
from torch import Tensor


def p_value(x: Tensor, y: Tensor, permutations: int = 299, seed: int = 0) -> float:
    """The share of relabellings under which the energy distance of x and y (n, c) is as large as it is: uniform where
    the distribution is one, at least 1 / (permutations + 1)."""
    assert x.shape == y.shape
    n = len(x)
    distances = torch.cdist(*[torch.cat([x, y]).double()] * 2).float()
    signs = torch.ones(permutations + 1, 2 * n)
    signs[:, n:] = -1
    generator = torch.Generator().manual_seed(seed)
    for row in signs[1:]:
        row.copy_(row[torch.randperm(2 * n, generator=generator)])
    energy = -((signs @ distances) * signs).sum(1)  # n² · (2 E|x − y| − E|x − x'| − E|y − y'|)
    return float((energy >= energy[0]).sum()) / (permutations + 1)
