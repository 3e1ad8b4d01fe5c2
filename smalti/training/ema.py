"""The published exponential moving average of a tokenizer's weights, for validation and export."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class EMAConfig:
    """decay: the largest one; 0 keeps a plain copy of the weights.

    min_decay: a floor once averaging began. update_after_step: plain copies until then. update_every: updates between
    two averagings. use_ema_warmup: rise as 1 − (1 + s/inv_gamma)^−power instead of the default (1 + s)/(10 + s).
    """

    decay: float = 0.999
    min_decay: float = 0.0
    update_after_step: int = 0
    update_every: int = 1
    use_ema_warmup: bool = False
    inv_gamma: float = 1.0
    power: float = 2 / 3

    def at(self, count: int) -> float:
        """The decay of the `count`-th update (from 1). The first one copies the weights."""
        s = count - self.update_after_step - 1
        if s <= 0:
            return 0.0
        rising = 1 - (1 + s / self.inv_gamma) ** -self.power if self.use_ema_warmup else (1 + s) / (10 + s)
        return max(min(rising, self.decay), self.min_decay)


class EMA(nn.Module):
    """`model`: a copy of the live model whose trainable parameters are averaged; use it directly to encode and decode.

    Parameters that are frozen when the copy is made are shared with the live model, not copied: no memory, no work.
    Buffers follow the live model's.
    """

    model: nn.Module

    def __init__(self, live: nn.Module, config: EMAConfig) -> None:
        super().__init__()
        self.config = config
        self.model = copy.deepcopy(live, {id(p): p for p in live.parameters() if not p.requires_grad})
        self.model.eval().requires_grad_(False)
        self._live = [p for p in live.parameters() if p.requires_grad]
        averaged = dict(self.model.named_parameters())
        self._averaged = [averaged[name] for name, p in live.named_parameters() if p.requires_grad]
        self._buffers_of = (live, self.model)

    @torch.no_grad()
    def update(self, count: int) -> None:
        """To be called after every optimizer update with the number of updates made so far, this one included."""
        if (count - 1) % self.config.update_every:
            return
        # average ← average + (1 − decay) · (weights − average); one launch for all parameters
        torch._foreach_lerp_(self._averaged, self._live, 1 - self.config.at(count))
        self.copy_buffers()

    def copy_buffers(self) -> None:
        live, averaged = self._buffers_of
        for source, target in zip(live.buffers(), averaged.buffers(), strict=True):
            target.copy_(source)

    def train(self, mode: bool = True) -> EMA:
        """The averaged model stays in evaluation mode."""
        return self
