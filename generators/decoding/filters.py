"""What is left of a next-token distribution before a token is chosen: temperature, top-k, top-p, in this order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Filters:
    """temperature: logits are divided by it; 0 leaves the most probable token alone (argmax).
    top_k: how many of the most probable are kept, None: all. top_p: see `keep_top_p`, 1: all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative; 0 is argmax")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} is not positive; None keeps all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]; 1 keeps all")

    def __call__(self, logits: Tensor) -> Tensor:
        """logits: (…, v); returns the same shape, −inf for what cannot be chosen."""
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = keep_top_k(logits, self.top_k)
        return keep_top_p(logits, self.top_p) if self.top_p < 1 else logits


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest; whatever ties with the k-th is kept, too."""
    least = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The most probable ones until their sum exceeds p, the one with which it does included; at least one."""
    ordered, places = logits.sort(dim=-1, descending=True, stable=True)
    sums = ordered.double().softmax(-1).cumsum(-1)
    before = torch.cat([torch.zeros_like(sums[..., :1]), sums[..., :-1]], -1)
    removed = torch.zeros_like(before, dtype=torch.bool).scatter(-1, places, before > p)
    return logits.masked_fill(removed, -torch.inf)
