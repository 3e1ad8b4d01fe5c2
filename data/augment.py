"""The image transforms of the published recipes, on (h, w, 3) uint8 arrays; draws come in as values.

Resizing is Pillow's (bicubic, antialiased), as in the published code: torch's uint8 resize is 3.6x faster but differs
in single steps. Crops are views; nothing is copied until the batch is filled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from smalti.training.draws import seed_of


@dataclass(frozen=True)
class AugmentDraws:
    """Uniform numbers in [0, 1) of one sample in one epoch: where a random crop lies, whether to flip, how large."""

    top: float
    left: float
    flip: float
    scale: float


def draw(seed: int, epoch: int, sample: int) -> AugmentDraws:
    """The draws of a sample: a hash, so that neither workers, ranks nor the place in a batch change a picture."""
    bits = seed_of("augment", seed, epoch, sample)
    top, left, flip = ((bits >> shift & 0x1FFFFF) / 2**21 for shift in (0, 21, 42))
    return AugmentDraws(top, left, flip, scale=(seed_of("augment scale", seed, epoch, sample) >> 10) / 2**53)


def resize_shorter(image: np.ndarray, size: int) -> np.ndarray:
    """Shorter side to `size`, the longer rounded down (torchvision's Resize on a PIL image, bicubic, antialiased)."""
    h, w = image.shape[:2]
    if min(h, w) == size:
        return image
    new_h, new_w = (size, int(size * w / h)) if h <= w else (int(size * h / w), size)
    return _resize(image, new_h, new_w, Image.Resampling.BICUBIC)


def crop(image: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    return image[top : top + size, left : left + size]


def random_crop(image: np.ndarray, size: int, draws: AugmentDraws) -> np.ndarray:
    """A square anywhere in the image, every position equally likely."""
    h, w = image.shape[:2]
    return crop(image, int(draws.top * (h - size + 1)), int(draws.left * (w - size + 1)), size)


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The square in the middle; half pixels round to even (torchvision's CenterCrop)."""
    h, w = image.shape[:2]
    return crop(image, round((h - size) / 2), round((w - size) / 2), size)


def adm_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The centre crop of ADM, by which generators and their reference statistics are prepared.

    `adm_resize`, then the middle (half pixels down). Not the pixels of `center_crop(resize_shorter(…))`.
    """
    image = adm_resize(image, size)
    return crop(image, (image.shape[0] - size) // 2, (image.shape[1] - size) // 2, size)


def adm_resize(image: np.ndarray, size: int) -> np.ndarray:
    """Shorter side to `size`: halved with a box filter while it is at least twice that, then bicubic, sides rounded."""
    while min(image.shape[:2]) >= 2 * size:
        image = _resize(image, image.shape[0] // 2, image.shape[1] // 2, Image.Resampling.BOX)
    h, w = image.shape[:2]
    scale = size / min(h, w)
    return _resize(image, round(h * scale), round(w * scale), Image.Resampling.BICUBIC)


def adm_random_crop(image: np.ndarray, size: int, draws: AugmentDraws) -> np.ndarray:
    """ADM's random crop, which LlamaGen's VQ-GAN is trained on: the shorter side to a random length, then anywhere."""
    low, high = adm_lengths(size)
    return random_crop(adm_resize(image, low + int(draws.scale * (high - low))), size, draws)


def adm_lengths(size: int) -> tuple[int, int]:
    """The shorter side's range before ADM's random crop of `size`, [low, high): a crop is at least 0.8 of it."""
    return size, math.ceil(size / 0.8) + 1


def ten_crops(image: np.ndarray, size: int) -> list[np.ndarray]:
    """Top left, top right, bottom left, bottom right, centre; then these of the mirrored image (torchvision's TenCrop).

    LlamaGen encodes those of `adm_crop(image, int(1.1 · size))`, and a second set of int(1.05 · size).
    """
    return [*_five_crops(image, size), *_five_crops(flip(image), size)]


def _five_crops(image: np.ndarray, size: int) -> list[np.ndarray]:
    bottom, right = image.shape[0] - size, image.shape[1] - size
    corners = [crop(image, top, left, size) for top in (0, bottom) for left in (0, right)]
    return [*corners, center_crop(image, size)]


def flip(image: np.ndarray) -> np.ndarray:
    """Left and right exchanged."""
    return image[:, ::-1]


def _resize(image: np.ndarray, h: int, w: int, filter: Image.Resampling) -> np.ndarray:
    if image.shape[:2] == (h, w):
        return image
    return np.asarray(Image.fromarray(image).resize((w, h), filter))
