"""The contract of every tokenizer: images (b, 3, h, w) in [0, 1] to `Tokens` and back."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from smalti.registry import Described
from smalti.tokenizers.quantizers.base import Draws, Quantized
from smalti.tokenizers.spec import Tokens, TokenSpec


@dataclass(frozen=True)
class TokenizerOutput:
    """A training forward.

    quantized: what the bottleneck gave, with its losses.
    reconstruction: (b, 3, h, w), not clamped; None for a model that predicts proxy codes only.
    logits: (b, v, h, w) over the proxy codes of a frozen tokenizer, None for models without.
    """

    quantized: Quantized
    reconstruction: Tensor | None = None
    logits: Tensor | None = None


class Tokenizer(nn.Module, PyTorchModelHubMixin, metaclass=Described):
    """Images to tokens and back.

    Constructor arguments are keyword-only, plain JSON values or other described modules (a quantizer): they are the
    config keys, and what an export's config.json holds.
    """

    spec: TokenSpec

    @abstractmethod
    def encode(self, images: Tensor) -> Tokens:
        """images: (b, 3, h, w) float in [0, 1]. Inference mode; any batch size; leaves training state alone."""

    @abstractmethod
    def decode(self, tokens: Tokens, *, seed: int = 0) -> Tensor:
        """Images (b, 3, h, w) in [0, 1], clamped. `seed` fixes the draws of decoders that sample."""

    @abstractmethod
    def forward(self, images: Tensor, draws: Draws | None = None) -> TokenizerOutput:
        """images: (b, 3, h, w) float in [0, 1]; `draws` as made by `draw`."""

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        """The random numbers of one training forward of `batch_size` images."""
        return {}
