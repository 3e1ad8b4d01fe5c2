"""Checkpoints that survive being killed: written aside, synced, renamed; verified before they are read.

A checkpoint is what `torch.save` writes (so `torch.load(weights_only=True)` opens it) followed by a line of 78 bytes
with the SHA-256 of what stands before it. One file, one rename: there is no moment at which it is half there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from smalti.errors import UserError

MARK = b"smalti-sha256:"
TRAILER = len(MARK) + 64
_NAME = re.compile(r"step-(\d+)\.ckpt")


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}.ckpt"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, -1 for a name of another form."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first; not verified."""
    found = [path for path in folder.glob("step-*.ckpt") if step_of(path) >= 0]
    return sorted(found, key=step_of, reverse=True)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, None when it is whole: its bytes are hashed and compared."""
    try:
        size = path.stat().st_size
        if size <= TRAILER:
            return f"only {size} bytes"
        digest, left = hashlib.sha256(), size - TRAILER
        with path.open("rb") as file:
            while left:
                block = file.read(min(left, 1 << 22))
                if not block:
                    return "it ends early"
                digest.update(block)
                left -= len(block)
            trailer = file.read(TRAILER)
    except OSError as error:
        return error.strerror or str(error)
    if not trailer.startswith(MARK):
        return "it ends early"
    return None if trailer[len(MARK) :] == digest.hexdigest().encode() else "its checksum is wrong"


def newest_good(folder: Path, say: Callable[[str], None] = warnings.warn) -> Path | None:
    """The newest whole checkpoint in `folder`, None when it holds none at all.

    A damaged one is reported by `say` with the one used in its place, and set aside as `….damaged`, so that it never
    counts among those that are kept. Raises UserError when every checkpoint is damaged.
    """
    damaged: dict[Path, str] = {}
    for path in list_checkpoints(folder):
        problem = damage(path)
        if problem is not None:
            damaged[path] = problem
            continue
        if damaged:
            say(f"checkpoint damaged: {_list(damaged)}; going on from the one before, {path}")
            for bad in damaged:
                with contextlib.suppress(OSError):  # another process did it, or the folder is read-only
                    os.replace(bad, bad.with_name(bad.name + ".damaged"))
        return path
    if damaged:
        raise UserError(f"no checkpoint can be read: {_list(damaged)}; resume=never starts a new run")
    return None


def _list(damaged: dict[Path, str]) -> str:
    return ", ".join(f"{path} ({problem})" for path, problem in damaged.items())


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write atomically: a temporary name in the same folder, fsync, rename, fsync of the folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("wb") as file:
            hashing: Any = _Hashing(file)  # torch.save needs no more of a file than this
            torch.save(checkpoint, hashing)
            file.write(MARK + hashing.digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def load(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint after verifying it; tensors and plain values only, no pickle is executed."""
    problem = damage(path)
    if problem is not None:
        raise UserError(f"checkpoint {path} is damaged: {problem}")
    loaded: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
    return loaded


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what an interrupted write left."""
    for path in list_checkpoints(folder)[max(2, keep) :]:
        path.unlink(missing_ok=True)
    for path in folder.glob("step-*.ckpt.tmp"):
        path.unlink(missing_ok=True)


class VerifiedCheckpoints(CheckpointIO):
    """Lightning's way to disk, through the functions above.

    A failed write is kept in `failure` instead of being raised on the writing process alone: Checkpointing tells it to
    all. A damaged file is replaced by the newest whole one of its folder, with a message that names both.
    """

    def __init__(self, say: Callable[[str], None] = warnings.warn) -> None:
        self.failure: str | None = None
        self._say = say

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.failure = None
        try:
            save(checkpoint, Path(path))
        except (OSError, RuntimeError) as error:  # torch.save turns a short write into a RuntimeError
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
            self.failure = f"{path} could not be written ({reason})"

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        wanted = Path(path)
        good: Path | None = wanted
        if damage(wanted) is not None:
            good = newest_good(wanted.parent, self._say) if step_of(wanted) >= 0 else wanted
        return load(good or wanted, map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class _Hashing:
    """A file open for writing that hashes what goes through."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, block: bytes) -> int:
        self.digest.update(block)
        return self.file.write(block)

    def flush(self) -> None:
        self.file.flush()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
