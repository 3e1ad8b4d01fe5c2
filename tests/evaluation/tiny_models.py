"""Tokenizers small enough to be measured in a second."""

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor, nn

from smalti.registry import register
from smalti.tokenizers.base import Tokenizer, TokenizerOutput
from smalti.tokenizers.maskgit_vqgan import MaskGITVQGAN
from smalti.tokenizers.quantizers.base import Draws
from smalti.tokenizers.quantizers.vq import VectorQuantizer
from smalti.tokenizers.spec import Tokens, TokenSpec
from smalti.tokenizers.titok import TiTok

SIDE = 32


def tiny_titok(**other) -> TiTok:
    torch.manual_seed(0)
    tower = {"width": 32, "depth": 1, "heads": 2, "patch_size": 8}
    arguments = {
        "image_size": SIDE,
        "num_latent_tokens": 16,
        "quantizer": VectorQuantizer(codebook_size=64, dim=4),
        "encoder": tower,
        "decoder": tower,
        "init": "fan_in",
    }
    return TiTok(**{**arguments, **other})


def tiny_vqgan(**other) -> MaskGITVQGAN:
    """4 × 4 codes of 32: those that `tiny_titok(head="codes", proxy_codebook_size=32)` predicts."""
    torch.manual_seed(1)
    arguments = {
        "image_size": SIDE,
        "quantizer": VectorQuantizer(codebook_size=32, dim=8),
        "channels": 32,
        "channel_mult": (1, 1, 1, 1),
        "num_res_blocks": 1,
    }
    return MaskGITVQGAN(**{**arguments, **other})


@dataclass
class Sampling:
    """Settings of a decoder that samples."""

    steps: int = 4
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} is not positive")
        if self.noise < 0:
            raise ValueError(f"sampling.noise={self.noise} is negative")


class Cosines(Tokenizer):
    """Token i is coefficient i of a cosine transform, from the coarsest, rounded to 255 levels: each one adds detail,
    so that the error falls with every token. Its decoder can add noise, which `seed` and the place in the batch fix.
    """

    def __init__(self, *, image_size: int = SIDE, length: int = 24) -> None:
        super().__init__()
        self.spec = TokenSpec("discrete", length, 1, image_size, codebook_size=255, prefix_decodable=True)
        self.sampling = Sampling()
        x = (torch.arange(image_size) + 0.5) * pi / image_size
        waves = torch.stack([torch.cos(k * x) for k in range(image_size)])
        waves = waves / waves.norm(dim=1, keepdim=True)
        order = sorted((u + v, u, v, c) for u in range(image_size) for v in range(image_size) for c in range(3))
        basis = torch.zeros(length, 3, image_size, image_size)
        for number, (_, u, v, c) in enumerate(order[:length]):
            basis[number, c] = torch.outer(waves[u], waves[v])
        self.basis = nn.Parameter(basis, requires_grad=False)

    def encode(self, images: Tensor) -> Tokens:
        self.check_images(images)
        latents = torch.einsum("b c h w, n c h w -> b n", images, self.basis) / self.spec.image_size
        indices = (latents.clamp(-1, 1) * 127).round().long() + 127
        return Tokens.full(latents[..., None], indices)

    def decode(self, tokens: Tokens, *, seed: int = 0) -> Tensor:
        there = torch.arange(self.spec.length) < self.kept(tokens)[:, None]
        latents = (tokens.indices - 127) / 127 * there * self.spec.image_size
        images = torch.einsum("b n, n c h w -> b c h w", latents, self.basis)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        return (images + self.sampling.noise * noise).clamp(0, 1)

    def forward(self, images: Tensor, draws: Draws | None = None) -> TokenizerOutput:
        raise NotImplementedError("nothing to train")


register("test_cosines", Cosines)
