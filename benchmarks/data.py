"""Reading shards of 32 px JPEGs: ours against `WebDataset(...).decode("pil")`, torchvision's transforms and batching.

    python benchmarks/data.py [--images 5000] [--rounds 7]

One process, one thread, no workers: images a second and core. Interleaved pairs, medians of CPU time. The images are
CIFAR-10's where $SMALTI_SHARED (or ../shared) has data/cifar10.zip, else drawn ones.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import webdataset
from PIL import Image
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from smalti.data import decode  # noqa: E402
from smalti.data.module import DataModule  # noqa: E402
from smalti.data.shapes import draw  # noqa: E402
from smalti.data.shards import write_shards  # noqa: E402


def samples(count: int) -> Iterator[dict[str, Any]]:
    archive = Path(os.environ.get("SMALTI_SHARED", ROOT.parent / "shared")) / "data" / "cifar10.zip"
    if archive.is_file():
        with zipfile.ZipFile(archive) as images:
            names = sorted(name for name in images.namelist() if name.startswith("train/"))
            for number in range(count):
                yield {
                    "__key__": f"{number:06d}",
                    "jpg": images.read(names[number * 7919 % len(names)]),
                    "cls": number % 10,
                }
        return
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(draw(0, number, 32).image).save(file, "JPEG", quality=90)
        yield {"__key__": f"{number:06d}", "jpg": file.getvalue(), "cls": number % 10}


def plain(shards: list[str], batch_size: int, size: int, crop: int) -> int:
    """The pipeline of the published loaders, with a shuffle buffer."""
    transform = transforms.Compose(
        [
            transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True),
            transforms.RandomCrop(crop),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=100, seed=0)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .batched(batch_size, partial=False)
    )
    return sum(len(images) for images, _ in dataset)


def ours(folder: str, batch_size: int, size: int, crop: int) -> int:
    data = DataModule(
        path=folder, val_path=folder, image_size=crop, resize=size, batch_size=batch_size, workers=0, crop="random"
    )
    # Made into [0, 1] as ToTensor does, though in a run the device does it.
    return sum(len(batch["image"].float().div_(255)) for batch in data.train_loader())


def seconds(work: Callable[[], int]) -> float:
    """CPU seconds an image."""
    before = time.process_time()
    images = work()
    return (time.process_time() - before) / images


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, samples(arguments.images), samples_per_shard=1000)
        shards = [str(path) for path in sorted(Path(folder).glob("*.tar"))]
        for title, size, decoder in (
            ("32 px as they are", 32, decode._exact_jpeg_decoder),
            ("the same, decoded by Pillow", 32, lambda: None),
            ("resized to 40, cropped to 32", 40, decode._exact_jpeg_decoder),
        ):
            with mock.patch.object(decode, "_exact_jpeg_decoder", decoder):
                pairs = []
                for _ in range(arguments.rounds + 1):
                    theirs = seconds(partial(plain, shards, arguments.batch_size, size, 32))
                    pairs.append((theirs, seconds(partial(ours, folder, arguments.batch_size, size, 32))))
            theirs, mine = (statistics.median(column) for column in zip(*pairs[1:], strict=True))  # the first warms up
            ratio = statistics.median(theirs / mine for theirs, mine in pairs[1:])
            print(
                f"{title}: smalti {1 / mine:,.0f} images/s a core ({mine * 1e6:.0f} µs), "
                f"webdataset + Pillow + torchvision {1 / theirs:,.0f} ({theirs * 1e6:.0f} µs): {ratio:.1f} times"
            )


if __name__ == "__main__":
    main()
