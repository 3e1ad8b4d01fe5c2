"""Masked decoding: all tokens are unknown at first; each step predicts the unknown ones and keeps the surest.

One loop; a method is its four parts:
  predictor  (tokens, masked, step) -> Prediction   tokens for the masked positions; its random numbers are its own, and
                                                    so is what it may keep from one step to the next
  schedule   (left, step) -> int                    how many of `left` masked positions stay masked
  scorer     (prediction, step) -> (b, n)           how sure each predicted token is; larger is surer
  rule       (scores, masked, count) -> (b, n) bool which positions stay masked: `count` of each sample
MaskGIT (Chang et al. 2022, arXiv:2202.04200) scores what it sampled, and `least_sure` stay masked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Step `index` of `steps`."""

    index: int
    steps: int

    @property
    def begun(self) -> float:
        """The share of the steps that were made before this one, 0 in the first."""
        return self.index / self.steps

    @property
    def done(self) -> float:
        """The share of the steps that are made after this one, 1 in the last."""
        return (self.index + 1) / self.steps


@dataclass(frozen=True)
class Prediction:
    """tokens: (b, n, …), read where masked. logits: (b, n, v), what they were drawn from."""

    tokens: Tensor
    logits: Tensor


@dataclass(frozen=True)
class MaskedDecoder:
    """The parts of a method, see the top of this file."""

    predictor: Callable[[Tensor, Tensor, Step], Prediction]
    schedule: Callable[[int, Step], int]
    scorer: Callable[[Prediction, Step], Tensor]
    rule: Callable[[Tensor, Tensor, int], Tensor]

    def __call__(self, tokens: Tensor, steps: int) -> Tensor:
        """tokens: (b, n, …) of which none is known, in shape, dtype and device of the result."""
        masked = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        left = masked.shape[1]  # in every sample
        for step in (Step(index, steps) for index in range(steps)):
            prediction = self.predictor(tokens, masked, step)
            unknown = masked.view(*masked.shape, *[1] * (tokens.ndim - 2))
            tokens = torch.where(unknown, prediction.tokens, tokens)
            if step.index < steps - 1:
                left = self.schedule(left, step)
                masked = self.rule(self.scorer(prediction, step), masked, left)
        return tokens


def least_sure(scores: Tensor, masked: Tensor, count: int) -> Tensor:
    """Of the masked positions, the `count` with the smallest scores; of equal ones the first.

    The published code keeps all scores at or below the count-th masked, which re-masks more where scores are equal.
    """
    order = scores.masked_fill(~masked, torch.inf).argsort(dim=-1, stable=True)
    return torch.zeros_like(masked).scatter(1, order[:, :count], True)
