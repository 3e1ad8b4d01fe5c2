"""Texts in batches, for generators by text: captions of images, or the features that token shards have of them.

A sample may have a caption (`KEY.txt`) and a short one (`KEY.short.txt`), which stands in for it in a part of the
draws. Token shards have the features of both, (l, c) float16 without padding (`KEY.text.npy`, `KEY.short.text.npy`),
made by the text encoder that index.json names. What cannot be learnt from weighs 0, as in LlamaGen's recipe: a sample
without a text, and an image whose shorter side is below the crop's (encode.py writes no features of it).
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from smalti.data.decode import decode_member
from smalti.data.shards import ShardSource
from smalti.data.source import Sample
from smalti.training.draws import seed_of

LONG, SHORT = "txt", "short.txt"
FEATURES = {LONG: "text.npy", SHORT: "short.text.npy"}  # the member with a caption's features, by that of the caption

T = TypeVar("T")


class Texts(ABC):
    """What batches have of their samples' texts: `read` gives one sample's, None where it counts for nothing; `batch`
    the entries of several."""

    @abstractmethod
    def read(self, sample: Sample, epoch: int, number: int) -> Any: ...

    @abstractmethod
    def batch(self, texts: Sequence[Any]) -> dict[str, Any]: ...


class Captions(Texts):
    """caption: list of b strings, and weight (b,), of images. short: share of the draws that take the short caption.
    seed: of those draws; None: the long caption always."""

    def __init__(self, source: ShardSource, image_size: int, *, short: float, seed: int | None) -> None:
        self.source, self.image_size, self.short, self.seed = source, image_size, short, seed

    def read(self, sample: Sample, epoch: int, number: int) -> str | None:
        if not is_large(sample.image, self.image_size):
            return None
        return choose(*captions_of(self.source, number), draw(self.seed, epoch, number), self.short)

    def batch(self, texts: Sequence[str | None]) -> dict[str, Any]:
        return {"caption": [text or "" for text in texts], "weight": weights(texts)}


class Features(Texts):
    """features (b, length, dim), padded at the front, mask (b, length) bool, and weight (b,), of token shards.

    short, seed: as of `Captions`, whose choices these are. Raises ValueError for features of another width.
    """

    def __init__(self, source: ShardSource, length: int, dim: int, *, short: float, seed: int | None) -> None:
        self.source, self.length, self.dim, self.short, self.seed = source, length, dim, short, seed

    def read(self, sample: Sample, epoch: int, number: int) -> np.ndarray | None:
        kinds = tuple(FEATURES.values())
        there = self.source.members(number, kinds)
        long, short = ((kind, there[kind]) if kind in there else None for kind in kinds)
        chosen = choose(long, short, draw(self.seed, epoch, number), self.short)
        if chosen is None:
            return None
        features: np.ndarray = decode_member(*chosen)
        if features.ndim != 2 or features.shape[1] != self.dim or features.dtype.kind != "f":
            raise ValueError(
                f"its text features are {features.dtype} {features.shape}, but index.json says (…, {self.dim})"
            )
        return features

    def batch(self, texts: Sequence[np.ndarray | None]) -> dict[str, Any]:
        return padded(texts, self.length, self.dim) | {"weight": weights(texts)}


def padded(texts: Sequence[np.ndarray | None], length: int, dim: int) -> dict[str, Any]:
    """features (b, length, dim) and mask (b, length) of arrays (l, dim). None: zeros, which all count as real."""
    kind = np.result_type(np.float16, *(text.dtype for text in texts if text is not None))
    features, mask = np.zeros((len(texts), length, dim), kind), np.ones((len(texts), length), bool)
    for row, text in enumerate(texts):
        if text is not None:
            features[row], mask[row] = pad_left(text, length)
    return {"features": torch.from_numpy(features), "mask": torch.from_numpy(mask)}


def pad_left(features: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `length` states (length, c) behind zeros where they are fewer; and which are real, (length,) bool."""
    features = features[:length]
    front = length - len(features)
    return np.pad(features, ((front, 0), (0, 0))), np.arange(length) >= front


def choose(long: T | None, short: T | None, draw: float, share: float) -> T | None:
    """The short one where there is one and the uniform `draw` is below `share`, else the long one, if there is one."""
    return short if short is not None and (long is None or draw < share) else long


def draw(seed: int | None, epoch: int, sample: int) -> float:
    """The uniform number that chooses a sample's caption in an epoch; without a seed 1, which takes the long one."""
    return 1.0 if seed is None else seed_of("caption", seed, epoch, sample) / 2**63


def captions_of(source: ShardSource, sample: int) -> tuple[str | None, str | None]:
    """A sample's caption and its short one, without outer spaces; None where there is none, or nothing in it."""
    there = source.members(sample, (LONG, SHORT))
    long, short = (there.get(kind, b"").decode().strip() or None for kind in (LONG, SHORT))
    return long, short


def is_large(image: bytes, size: int) -> bool:
    """Whether an image's shorter side is at least `size` pixels; its pixels are not decoded."""
    with Image.open(io.BytesIO(image)) as opened:
        return min(opened.size) >= size


def weights(texts: Sequence[Any]) -> torch.Tensor:
    """(b,): 1 where there is a text, else 0."""
    return torch.tensor([float(text is not None) for text in texts])
