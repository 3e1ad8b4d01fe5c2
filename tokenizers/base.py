"""The contract of every tokenizer: images (b, 3, h, w) in [0, 1] to `Tokens` and back."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.model import Model
from smalti.tokenizers.quantizers.base import Draws, Quantized, Quantizer
from smalti.tokenizers.quantizers.kl import GaussianQuantizer, LatentScale
from smalti.tokenizers.spec import Tokens


@dataclass(frozen=True)
class TokenizerOutput:
    """A training forward.

    quantized: what the bottleneck gave, with its losses.
    reconstruction: (b, 3, h, w), not clamped; None for a model that predicts proxy codes or a flow only.
    logits: (b, v, h, w) over the proxy codes of a frozen tokenizer, None for models without.
    flow: what a decoder that denoises gave, None for others.
    """

    quantized: Quantized
    reconstruction: Tensor | None = None
    logits: Tensor | None = None
    flow: Flow | None = None


@dataclass(frozen=True)
class Flow:
    """One noise level of a rectified flow per image.

    velocity, target: (b, c, h, w) predicted, and noise − clean. sigma: (b,) noise levels in [0, 1], 1 is noise alone.
    lengths: (b,) tokens that the decoder saw, 0 without condition. features: (b, n, d) of an early block, for a
    representation loss, or None.
    """

    velocity: Tensor
    target: Tensor
    sigma: Tensor
    lengths: Tensor
    features: Tensor | None = None


class Tokenizer(Model):
    """Images to tokens and back; `spec` says what kind of tokens."""

    quantizer: Quantizer

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

    @property
    def latent_scale(self) -> LatentScale | None:
        """Of continuous tokens, which are latents times its factor; None: they have no scale of their own."""
        quantizer = getattr(self, "quantizer", None)
        return quantizer.scale if isinstance(quantizer, GaussianQuantizer) else None

    @property
    def has_posterior(self) -> bool:
        """Whether an image has a distribution of tokens, of which generators learn samples: by `moments_of`."""
        return False

    def moments_of(self, images: Tensor) -> Tensor:
        """Means and log-variances (b, n, 2·d) of the posteriors of images' latents, means first, not scaled.

        Inference mode. `sample` makes tokens of them, with new noise as often as wanted. Raises ValueError for
        tokenizers that have no posterior.
        """
        raise ValueError(f"{type(self).__name__} has no posterior; `encode` gives its tokens")

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tokens:
        """Tokens of posteriors (b, n, 2·d), scaled, float32. noise: (b, n, d) standard normal; None: their means."""
        scale = self.latent_scale
        latents = GaussianQuantizer.sample(moments, noise)
        return Tokens.full(latents if scale is None else latents * scale.factor)

    def scaled(self, quantized: Quantized) -> Tokens:
        """What the bottleneck gave as tokens: continuous ones are scaled, by `latent_scale`."""
        scale = self.latent_scale
        latents = quantized.latents if scale is None else quantized.latents * scale.factor
        return Tokens.full(latents, quantized.indices)

    def check_images(self, images: Tensor) -> None:
        """Raises ValueError unless images are (b, 3, image_size, image_size) of a float dtype."""
        side = self.spec.image_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(f"images of shape {tuple(images.shape)}: expected (b, 3, {side}, {side})")
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}: expected floats in [0, 1], such as images.float() / 255")

    def tokens(self, indices: Tensor) -> Tokens:
        """Tokens of indices (b, k) or (b, k, q), such as a file or a generator gives, padded to the full length.

        Raises ValueError for a continuous tokenizer, for indices that no code has, and for k < n where prefixes cannot
        be decoded.
        """
        spec = self.spec
        if spec.codebook_size is None:
            raise ValueError("continuous tokens have no indices")
        k = indices.shape[1]
        if not 1 <= k <= spec.length or (k < spec.length and not spec.prefix_decodable):
            need = f"1 to {spec.length}" if spec.prefix_decodable else f"{spec.length}"
            raise ValueError(f"{k} tokens an image: this tokenizer decodes {need}")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < spec.codebook_size:
            raise ValueError(f"an index outside of 0 to {spec.codebook_size - 1}")
        padding = indices.new_zeros(len(indices), spec.length - k, *indices.shape[2:])
        padded = torch.cat([indices, padding], dim=1)
        return Tokens.full(self.quantizer.lookup(padded), padded).prefix(k)

    def kept(self, tokens: Tokens) -> Tensor:
        """(b,) int64: how many tokens of each image to decode.

        Raises ValueError when some are left out and prefixes cannot be decoded.
        """
        if not self.spec.prefix_decodable and len(tokens) and int(tokens.lengths.min()) < self.spec.length:
            raise ValueError(
                f"a prefix of {int(tokens.lengths.min())} tokens, but this tokenizer decodes all {self.spec.length} "
                "only: it was trained without a regularizer (tokenizer/regularizer=nested_dropout or tail_drop)"
            )
        return tokens.lengths

    def tokens_to_latents(self, tokens: Tokens) -> Tensor:
        """Latents (b, n, d) for a decoder: looked up where there are indices, else brought back to their own scale.

        Raises ValueError for tokens of another model.
        """
        if tokens.indices is not None and self.spec.kind == "discrete":
            return self.quantizer.lookup(tokens.indices)
        if tokens.latents is None or tokens.latents.shape[1:] != (self.spec.length, self.spec.dim):
            shape = None if tokens.latents is None else tuple(tokens.latents.shape)
            raise ValueError(f"tokens.latents of shape {shape}: expected (b, {self.spec.length}, {self.spec.dim})")
        return tokens.latents if self.latent_scale is None else tokens.latents / self.latent_scale.factor

    def card(self) -> tuple[str, str, list[str]]:
        side, text = self.spec.image_size, "" if self.spec.condition == "none" else ", text=states"
        lines = [
            "import smalti",
            'tokenizer = smalti.load("THIS_FOLDER")',
            "tokens = tokenizer.encode(images)  # (b, 3, h, w) in [0, 1]",
            f"images = tokenizer.decode(tokens{text})",
        ]
        return "image-tokenizer", f"An image of {side} × {side} pixels as {self.spec.words()}.", lines
