"""The `.npz` files of ADM's evaluation suite: images `arr_0` (N, h, w, 3) uint8, and statistics `mu` and `sigma`.

Images are read in a stream: 50,000 of 256 × 256 are 10 GB, which `numpy.load` would hold at once.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smalti.errors import UserError

SKIP = 1 << 20  # bytes read at once on the way to the images that are asked for


@dataclass(frozen=True)
class Gaussian:
    """Mean (f,) and covariance (f, f) of features, float64."""

    mean: Tensor
    covariance: Tensor


class ADMFile:
    """One such file. `shape` is (N, h, w, 3), or None where it has statistics alone.

    key: the config's name of the path, for messages. Raises UserError for a file of another kind.
    """

    def __init__(self, path: str, key: str) -> None:
        self.path, self.key = Path(path).expanduser(), key
        if not self.path.is_file():
            raise UserError(f"{key}={path} is not a file; give an .npz with images arr_0 (N, h, w, 3)")
        try:
            with zipfile.ZipFile(self.path) as archive:
                self.names = {name.removesuffix(".npy") for name in archive.namelist()}
                self.shape = self._header(archive) if "arr_0" in self.names else None
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise UserError(f"{key}={path} is not an .npz that can be read ({error}); make it again") from error
        if self.shape is None and not {"mu", "sigma"} <= self.names:
            held = ", ".join(sorted(self.names)) or "nothing"
            raise UserError(f"{key}={path} holds {held}, but images are read from arr_0 and statistics from mu, sigma")

    @property
    def count(self) -> int:
        """Images."""
        return 0 if self.shape is None else self.shape[0]

    def _header(self, archive: zipfile.ZipFile) -> tuple[int, ...]:
        with archive.open("arr_0.npy") as member:
            shape, fortran, dtype = _read_header(member)
        if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or dtype != np.uint8 or fortran or not shape[0]:
            raise UserError(
                f"{self.key}={self.path} has arr_0 of {dtype} {shape}, but square images are (N, size, size, 3) uint8"
            )
        return shape

    def batches(self, ranges: Sequence[range]) -> Iterator[Tensor]:
        """(b, h, w, 3) uint8 of each range of numbers, which must rise. A range's images are all that is held."""
        assert self.shape is not None
        size = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            _read_header(member)
            at = 0
            for numbers in ranges:
                self._take(member, (numbers.start - at) * size, keep=False)
                images = self._take(member, len(numbers) * size, keep=True)
                at = numbers.stop
                yield torch.frombuffer(images, dtype=torch.uint8).view(len(numbers), *self.shape[1:])

    def _take(self, member: Any, count: int, *, keep: bool) -> bytearray:
        taken = bytearray(count if keep else 0)
        done = 0
        while done < count:
            part = member.read(min(count - done, SKIP))
            if not part:
                raise UserError(f"{self.key}={self.path} ends before its last image; make it again")
            if keep:
                taken[done : done + len(part)] = part
            done += len(part)
        return taken

    @cached_property
    def statistics(self) -> Gaussian | None:
        """`mu` (f,) and `sigma` (f, f) of Inception's pool features, where the file has them."""
        if not {"mu", "sigma"} <= self.names:
            return None
        try:
            with np.load(self.path) as arrays:
                mean, covariance = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
        except (ValueError, OSError) as error:  # of objects, which would be unpickled
            raise UserError(f"{self.key}={self.path}: mu and sigma cannot be read ({error})") from error
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            shapes = f"mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}"
            raise UserError(f"{self.key}={self.path} has {shapes}, but statistics are (f,) and (f, f)")
        return Gaussian(mean, covariance)


def _read_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and dtype of the array that begins here."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)
