"""What a tokenizer must beat: an image's mean colour, and the best JPEG or WebP at no more bytes than its tokens."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from smalti.evaluation.metrics import Mean, psnr
from smalti.evaluation.pictures import to_pil

CODECS: dict[str, dict[str, Any]] = {
    "jpeg": {"format": "JPEG", "optimize": True, "subsampling": "4:2:0"},
    "webp": {"format": "WEBP", "method": 6},
}
SHRINK = (1, 2, 4, 8)  # a codec may also store a smaller image, which is enlarged again: at few bits that is better


def mean_colour(images: Tensor) -> Tensor:
    """Each image (b, c, h, w) painted in its own mean colour."""
    return images.mean((2, 3), keepdim=True).expand_as(images)


@dataclass(frozen=True)
class Compressed:
    """An image as a codec gives it back, and the bytes of the file, header and all."""

    image: Tensor  # (3, h, w) in [0, 1]
    size: int
    quality: int
    shrink: int


def compress(image: Tensor, codec: str, budget: int) -> Compressed | None:
    """The file of at most `budget` bytes with the best PSNR; None where even the worst quality takes more.

    For each shrink factor, the largest quality that fits is found by bisection, and the best of them is taken.
    """
    original = to_pil(image)
    best: tuple[float, Compressed] | None = None
    for shrink in SHRINK:
        width, height = original.width // shrink, original.height // shrink
        if min(width, height) < 4:
            break
        small = original if shrink == 1 else original.resize((width, height), Image.Resampling.BICUBIC)
        found = _largest_quality(small, codec, budget)
        if found is None:
            continue
        quality, data = found
        decoded = Image.open(io.BytesIO(data)).convert("RGB")
        if shrink > 1:
            decoded = decoded.resize(original.size, Image.Resampling.BICUBIC)
        result = Compressed(pil_to_tensor(decoded) / 255, len(data), quality, shrink)
        value = psnr(image[None].cpu(), result.image[None]).item()
        if best is None or value > best[0]:
            best = (value, result)
    return best[1] if best else None


class Baselines:
    """PSNR of the baselines over images, and the tokenizer's on the images where a codec has a file at all.

    budget: bytes of an image's tokens; None for continuous tokens, which have no size: then only the mean colour.
    """

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self.mean_colour = Mean()
        names = () if budget is None else tuple(CODECS)
        self.codecs = {name: (Mean(), Mean(), Mean()) for name in names}  # its PSNR, its bytes, the tokenizer's PSNR

    def update(self, images: Tensor, reconstructions: Tensor) -> None:
        """images, reconstructions: (b, 3, h, w) in [0, 1]."""
        self.mean_colour.update(psnr(images, mean_colour(images)))
        ours = psnr(images, reconstructions).cpu()
        for name, (codec_psnr, size, our_psnr) in self.codecs.items():
            assert self.budget is not None
            for i, image in enumerate(images.cpu()):
                result = compress(image, name, self.budget)
                if result is not None:
                    codec_psnr.update(psnr(image[None], result.image[None]))
                    size.update(torch.tensor([result.size]))
                    our_psnr.update(ours[i : i + 1])

    def all_reduce(self) -> None:
        """Add up over all processes."""
        for part in (self.mean_colour, *(part for parts in self.codecs.values() for part in parts)):
            part.all_reduce()

    def compute(self, psnr: float) -> dict[str, float]:
        """mean_colour_psnr, and how far `psnr`, the tokenizer's, is above it; for each codec the number of images that
        it can store in the budget and, where there are any, its PSNR and mean bytes, and the tokenizer's PSNR on them.
        """
        mean_colour = self.mean_colour.compute()
        figures = {"mean_colour_psnr": mean_colour, "gain_over_mean_colour": psnr - mean_colour}
        for name, (codec_psnr, size, our_psnr) in self.codecs.items():
            count = int(codec_psnr.sums["count"].item())
            figures[f"{name}_images"] = count
            if count:
                figures[f"{name}_psnr"] = codec_psnr.compute()
                figures[f"{name}_bytes"] = size.compute()
                figures[f"psnr_on_{name}_images"] = our_psnr.compute()
        return figures


def _largest_quality(image: Image.Image, codec: str, budget: int) -> tuple[int, bytes] | None:
    """The largest quality whose file fits, with the file."""
    low, high = 0, 100
    data = _encoded(image, codec, low)
    if len(data) > budget:
        return None
    found = (low, data)
    while low < high:
        middle = (low + high + 1) // 2
        data = _encoded(image, codec, middle)
        if len(data) <= budget:
            low, found = middle, (middle, data)
        else:
            high = middle - 1
    return found


def _encoded(image: Image.Image, codec: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, quality=quality, **CODECS[codec])
    return buffer.getvalue()
