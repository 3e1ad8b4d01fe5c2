"""A continuous tokenizer with discrete tokens, without training (TokenBridge, Wang et al. 2025, arXiv:2503.16430).

image -> the continuous tokenizer -> latents (b, n, d) -> every channel rounded by itself -> indices (b, n, d) of 2^bits
levels -> latents -> the continuous tokenizer -> image

Nothing is trained: the levels follow from the normal distribution and, where they are fitted, from each channel's mean
and standard deviation (`bridge`). Generators model indices channel by channel (smalti/generators/tokenbridge.py), in
the order that the quantizer keeps them in: what varies slowly over the picture first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from smalti.tokenizers.base import Tokenizer, TokenizerOutput
from smalti.tokenizers.quantizers.base import Draws
from smalti.tokenizers.quantizers.bridge import BridgeQuantizer, low_frequency_share
from smalti.tokenizers.spec import Tokens, TokenSpec


class BridgedTokenizer(Tokenizer):
    """tokenizer: of continuous tokens, of as many channels as the quantizer's dim; it is frozen.

    Its tokens are discrete: indices (b, n, q) with q = d, one code a channel, in the quantizer's order; latents as the
    tokenizer reads them.
    """

    quantizer: BridgeQuantizer

    def __init__(self, *, tokenizer: Tokenizer, quantizer: BridgeQuantizer) -> None:
        super().__init__()
        self.spec = bridged_spec(tokenizer.spec, quantizer)
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.quantizer = quantizer

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tokens:
        """images: (b, 3, image_size, image_size) float in [0, 1]. Of a VAE, the codes of its posterior's mean."""
        return self.quantised(self.tokenizer.encode(images))

    @torch.inference_mode()
    def decode(self, tokens: Tokens, *, seed: int = 0) -> Tensor:
        """Images (b, 3, h, w) in [0, 1]. `seed` is the tokenizer's."""
        return self.tokenizer.decode(Tokens(self.tokens_to_latents(tokens), tokens.lengths), seed=seed)

    @torch.no_grad()
    def forward(self, images: Tensor, draws: Draws | None = None) -> TokenizerOutput:
        """What `encode` and `decode` give: there is nothing to train, and nothing drawn."""
        latents = self.tokenizer.encode(images).latents
        assert latents is not None
        quantized = self.quantizer(latents)
        return TokenizerOutput(quantized, self.decode(Tokens.full(quantized.latents, quantized.indices)))

    @property
    def has_posterior(self) -> bool:
        return self.tokenizer.has_posterior

    def moments_of(self, images: Tensor) -> Tensor:
        return self.tokenizer.moments_of(images)

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tokens:
        """Tokens of posteriors (b, n, 2·d): samples are rounded. noise: (b, n, d) standard normal; None: the means."""
        return self.quantised(self.tokenizer.sample(moments, noise))

    def quantised(self, tokens: Tokens) -> Tokens:
        """The codes of continuous tokens of the tokenizer's."""
        assert tokens.latents is not None
        quantized = self.quantizer(tokens.latents)
        return Tokens(quantized.latents, tokens.lengths, quantized.indices)

    def train(self, mode: bool = True) -> BridgedTokenizer:
        """The tokenizer inside stays in evaluation mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self


def bridged_spec(spec: TokenSpec, quantizer: BridgeQuantizer) -> TokenSpec:
    """What a tokenizer of such tokens promises once it is bridged. Raises ValueError where it cannot be."""
    check_continuous(spec)
    if spec.dim != quantizer.dim:
        raise ValueError(f"{spec.words()}, but the quantizer has dim={quantizer.dim}; give it dim={spec.dim}")
    return replace(
        spec,
        kind="discrete",
        codebook_size=quantizer.codebook_size,
        depth=quantizer.dim,
        levels=tuple(quantizer.values.tolist()),
        order=tuple(quantizer.order.tolist()),
    )


def check_continuous(spec: TokenSpec) -> None:
    """Raises ValueError for tokens that are discrete already."""
    if spec.kind != "continuous":
        raise ValueError(
            f"{spec.words()} are discrete already; bridge a continuous tokenizer, such as one trained with "
            "tokenizer=klvae or tokenizer/quantizer=kl"
        )


def bridge(
    tokenizer: Tokenizer,
    latents: Iterable[Tensor],
    *,
    bits: int = 6,
    fit: bool = True,
    order: str | Sequence[int] = "data",
) -> BridgedTokenizer:
    """The tokenizer with discrete tokens, in evaluation mode; what it loses by that in `metadata`.

    latents: (b, n, d) batches of them, scaled as the tokenizer's tokens are. fit: levels are stretched over ±5 standard
    deviations of each channel around its mean, which is (nearly) the range of least error for latents of any scale;
    False: over ±5 around 0 for all channels, as published, for latents of unit variance. order: of `BridgeQuantizer`;
    "data": channels of low frequencies first, or, of tokens without a grid, those that vary most. Raises ValueError
    for a tokenizer of discrete tokens, and as `BridgeQuantizer` does.
    """
    spec = tokenizer.spec
    check_continuous(spec)
    given = None if isinstance(order, str) else list(order)
    seen = torch.cat(list(latents)).double().cpu()
    deviations, means = (part.clone() for part in torch.std_mean(seen, dim=(0, 1), correction=0))
    if given is None:
        share = deviations if spec.grid is None else low_frequency_share(seen, spec.grid)
        given = share.argsort(descending=True, stable=True).tolist()
    if fit:
        # A channel that never varies has one level, whatever its deviation is said to be.
        scale = deviations.where(deviations > 0, 1.0)
        quantizer = BridgeQuantizer(
            dim=spec.dim, bits=bits, means=means.tolist(), deviations=scale.tolist(), order=given
        )
    else:
        quantizer = BridgeQuantizer(dim=spec.dim, bits=bits, order=given)
    bridged = BridgedTokenizer(tokenizer=tokenizer, quantizer=quantizer).eval()
    with torch.no_grad():
        error = (quantizer(seen.float()).latents - seen).square().mean((0, 1)).sum() / deviations.square().sum()
    bridged.metadata = {
        "results": {"error of quantised latents, in variances of latents": float(error)},
    }
    return bridged
