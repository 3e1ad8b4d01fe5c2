"""An ImageFolder read in place: one folder a class (images at any depth below it), or images alone without classes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from smalti.data.source import PackedStrings, Sample
from smalti.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


class FolderSource:
    """The images below a folder, in the order of their paths. Every file is a shard of its own: none is near another.

    classes: names that class numbers refer to; None: this folder's own, sorted. name: the config key, for errors.
    Raises UserError when there are no images, or an image's class is not among `classes`.
    """

    has_captions = False

    def __init__(self, folder: Path, *, classes: Sequence[str] | None = None, name: str = "data.path") -> None:
        self.folder = folder
        paths = sorted(_images_below(str(folder)))
        if not paths:
            raise UserError(
                f"{name}={folder} holds no images ({', '.join(SUFFIXES)}) and no .tar shards; check the path"
            )
        folders = [path.partition("/")[0] if "/" in path else None for path in paths]
        beside = folders.count(None)
        if 0 < beside < len(paths):
            raise UserError(
                f"{name}={folder} has {beside} images beside its class folders; move them into a class or away"
            )
        self.classes = None if beside else list(classes) if classes is not None else class_folders(folder)
        numbers = {one: number for number, one in enumerate(self.classes or ())}
        unknown = [one for one in folders if one is not None and one not in numbers]
        if unknown:
            raise UserError(f"{name}={folder} has the class {unknown[0]!r}, which the training images do not have")
        self.labels = np.array([-1 if one is None else numbers[one] for one in folders], dtype=np.int64)
        self.paths = PackedStrings.pack(paths)
        self.sizes = np.ones(len(paths), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, sample: int) -> str:
        """The path below the folder, without suffix."""
        return os.path.splitext(self.paths[sample])[0]

    def place(self, sample: int) -> str:
        return str(self.folder / self.paths[sample])

    def largest_label(self) -> int:
        return int(self.labels.max())

    def read(self, sample: int) -> Sample:
        try:
            with open(self.place(sample), "rb", buffering=0) as file:
                return Sample(file.read(), int(self.labels[sample]))
        except OSError as error:
            raise UserError(f"{self.place(sample)} cannot be read: {error.strerror}") from error


def class_folders(folder: Path) -> list[str]:
    """The names of the folders with images in a folder, sorted."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    return [name for name in names if any(_images_below(str(folder / name)))]


def _images_below(folder: str) -> Iterator[str]:
    """Paths of images relative to `folder`, in no particular order; hidden files and folders are none of ours."""
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = "" if path == folder else os.path.relpath(path, folder).replace(os.sep, "/") + "/"
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield prefix + name
