"""The smallest generators: each token from its class and place alone. Of indices, with draws, dropout and a buffer to
lose; and of latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from smalti.generators.base import Condition, Generator, GeneratorOutput, accept_codes, refuse
from smalti.generators.decoding.choice import inverse_cdf, uniforms
from smalti.registry import register
from smalti.tokenizers.quantizers.base import Draws
from smalti.tokenizers.spec import Tokens, TokenSpec


@dataclass(frozen=True)
class ToySampling:
    """Probabilities are the softmax of logits / temperature."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")


class ToyGenerator(Generator):
    """Logits (b, n, v) = an embedding of the class through a linear map."""

    def __init__(
        self,
        *,
        tokens: TokenSpec | Mapping[str, Any],
        num_classes: int | None = None,
        width: int = 8,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tokens)
        self.num_classes, self.label_dropout = num_classes, label_dropout
        self.sampling = ToySampling(**(sampling or {}))
        self.classes = nn.Embedding((num_classes or 0) + 1, width)  # the last one is the null condition
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, self.spec.length * (self.spec.codebook_size or 0))
        self.register_buffer("seen", torch.zeros(()))

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        accept_codes("ToyGenerator", spec)

    def logits(self, labels: Tensor | None, b: int) -> Tensor:
        null = self.num_classes or 0
        labels = torch.full((b,), -1, device=self.head.weight.device) if labels is None else labels
        width = self.dropout(self.classes(labels.where(labels >= 0, null)))
        return self.head(width).unflatten(-1, (self.spec.length, -1))

    def forward(self, tokens: Tokens, condition: Condition, draws: Draws) -> GeneratorOutput:
        assert tokens.indices is not None
        labels = condition.labels
        if labels is not None:
            labels = labels.where(draws["drop"] >= self.label_dropout, -1)
        if self.training:
            self.seen += len(tokens)
        logits = self.logits(labels, len(tokens)).float()
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens.indices.flatten())
        accuracy = (logits.argmax(-1) == tokens.indices).float().mean()
        return GeneratorOutput({"cross_entropy": loss}, {"accuracy": accuracy})

    def draw(self, batch_size: int, generator: torch.Generator, *, step: int) -> Draws:
        return {"drop": torch.rand(batch_size, generator=generator)}

    @torch.inference_mode()
    def generate(
        self,
        condition: Condition,
        *,
        seeds: Tensor,
        length: int | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> Tokens:
        self.check_condition(condition)
        k, settings = self.check_length(length), ToySampling(**{**asdict(self.sampling), **(sampling or {})})
        logits = self.logits(condition.labels, len(seeds)) / settings.temperature
        probabilities = logits.softmax(-1)[:, :k]
        indices = inverse_cdf(probabilities, uniforms(seeds, (self.spec.length,), "token")[:, :k])
        padding = indices.new_zeros(len(seeds), self.spec.length - k)
        return Tokens.full(None, torch.cat([indices, padding], dim=1)).prefix(k)


class ToyLatents(Generator):
    """Latents (b, n, d), each standard normal around a mean for its class and place."""

    def __init__(self, *, tokens: TokenSpec | Mapping[str, Any], num_classes: int | None = None) -> None:
        super().__init__(tokens)
        self.num_classes = num_classes
        self.means = nn.Embedding((num_classes or 0) + 1, self.spec.length * self.spec.dim)

    @classmethod
    def accepts(cls, spec: TokenSpec) -> None:
        if spec.kind != "continuous":
            raise refuse("ToyLatents", spec, "it predicts latents", "use a tokenizer with quantizer=kl")

    def mean(self, labels: Tensor | None, b: int) -> Tensor:
        null = self.num_classes or 0
        labels = torch.full((b,), -1, device=self.means.weight.device) if labels is None else labels
        return self.means(labels.where(labels >= 0, null)).unflatten(-1, (self.spec.length, self.spec.dim))

    def forward(self, tokens: Tokens, condition: Condition, draws: Draws) -> GeneratorOutput:
        assert tokens.latents is not None
        return GeneratorOutput({"l2": (tokens.latents - self.mean(condition.labels, len(tokens))).square().mean()})

    def draw(self, batch_size: int, generator: torch.Generator, *, step: int) -> Draws:
        return {}

    @torch.inference_mode()
    def generate(
        self,
        condition: Condition,
        *,
        seeds: Tensor,
        length: int | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> Tokens:
        self.check_condition(condition)
        k = self.check_length(length)
        u = uniforms(seeds, (self.spec.length, self.spec.dim), "latent")
        mean = self.mean(condition.labels, len(seeds))
        return Tokens.full(mean + torch.special.ndtri(u.clamp(min=1e-12)).to(mean)).prefix(k)


register("toy_generator", ToyGenerator)
register("toy_latents", ToyLatents)
