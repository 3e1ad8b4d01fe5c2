"""Autoregressive decoding: next-token distribution, filters, choice; over a static cache of keys and values.

The three are exchangeable. The distribution is a `Predictor`'s, which keeps what it knows of earlier tokens and takes
one or several new ones at a time; a cache is written by position, so that tokens which are taken back are overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from smalti.generators.decoding.choice import inverse_cdf
from smalti.generators.decoding.guidance import guide


class Predictor(Protocol):
    """A model with its condition and its memory of a sequence, for r rows.

    With guidance the rows are two halves, of the same tokens: under the condition, and under the null condition.
    """

    def begin(self, tokens: Tensor) -> Tensor:
        """Read the condition and the first tokens (r, k), of which there may be none. Logits (r, k + 1, v): of the
        first token, and of what follows each."""
        ...

    def __call__(self, tokens: Tensor, start: int) -> Tensor:
        """Logits (r, m, v) of what follows each of the tokens (r, m), which stand at start…start + m − 1."""
        ...

    def keep(self, rows: int) -> None:
        """Forget all rows but the first ones; also before `begin`."""
        ...


@dataclass(frozen=True)
class Decoded:
    """indices: (b, n). log_probabilities: (b, n − k) of those that were chosen (k were given), in the distribution that
    they were chosen from: after guidance and filters."""

    indices: Tensor
    log_probabilities: Tensor


def decode(
    predict: Predictor,
    uniform: Tensor,
    *,
    filters: Callable[[Tensor], Tensor],
    scales: Sequence[float],
    given: Tensor | None = None,
) -> Decoded:
    """A sequence for each row of `uniform` (b, n), one token after the other.

    uniform: numbers in [0, 1), on the model's device; number i chooses token i by inverse CDF.
    filters: (b, v) logits after guidance to logits, −inf for what cannot be chosen.
    scales: guidance scale of each of the n tokens. Where one is not 1 (none), `predict` has 2b rows and both halves are
    computed, up to the last such token; from then on, the conditional one only. given: (b, k) first tokens.
    """
    b, n = uniform.shape
    new = torch.empty(b, 0, dtype=torch.int64, device=uniform.device) if given is None else given
    indices, chances = [new], []
    last_guided = max((i for i, scale in enumerate(scales) if scale != 1), default=-1)
    halves = 2 if last_guided >= 0 else 1
    for i in range(first := new.shape[1], n):
        if halves == 2 and i > last_guided:
            predict.keep(b)
            halves = 1
        rows = new.repeat(halves, 1)
        logits = (predict.begin(rows) if i == first else predict(rows, i - 1))[:, -1].float()
        probabilities = filters(guide(logits, scales[i]) if halves == 2 else logits).softmax(-1)
        new = inverse_cdf(probabilities, uniform[:, i])[:, None]
        indices.append(new)
        chances.append(probabilities.gather(-1, new))
    drawn = torch.cat(chances, 1) if chances else uniform.new_empty(b, 0, dtype=torch.float32)
    return Decoded(torch.cat(indices, 1), drawn.log())
