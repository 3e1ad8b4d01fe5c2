"""Discriminators of LlamaGen's VQ-GAN: the patch discriminator of pix2pix, and StyleGAN2's without its refinements.

PatchGAN: Isola et al. 2017 (arXiv:1611.07004), as in VQGAN. StyleGAN: Karras et al. 2020 (arXiv:1912.04958), here
without equalised learning rates and without the standard deviation over the batch. Images float (b, 3, h, w), in the
range that the objective gives (`pixel_range`: "signed" as published).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import UserError

_KEY = "objective.adversarial.discriminator"


class PatchGAN(nn.Module):
    """Convolutions 4×4, halving `num_layers` times: a map of logits (b, 1, h', w'), 2.8 M parameters as published.

    channels: of the first layer, doubled by each further one up to eightfold. Normalised over the batch, so that in
    training the logits of a picture depend on the others; in evaluation mode on running averages.
    """

    def __init__(self, *, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("num_layers", num_layers)):
            if value < 1:
                raise UserError(f"{_KEY}.{name}={value} leaves nothing to discriminate with; use 1 or more")
        widths = [channels * min(2**layer, 8) for layer in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for layer, (before, width) in enumerate(pairwise(widths), start=1):
            stride = 2 if layer < num_layers else 1
            layers += [
                nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


class StyleGANDiscriminator(nn.Module):
    """Residual stages down to 4×4, then one logit (b, 1) an image.

    image_size: side, a power of two from 8. channels: widths at 4, 8, 16, … image_size; null: published, 512 up to
    32 px, 16384 / side above (36.5 M parameters at 256 px).
    """

    def __init__(self, *, image_size: int, channels: Sequence[int] | None = None) -> None:
        super().__init__()
        levels = int(math.log2(max(image_size, 1)))
        if image_size != 2**levels or levels < 3:
            raise UserError(f"{_KEY}.image_size={image_size} is not a power of two from 8; use {max(2**levels, 8)}")
        if channels is None:
            channels = [min(512, 16384 // 2**level) for level in range(2, levels + 1)]
        if len(channels) != levels - 1:
            raise UserError(
                f"{_KEY}.channels={list(channels)}: {levels - 1} widths are needed, for 4, 8, … {image_size} px"
            )
        widths = list(reversed(channels))
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(_Stage(before, width) for before, width in pairwise(widths))
        self.mix = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.hidden = nn.Linear(widths[-1] * 16, widths[-1])
        self.to_logits = nn.Linear(widths[-1], 1)

    def forward(self, images: Tensor) -> Tensor:
        x = F.leaky_relu(self.stem(images), 0.2, inplace=True)
        for stage in self.stages:
            x = stage(x)
        x = F.leaky_relu(self.mix(x), 0.2, inplace=True).flatten(1)
        logits: Tensor = self.to_logits(F.leaky_relu(self.hidden(x), 0.2, inplace=True))
        return logits


class _Stage(nn.Module):
    """(b, c_in, h, w) -> (b, c_out, h / 2, w / 2): (two convolutions, blurred and halved, + a strided 1×1) / √2."""

    kernel: Tensor

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.skip = nn.Conv2d(channels_in, channels_out, 1, stride=2)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.halve = nn.Conv2d(channels_out, channels_out, 3, stride=2, padding=1)
        line = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", (torch.outer(line, line) / 16)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        f = F.leaky_relu(self.conv1(x), 0.2, inplace=True)
        f = F.leaky_relu(self.conv2(f), 0.2, inplace=True)
        c = f.shape[1]
        f = F.conv2d(F.pad(f, (1, 1, 1, 1), mode="reflect"), self.kernel.expand(c, 1, -1, -1), groups=c)
        return (self.halve(f) + self.skip(x)) / math.sqrt(2)
