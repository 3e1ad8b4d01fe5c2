"""The published exponential moving average of a tokenizer's weights, for validation and export."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class EMAConfig:
    """decay: the largest one; 0 keeps a plain copy of the weights.

    min_decay: a floor once averaging began. update_after_step: plain copies until then. update_every: updates between
    two averagings. use_ema_warmup: rise as 1 − (1 + s/inv_gamma)^−power instead of the default (1 + s)/(10 + s).
    constant: `decay` itself at every update, from the first on, so that the average begins at the weights before any
    training (LlamaGen).
    """

    decay: float = 0.999
    min_decay: float = 0.0
    update_after_step: int = 0
    update_every: int = 1
    use_ema_warmup: bool = False
    inv_gamma: float = 1.0
    power: float = 2 / 3
    constant: bool = False

    def at(self, count: int) -> float:
        """The decay of the `count`-th update (from 1). The first one copies the weights, unless it is constant."""
        if self.constant:
            return self.decay
        s = count - self.update_after_step - 1
        if s <= 0:
            return 0.0
        rising = 1 - (1 + s / self.inv_gamma) ** -self.power if self.use_ema_warmup else (1 + s) / (10 + s)
        return max(min(rising, self.decay), self.min_decay)


class EMA(nn.Module):
    """`model`: a copy of the live model whose trainable parameters are averaged; use it directly to encode and decode.

    Parameters that are frozen when the copy is made follow the live ones: they are shared, which costs neither memory
    nor work, unless updates are rarer than steps. Buffers are copied.
    """

    model: nn.Module

    def __init__(self, live: nn.Module, config: EMAConfig) -> None:
        super().__init__()
        self.config = config
        frozen = [parameter for parameter in live.parameters() if not parameter.requires_grad]
        shared = {id(parameter): parameter for parameter in frozen} if config.update_every == 1 else {}
        self.model = copy.deepcopy(live, shared)
        self.model.eval().requires_grad_(False)
        pairs = list(zip(self.model.parameters(), live.parameters(), strict=True))
        self._averaged: list[Tensor] = [mine for mine, theirs in pairs if theirs.requires_grad]
        self._live: list[Tensor] = [theirs for _, theirs in pairs if theirs.requires_grad]
        self._copied = [(mine, theirs) for mine, theirs in pairs if not theirs.requires_grad and mine is not theirs]
        self._buffers_of = (self.model, live)

    @torch.no_grad()
    def update(self, count: int) -> None:
        """To be called after every optimizer update with the number of updates made so far, this one included."""
        if (count - 1) % self.config.update_every:
            return
        # average ← average − (1 − decay) · (average − weights)
        weight = 1 - self.config.at(count)
        if weight == 1:
            torch._foreach_copy_(self._averaged, self._live)
        elif self.config.constant:  # LlamaGen's operations: at 0.9999 what each rounds off shows in weights near 1
            torch._foreach_mul_(self._averaged, self.config.decay)
            torch._foreach_add_(self._averaged, self._live, alpha=weight)
        elif weight < 0.5:
            torch._foreach_lerp_(self._averaged, self._live, weight)  # one launch for all parameters
        else:  # the first few updates, where lerp takes another formula, which rounds differently
            torch._foreach_sub_(self._averaged, torch._foreach_sub(self._averaged, self._live), alpha=weight)
        averaged, live = self._buffers_of
        for mine, theirs in [*self._copied, *zip(averaged.buffers(), live.buffers(), strict=True)]:
            mine.copy_(theirs)

    def train(self, mode: bool = True) -> EMA:
        """The averaged model stays in evaluation mode."""
        return self
