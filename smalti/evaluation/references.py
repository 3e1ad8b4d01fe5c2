"""What samples are compared with: images of the data, or a file of ADM's suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader

from smalti.data.module import DataModule, loader_of
from smalti.data.order import Batch
from smalti.errors import UserError
from smalti.evaluation.npz import ADMFile, Gaussian
from smalti.evaluation.protocol import sha256_of
from smalti.evaluation.run import fingerprint, split_name

SPLITS = ("train", "test")
Batches = Callable[[Sequence[range]], Iterator[Tensor]]  # ranges of numbers to their images, uint8 (b, 3, h, w)


@dataclass(frozen=True)
class Reference:
    """The images that samples are compared with.

    count: images, 0: it is statistics alone. batches: those of ranges of numbers. about: what the report says of it.
    statistics: of Inception's pool features, where a file gives them.
    """

    count: int
    about: dict[str, Any]
    batches: Batches
    statistics: Gaussian | None = None
    of_data: bool = True

    def words(self) -> str:
        """For a sentence."""
        return f"{self.about['name']} ({self.about['split']})"


def reference_of(cfg: Mapping[str, Any], data: DataModule, size: int) -> Reference:
    """The reference that the config names. Raises UserError for a file that is none, or of images of another size."""
    if cfg["reference"] in SPLITS:
        train = cfg["reference"] == "train"
        count, batches, keys = of_loader(
            (data.reference_loader if train else data.test_loader)(images=cfg["images"]), data
        )
        about = {"name": str(data.path or "shapes"), "split": "train" if train else split_name(data), "images": count}
        return Reference(count, about | {"fingerprint": keys}, batches)
    file = ADMFile(cfg["reference"], "reference")
    count = min(file.count, cfg["images"] or file.count)
    if file.shape is not None and file.shape[1] != size:
        raise UserError(
            f"reference={file.path} has images of {file.shape[1]} × {file.shape[1]}, but the samples are of {size} × "
            f"{size}; use size={file.shape[1]}, or another reference"
        )
    about = {
        "name": str(file.path),
        "split": "npz",
        "images": count,
        "sha256": sha256_of(file.path),
        "statistics": "mu and sigma of the file" if file.statistics is not None else "of its images",
    }
    return Reference(count, about, channels_first(file.batches), file.statistics, of_data=False)


def of_loader(loader: DataLoader[dict[str, Any]], data: DataModule) -> tuple[int, Batches, str]:
    """How many images a loader of the data has, those of ranges of their numbers, and a hash of their keys."""
    batches: Any = list(loader.batch_sampler)  # type: ignore[arg-type]  # of Batch, which torch types as lists
    order, samples = np.concatenate([batch.samples for batch in batches]), cast(Any, loader.dataset)

    def of_ranges(ranges: Sequence[range]) -> Iterator[Tensor]:
        mine = [Batch(0, order[numbers.start : numbers.stop]) for numbers in ranges]
        return (batch["image"] for batch in loader_of(samples, mine, data.workers))

    return len(order), of_ranges, fingerprint(samples, batches)


def channels_first(batches: Batches) -> Batches:
    """The same of images that come as (b, h, w, 3)."""
    return lambda ranges: (rearrange(images, "b h w c -> b c h w").contiguous() for images in batches(ranges))


def drawn_by(pictures: Callable[[Sequence[int]], Iterator[Tensor]]) -> Batches:
    """Batches of a `Sampler`, whose ranges are no longer than its batch size."""
    return channels_first(lambda ranges: (picture for numbers in ranges for picture in pictures(numbers)))


def samples_file(cfg: Mapping[str, Any]) -> ADMFile:
    """The file of samples that the config names. Raises UserError where it cannot be measured."""
    file = ADMFile(cfg["samples_path"], "samples_path")
    if cfg["model_path"] is not None:
        raise UserError(
            f"samples_path={file.path} and model_path={cfg['model_path']} exclude each other; give either samples, or "
            "the generator that is to make them"
        )
    if file.shape is None:
        raise UserError(f"samples_path={file.path} has statistics and no images (arr_0); give it as reference=…")
    if (asked := cfg["samples"]) is not None and asked > file.count:
        raise UserError(f"samples={asked}, but samples_path={file.path} has {file.count}; use at most that")
    return file
