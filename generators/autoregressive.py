"""What generators that write one token after the other have in common: sampling, over `decoding.autoregressive`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.generators.base import Condition, Generator
from smalti.generators.decoding import guidance
from smalti.generators.decoding.autoregressive import Decoded, Predictor, decode
from smalti.generators.decoding.choice import uniforms
from smalti.generators.decoding.filters import Filters
from smalti.settings import override
from smalti.tokenizers.spec import Tokens


@dataclass(frozen=True)
class AutoregressiveSampling:
    """How `generate` chooses tokens.

    temperature (0: argmax), top_k, top_p: fields of `Filters`. guidance: scale w of uncond + w · (cond − uncond), 1 is
    none. guidance_schedule, guidance_power: of `decoding.guidance.scales`. guidance_until: how many of the first tokens
    are guided, None: all (LlamaGen's cfg_interval is this minus 2).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    guidance: float = 1.0
    guidance_schedule: str = "constant"
    guidance_power: float = 3.0
    guidance_until: int | None = None

    def __post_init__(self) -> None:
        self.filters()
        self.scales(1)

    def filters(self) -> Filters:
        return Filters(self.temperature, self.top_k, self.top_p)

    def scales(self, n: int) -> list[float]:
        """The guidance scale of each of n tokens."""
        return guidance.scales(
            self.guidance, n, self.guidance_schedule, power=self.guidance_power, until=self.guidance_until
        )


class AutoregressiveGenerator(Generator):
    """sampling: the default one; may be changed after construction, to settings of the same class."""

    sampling: AutoregressiveSampling

    @abstractmethod
    def predictor(
        self, condition: Condition, rows: int, *, guided: bool = False, sampling: AutoregressiveSampling | None = None
    ) -> Predictor:
        """Next-token logits of `rows` sequences; guided: of as many more under the null condition, behind them.

        sampling: settings that it depends on, None: the model's own.
        """

    @torch.inference_mode()
    def generate(
        self,
        condition: Condition,
        *,
        seeds: Tensor,
        length: int | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> Tokens:
        n = self.check_length(length)
        self.check_condition(condition)
        uniform = uniforms(seeds, (self.spec.length,), "token")[:, :n]  # so that a prefix is the first tokens of all
        made = self.sample(condition, uniform, **(sampling or {})).indices
        return Tokens.full(None, F.pad(made, (0, self.spec.length - n))).prefix(n)

    @torch.inference_mode()
    def sample(self, condition: Condition, uniform: Tensor, *, given: Tensor | None = None, **sampling: Any) -> Decoded:
        """Sequences by uniform numbers (b, n), one for each token; given: (b, k) first tokens. sampling: settings over
        the model's own. Raises ValueError for guidance without a null condition."""
        settings = override(self.sampling, "sampling", sampling)
        device = next(self.parameters()).device
        b, n = uniform.shape
        scales = settings.scales(self.spec.length)[:n]
        guided = any(scale != 1 for scale in scales) and not condition.empty
        if guided:
            self.check_guidance(settings.guidance)
        return decode(
            self.predictor(condition, b, guided=guided, sampling=settings),
            uniform.to(device),
            filters=settings.filters(),
            scales=scales if guided else [1.0] * n,
            given=None if given is None else given.to(device),
        )


def cross_entropy(logits: Tensor, indices: Tensor, lengths: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over kept tokens of logits (b, n, v) and indices (b, n); lengths (b,) says how many are kept of each sample,
    `weight` (b,), where given, how much they count. 0 where nothing counts."""
    b, n = indices.shape
    losses = F.cross_entropy(logits.flatten(0, 1), indices.flatten(), reduction="none").view(b, n)
    counts = (torch.arange(n, device=losses.device) < lengths.to(losses.device)[:, None]).to(losses)
    if weight is not None:
        counts = counts * weight.to(losses)[:, None]
    return (losses * counts).sum() / counts.sum().clamp(min=1)
