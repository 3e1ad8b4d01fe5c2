"""Folders of small images."""

from pathlib import Path

import pytest
from PIL import Image
from sample_images import picture, samples

from smalti.data.shards import write_shards


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Ten images in three classes, at two depths, in four types of file."""
    for number in range(10):
        folder = tmp_path / "images" / ("cat", "dog/young", "emu")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(folder / f"{number}.{('png', 'jpg', 'webp', 'bmp')[number % 4]}")
    return tmp_path / "images"


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """47 images with classes and captions in five shards; not to be written to."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, samples(47), samples_per_shard=10, classes=["a", "b", "c"])
    return folder
