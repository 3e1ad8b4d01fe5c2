"""What a tokenizer must beat: an image's mean colour, and the best JPEG, WebP, AVIF or JPEG XL at no more bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from smalti.evaluation.metrics import LEAST_MSE, Sums, psnr
from smalti.evaluation.pictures import to_pil


@dataclass(frozen=True)
class Codec:
    """How Pillow writes a format: its name there and for people, options, best quality (of 0 to 100), and the package
    that adds the format to a Pillow that has not got it."""

    format: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    best: int = 100
    plugin: str = ""


CODECS = {
    "jpeg": Codec("JPEG", "JPEG", {"optimize": True, "subsampling": "4:2:0"}),
    "webp": Codec("WEBP", "WebP", {"method": 6}),
    "avif": Codec("AVIF", "AVIF", {"speed": 6, "max_threads": 1}, plugin="pillow-avif-plugin"),
    # Quality 100 means lossless there, which pillow-jxl-plugin 1.3.8 fails to write.
    "jxl": Codec("JXL", "JPEG XL", {"effort": 7}, best=99, plugin="pillow-jxl-plugin"),
}
SHRINK = (1, 2, 4, 8)  # a codec may also store a smaller image, which is enlarged again: at few bits that is better


def codecs() -> tuple[str, ...]:
    """Those of `CODECS` that this Pillow writes, itself or by a plugin that is installed."""
    Image.init()
    for codec in CODECS.values():
        module = codec.plugin.removesuffix("-plugin").replace("-", "_")
        if codec.format not in Image.SAVE and module and find_spec(module):
            import_module(module)  # registers the format
    return tuple(name for name, codec in CODECS.items() if codec.format in Image.SAVE)


def why_absent(name: str) -> str:
    """What to do to get the files of a codec that `codecs` has not."""
    codec = CODECS[name]
    return f"this Pillow writes no {codec.title}: pip install {codec.plugin or '--upgrade pillow'}"


def mean_colour(images: Tensor) -> Tensor:
    """Each image (b, c, h, w) painted in its own mean colour."""
    return images.mean((2, 3), keepdim=True).expand_as(images)


@dataclass(frozen=True)
class Compressed:
    """An image as a codec gives it back, and the bytes of the file, header and all; its PSNR in dB."""

    decoded: Image.Image
    size: int
    quality: int
    shrink: int
    psnr: float

    @property
    def image(self) -> Tensor:
        """(3, h, w) in [0, 1]."""
        return pil_to_tensor(self.decoded) / 255


class Files:
    """The files that a codec makes of one image (3, h, w) in [0, 1], each made once."""

    def __init__(self, image: Tensor, codec: str) -> None:
        self.codec, original = CODECS[codec], to_pil(image)
        self._pixels = np.asarray(original, dtype=np.int32)
        self._small = {
            shrink: original if shrink == 1 else original.resize(size, Image.Resampling.BICUBIC)
            for shrink in SHRINK
            if min(size := (original.width // shrink, original.height // shrink)) >= 4 or shrink == 1
        }
        self._data: dict[tuple[int, int], bytes] = {}
        self._decoded: dict[tuple[int, int], Compressed] = {}

    def best(self, budget: int) -> Compressed | None:
        """The file of at most `budget` bytes with the best PSNR; None where even the worst quality takes more.

        For each shrink factor, the largest quality that fits is found by bisection, and the best of them is taken.
        """
        found = [(shrink, quality) for shrink in self._small if (quality := self._largest(shrink, budget)) is not None]
        return max((self._decode(*key) for key in found), key=lambda file: file.psnr, default=None)

    def _largest(self, shrink: int, budget: int) -> int | None:
        """The largest quality whose file fits."""
        low, high = 0, self.codec.best
        if len(self._encode(shrink, low)) > budget:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            if len(self._encode(shrink, middle)) <= budget:
                low = middle
            else:
                high = middle - 1
        return low

    def _encode(self, shrink: int, quality: int) -> bytes:
        if (shrink, quality) not in self._data:
            buffer = io.BytesIO()
            self._small[shrink].save(buffer, self.codec.format, quality=quality, **self.codec.options)
            self._data[shrink, quality] = buffer.getvalue()
        return self._data[shrink, quality]

    def _decode(self, shrink: int, quality: int) -> Compressed:
        if (shrink, quality) not in self._decoded:
            data = self._encode(shrink, quality)
            decoded = Image.open(io.BytesIO(data)).convert("RGB")
            if shrink > 1:
                decoded = decoded.resize(self._small[1].size, Image.Resampling.BICUBIC)
            # numpy: torch would wake its threads 70 times an image, 2 s of processor time at 256 px instead of 0.03
            mse = max(np.square(np.asarray(decoded, dtype=np.int32) - self._pixels).mean(), LEAST_MSE)
            value = 10 * math.log10(255**2 / mse)
            self._decoded[shrink, quality] = Compressed(decoded, len(data), quality, shrink, value)
        return self._decoded[shrink, quality]


def compress(image: Tensor, codec: str, budget: int) -> Compressed | None:
    """The file of `image` (3, h, w) with the best PSNR in `budget` bytes; None where there is none."""
    return Files(image, codec).best(budget)


class Baselines(Sums):
    """PSNR of the baselines over images, and the tokenizer's on the images where a codec has a file at all.

    budgets: bytes of an image's tokens at each number of tokens that is measured; none for continuous tokens, which
    have no size: then only the mean colour. further: more budgets, at which only the codecs are measured. codecs:
    names of `CODECS`. limit: how many images the codecs get (they take some 10 to 1,000 ms each); None: all.
    """

    def __init__(
        self,
        budgets: Sequence[int],
        *,
        further: Sequence[int] = (),
        codecs: Sequence[str] = (),
        limit: int | None = None,
    ) -> None:
        self.budgets, self.codecs, self.limit = list(budgets), list(codecs) if budgets else [], limit
        self.sizes = sorted({*budgets, *further})
        every = (len(self.codecs), len(self.sizes))
        super().__init__(
            colour=(), images=(), ours=(len(self.budgets),), compared=(), colour_compared=(),
            count=every, psnr=every, bytes=every, ours_on_same=(len(self.codecs), len(self.budgets)),
        )  # fmt: skip

    def update(self, images: Tensor, ours: Tensor, start: int = 0) -> None:
        """images: (b, 3, h, w) in [0, 1]. ours: (lengths, b), the tokenizer's PSNR at each number of tokens. start: how
        many images of the data set come before these."""
        colour = psnr(images, mean_colour(images)).cpu()
        self.add(colour=colour.sum(), images=len(images))
        left = len(images) if self.limit is None else max(self.limit - start, 0)
        if self.codecs:
            self.add(colour_compared=colour[:left].sum())
            for image, values in zip(images[:left], ours.cpu().double().T, strict=False):
                self._compare(image, values)

    def _compare(self, image: Tensor, ours: Tensor) -> None:
        """One image: ours (lengths,)."""
        found = torch.zeros(3, len(self.codecs), len(self.sizes), dtype=torch.float64)
        for row, codec in enumerate(self.codecs):
            files = Files(image, codec)
            for column, budget in enumerate(self.sizes):
                if (file := files.best(budget)) is not None:
                    found[:, row, column] = torch.tensor([1, file.psnr, file.size])
        at = [self.sizes.index(budget) for budget in self.budgets]
        self.add(count=found[0], psnr=found[1], bytes=found[2])
        self.add(ours=ours, compared=1, ours_on_same=found[0][:, at] * ours)

    def colour(self) -> float:
        """PSNR of the mean colours, over all images."""
        return (self.sums["colour"] / self.sums["images"]).item()

    @property
    def compared(self) -> int:
        """Images that the codecs got."""
        return int(self.sums["compared"].item())

    def figures(self, number: int) -> dict[str, float]:
        """At the budget of that number: for each codec the number of images that it can store and, where there are any,
        its PSNR and mean bytes, and the tokenizer's PSNR on them."""
        column, figures = self.sizes.index(self.budgets[number]), {}
        for row, name in enumerate(self.codecs):
            count = int(self.sums["count"][row, column].item())
            figures[f"{name}_images"] = float(count)
            if count:
                figures[f"{name}_psnr"] = self.sums["psnr"][row, column].item() / count
                figures[f"{name}_bytes"] = self.sums["bytes"][row, column].item() / count
                figures[f"psnr_on_{name}_images"] = self.sums["ours_on_same"][row, number].item() / count
        return figures

    def rate_distortion(self) -> dict[str, Any]:
        """On the images that the codecs got: how many, mean_colour_psnr, and curves: for "tokens" (each number of
        tokens) and for each codec (each budget in which it stores an image) bytes, psnr, and of how many images."""
        total = self.compared
        ours = (self.sums["ours"] / total).tolist()
        curves: dict[str, list[dict[str, float]]] = {
            "tokens": [
                {"bytes": budget, "psnr": value, "images": total}
                for budget, value in zip(self.budgets, ours, strict=True)
            ]
        }
        for row, name in enumerate(self.codecs):
            curves[name] = [
                {
                    "budget": budget,
                    "bytes": self.sums["bytes"][row, column].item() / count,
                    "psnr": self.sums["psnr"][row, column].item() / count,
                    "images": count,
                }
                for column, budget in enumerate(self.sizes)
                if (count := int(self.sums["count"][row, column].item()))
            ]
        mean_colour = (self.sums["colour_compared"] / total).item()
        return {"images": total, "mean_colour_psnr": mean_colour, "curves": curves}


def further_budgets(largest: int, image_size: int) -> list[int]:
    """Budgets beyond that of all tokens, doubling up to 2 bits a pixel, and to 1 kB at least: at those of the tokens a
    codec often has no file at all, and where its curve begins is what one wants to see."""
    budgets = []
    while largest < max(image_size**2 / 4, 1024):
        largest *= 2
        budgets.append(largest)
    return budgets
