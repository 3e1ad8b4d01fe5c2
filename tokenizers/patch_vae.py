"""A small VAE on patches, ours: latents for trying out generative decoders within minutes on a CPU.

image (b, 3, h, w) -> patches (b, 3·p², h / p, w / p) -> Gaussian (b, c, h / p, w / p) -> patches -> image.
A patch goes to its latent and back linearly, which some hundred steps learn as well as principal components do;
residual 3×3 convolutions over the grid of patches add what neighbours know.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.layers.init import init_fan_in_
from smalti.tokenizers.vae import VAE


class PatchVAE(VAE):
    """image_size: side in pixels, a multiple of patch_size (p).

    latent_channels: c. width, depth: channels and residual blocks over the grid, in the encoder and in the decoder.
    sample_posterior: see `VAE`. The scale of the latents is measured in training.
    """

    def __init__(
        self,
        *,
        image_size: int,
        latent_channels: int = 8,
        patch_size: int = 8,
        width: int = 64,
        depth: int = 2,
        sample_posterior: bool = True,
    ) -> None:
        for name, value in (("patch_size", patch_size), ("width", width)):
            if value < 1:
                raise ValueError(f"{name}={value} is not positive")
        super().__init__(
            image_size=image_size,
            factor=patch_size,
            channels=latent_channels,
            scaling_factor=None,
            sample_posterior=sample_posterior,
        )
        self.patch_size = patch_size
        patch = 3 * patch_size**2
        self.encoder = GridNetwork(patch, 2 * latent_channels, width, depth)
        self.decoder = GridNetwork(latent_channels, patch, width, depth)
        weight, bias = self.encoder.shortcut.weight, self.encoder.shortcut.bias
        assert bias is not None
        with torch.no_grad():  # begin almost without noise (standard deviation e^−2), else nothing gets through it
            weight[latent_channels:] = 0
            bias[latent_channels:] = -4

    @property
    def last_layer(self) -> Tensor:
        """The weight that makes the pixels, for adversarial terms that are weighed by gradients."""
        return self.decoder.shortcut.weight

    def moments(self, images: Tensor) -> Tensor:
        return self.encoder(F.pixel_unshuffle(2 * images.to(self.last_layer.dtype) - 1, self.patch_size))

    def pixels(self, latents: Tensor) -> Tensor:
        return (F.pixel_shuffle(self.decoder(latents.to(self.last_layer.dtype)), self.patch_size) + 1) / 2


class GridNetwork(nn.Module):
    """(b, c, h, w) to (b, out, h, w): a linear map of each cell, plus residual blocks over the grid."""

    def __init__(self, channels: int, out: int, width: int, depth: int) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(channels, out, 1)
        self.conv_in = nn.Conv2d(channels, width, 1)
        self.blocks = nn.Sequential(*(GridBlock(width) for _ in range(depth)))
        self.conv_out = nn.Conv2d(width, out, 1)
        init_fan_in_(self)
        with torch.no_grad():
            self.conv_out.weight *= 0.1  # begin near the linear map

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.conv_out(self.blocks(self.conv_in(x)))


class GridBlock(nn.Module):
    """x + f(x), f = group norm of one group, 3×3 convolution, SiLU, 1×1 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(F.silu(self.conv(self.norm(x))))
