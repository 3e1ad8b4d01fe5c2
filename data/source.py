"""What the loader reads from: numbered samples in one or more shards (tar shards, or the files of a folder)."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One sample as stored: the bytes of its image or tokens, its class number (-1: none), caption (None: none)."""

    image: bytes
    label: int = -1
    caption: str | None = None


class Source(Protocol):
    """Samples 0 … n − 1. sizes: samples of each shard, in order. classes: names of the class numbers, if known."""

    classes: list[str] | None
    sizes: np.ndarray
    has_captions: bool

    def __len__(self) -> int: ...

    def key(self, sample: int) -> str: ...

    def place(self, sample: int) -> str:
        """Where a sample is, for messages."""

    def read(self, sample: int) -> Sample:
        """Raises UserError when the file is gone or short, ValueError when a member cannot be decoded."""

    def largest_label(self) -> int:
        """The largest class number of all samples, -1 where none has any; may read them all."""


class PackedStrings:
    """Strings in one buffer: a million keys without a million objects, which forked workers would copy one by one."""

    def __init__(self, buffer: np.ndarray, ends: np.ndarray) -> None:
        self.buffer, self.ends = buffer, ends  # (bytes,) uint8, (n,) int64

    @classmethod
    def pack(cls, strings: Iterable[str]) -> PackedStrings:
        encoded = [os.fsencode(string) for string in strings]
        ends = np.cumsum([len(one) for one in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    @classmethod
    def join(cls, parts: Sequence[PackedStrings]) -> PackedStrings:
        shifts = np.cumsum([0, *(len(part.buffer) for part in parts[:-1])])
        ends = [part.ends + shift for part, shift in zip(parts, shifts, strict=True)]
        return cls(np.concatenate([part.buffer for part in parts]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.buffer[start : self.ends[index]].tobytes())


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary path in the same folder, which becomes `file` when the block ends well and is deleted otherwise."""
    temporary = file.with_name(f".{secrets.token_hex(4)}.{file.name}")
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """Where derived files go: the given folder, else $SMALTI_CACHE, else ~/.cache/smalti."""
    return Path(cache or os.environ.get("SMALTI_CACHE") or "~/.cache/smalti").expanduser()
