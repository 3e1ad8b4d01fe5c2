"""How many leading tokens of an image a decoder sees in training, so that any prefix can be decoded afterwards.

Nested dropout (Rippel et al. 2014, arXiv:1402.0915) as in FlexTok (arXiv:2502.13967), tail token drop as in One-D-Piece
(arXiv:2501.10064), and null dropout, which hides all tokens, for guidance.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

from smalti.registry import Described
from smalti.tokenizers.quantizers.base import Draws


class Regularizer(nn.Module, metaclass=Described):
    """Draws keep lengths: a tokenizer trained with one is `prefix_decodable`. The tokenizer hides what is not kept."""

    @abstractmethod
    def draw(self, batch_size: int, length: int, generator: torch.Generator) -> Draws:
        """{"lengths": (b,) int64 in 1…length} on the CPU, for one training forward."""
