"""Batches of samples, as the training loop wants them: read, decoded, transformed in a loader's workers."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from smalti.data import augment
from smalti.data.decode import decode_image
from smalti.data.order import Batch
from smalti.data.source import Sample, Source
from smalti.data.text import Texts
from smalti.errors import UserError

Crop = Literal["random", "center", "adm", "adm_random"]
ADM_CROPS = ("adm", "adm_random")  # which resize by themselves, and are validated with ADM's centre crop


class BadSample(UserError):
    """A sample that cannot be decoded; one line also after torch has wrapped it in a worker's traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition("BadSample: ")[2].strip())


class Split:
    """Some samples of a source: `samples` (n,) their sorted numbers, `sizes` how many lie in each shard."""

    def __init__(self, source: Source, samples: np.ndarray | None = None) -> None:
        self.source = source
        self.samples = np.arange(len(source)) if samples is None else samples
        self.sizes = np.diff(np.searchsorted(self.samples, np.cumsum([0, *source.sizes])))

    def __len__(self) -> int:
        return len(self.samples)


class Samples(Dataset[dict[str, Any]]):
    """Batches of a split; `samples[n]` is sample n alone, as a batch of one.

    A batch: what `empty` and `fill` make of the samples, under `name`; label (b,) int64 (-1: none), key list of b
    strings, and caption likewise when the source has any. texts: whose entries a batch also has, None: none.
    """

    name: str
    texts: Texts | None = None

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    @abstractmethod
    def empty(self, count: int) -> Tensor:
        """A tensor for `count` samples."""

    @abstractmethod
    def fill(self, row: np.ndarray, sample: Sample, epoch: int, number: int) -> None:
        """Write sample `number` into its row of the tensor. Raises ValueError when it cannot be decoded."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__(Batch(0, np.array([index])))

    def __getitems__(self, batch: Batch) -> dict[str, Any]:
        """torch's loader hands a whole batch over; one buffer is filled instead of stacking b tensors."""
        source = self.split.source
        samples = self.split.samples[batch.samples].tolist()
        values = self.empty(len(samples))
        rows = values.numpy()
        labels, keys, captions, texts = [], [], [], []
        for row, number in zip(rows, samples, strict=True):
            try:
                sample = source.read(number)
                self.fill(row, sample, batch.epoch, number)
                texts.append(None if self.texts is None else self.texts.read(sample, batch.epoch, number))
            except ValueError as error:
                raise BadSample(f"{source.place(number)} cannot be decoded: {error}; repair or remove it") from error
            except UserError as error:
                raise BadSample(str(error)) from error
            labels.append(sample.label)
            keys.append(source.key(number))
            captions.append(sample.caption or "")
        result: dict[str, Any] = {self.name: values, "label": torch.tensor(labels, dtype=torch.int64), "key": keys}
        result |= {"caption": captions} if source.has_captions else {}
        return result if self.texts is None else result | self.texts.batch(texts)


class Images(Samples):
    """image (b, 3, h, w) uint8. With `seed`, random crops and flips by the draws of (seed, epoch, sample); without,
    none."""

    name = "image"

    def __init__(
        self, split: Split, image_size: int, crop: Crop, resize: int, flip: bool = False, seed: int | None = None
    ) -> None:
        super().__init__(split)
        self.image_size, self.crop, self.resize = image_size, crop, resize
        self.flip, self.seed = flip, seed

    def empty(self, count: int) -> Tensor:
        return torch.empty(count, 3, self.image_size, self.image_size, dtype=torch.uint8)

    def fill(self, row: np.ndarray, sample: Sample, epoch: int, number: int) -> None:
        row.transpose(1, 2, 0)[:] = self.transform(decode_image(sample.image), epoch, number)

    def transform(self, image: np.ndarray, epoch: int, sample: int) -> np.ndarray:
        """(h, w, 3) uint8 -> (image_size, image_size, 3) uint8."""
        draws = None if self.seed is None else augment.draw(self.seed, epoch, sample)
        if self.crop == "adm_random" and draws is not None:
            image = augment.adm_random_crop(image, self.image_size, draws)
        elif self.crop in ADM_CROPS:
            image = augment.adm_crop(image, self.image_size)
        else:
            image = augment.resize_shorter(image, self.resize)
        if draws is not None:
            if self.crop == "random":
                image = augment.random_crop(image, self.image_size, draws)
            if self.flip and draws.flip < 0.5:
                image = augment.flip(image)
        return augment.center_crop(image, self.image_size)
