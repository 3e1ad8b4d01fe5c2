"""Between what the figures of samples lie: a tokenizer's reconstructions of real images, and its random tokens.

A generator's tokens are decoded by the same tokenizer as the first; the second knows nothing: uniform indices, or
standard normal latents where tokens are continuous.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from smalti.errors import UserError
from smalti.evaluation.adm import sample_to_uint8
from smalti.generation import decode_numbered
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.spec import Tokens
from smalti.training.draws import generator as draws_of


@dataclass(frozen=True)
class Bounds:
    """Images that are decoded, resized and quantised as samples are. length: tokens of an image, None: all."""

    tokenizer: Tokenizer
    device: torch.device
    length: int | None = None
    size: int | None = None
    seed: int = 0

    @torch.inference_mode()
    def reconstructions(self, ranges: Sequence[range], batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """uint8 (b, 3, h, w) of uint8 images alike, those of each range of numbers."""
        side = self.tokenizer.spec.image_size
        for numbers, images in zip(ranges, batches, strict=True):
            x = images.to(self.device).float() / 255
            if x.shape[-1] != side:  # samples of another size are resized behind the decoder
                x = torch.nn.functional.interpolate(x, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
            yield self._decoded(self._prefix(self.tokenizer.encode(x)), numbers)

    @property
    def random_name(self) -> str:
        """What the tokens of `random` are, for the names of figures."""
        return "uniform_tokens" if self.tokenizer.spec.kind == "discrete" else "standard_normal_latents"

    @torch.inference_mode()
    def random(self, ranges: Sequence[range]) -> Iterator[Tensor]:
        """uint8 (b, 3, h, w) of random tokens; those of a number are drawn from (seed, number) alone."""
        for numbers in ranges:
            drawn = torch.stack([self._drawn(number) for number in numbers]).to(self.device)
            discrete = self.tokenizer.spec.kind == "discrete"
            tokens = Tokens.full(None, drawn) if discrete else Tokens.full(drawn)  # as a generator gives them
            yield self._decoded(self._prefix(tokens), numbers)

    def _drawn(self, number: int) -> Tensor:
        """Indices (n,) or (n, q), or latents (n, d) of the scale that tokens have."""
        spec = self.tokenizer.spec
        if spec.codebook_size is None:
            return torch.randn(spec.length, spec.dim, generator=draws_of("normal", self.seed, number))
        shape = (spec.length,) if spec.depth == 1 else (spec.length, spec.depth)
        return torch.randint(spec.codebook_size, shape, generator=draws_of("uniform", self.seed, number))

    def _prefix(self, tokens: Tokens) -> Tokens:
        if self.length is None:
            return tokens
        try:
            return tokens.prefix(self.length)
        except ValueError as error:
            raise UserError(f"length={self.length}: {error}") from error

    def _decoded(self, tokens: Tokens, numbers: range) -> Tensor:
        images = decode_numbered(self.tokenizer, tokens, numbers, self.seed)
        return rearrange(sample_to_uint8(images, self.size), "b h w c -> b c h w").cpu().contiguous()
