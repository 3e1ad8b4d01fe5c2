"""Images in webdataset tar shards, read by offset and written.

A shard holds `KEY.jpg|jpeg|png|webp` with, optionally, `KEY.cls` (class number), `KEY.txt` (caption) and `KEY.json`.
Where each member lies is found once and kept in an offset table (offsets.py); from then on a member costs one `pread`
(15x cheaper than streaming the tar). `index.json` has the layout of webdataset's `wids`, and in addition sha256 sums
and class names.

    python -m smalti.data.shards write IMAGEFOLDER OUTPUT
    python -m smalti.data.shards verify FOLDER
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand  # a dependency of webdataset
from PIL import Image

from smalti.data.decode import IMAGE_TYPES, decode_image
from smalti.data.folder import FolderSource
from smalti.data.offsets import OffsetTable, offset_table
from smalti.data.source import Sample, replacing
from smalti.errors import UserError, run_command

_OPEN_FILES = 64  # of one process; shards are read in a moving window, so that few are in use at a time


def find_shards(spec: str | Sequence[str], key: str = "data.path") -> list[Path]:
    """The shards that a folder, a file, a glob (`*.tar`), a brace list (`{000..127}.tar`) or a list of these names.

    Raises UserError, naming the config key, when a named shard is missing or nothing is found.
    """
    found: list[Path] = []
    for pattern in [part for one in ([spec] if isinstance(spec, str) else spec) for part in braceexpand(str(one))]:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found += sorted(path.glob("*.tar"))
        elif path.is_file():
            found.append(path)
        else:
            matches = sorted(glob.glob(str(path)))
            if not matches:
                raise UserError(f"{key}={pattern} does not exist; check the path")
            found += map(Path, matches)
    if not found:
        raise UserError(f"{key}={spec} names no .tar shard; give a folder of shards, a glob or a brace list")
    compressed = [path for path in found if path.suffix != ".tar"]
    if compressed:
        raise UserError(f"{key}: {compressed[0]} is not a plain .tar, which is read by offset; unpack it first")
    return found


class ShardSource:
    """The samples of a list of shards, read by offset; one number for each, in the order of the shards.

    sizes: samples of each shard. classes: names from index.json, or None. Files are opened when first read and again in
    every spawned process; reading by offset shares nothing between forked ones.
    """

    contents: tuple[str, ...] = IMAGE_TYPES  # every sample has a member of one of these types
    what = "image"

    def __init__(self, shards: Sequence[Path], cache: Path) -> None:
        self.shards = [str(shard) for shard in shards]
        indexes = {folder: read_index(folder) for folder in dict.fromkeys(shard.parent for shard in shards)}
        self.classes: list[str] | None = next(
            (index["classes"] for index in indexes.values() if "classes" in index), None
        )
        for shard in shards:
            _compare_with_index(shard, indexes[shard.parent])
        tables = [offset_table(shard, cache) for shard in shards]
        self.sizes = np.array([len(table.keys) for table in tables], dtype=np.int64)
        self.table = OffsetTable.join(tables)
        self._ends = np.cumsum(self.sizes)
        without = np.flatnonzero(~self.table.having(self.contents))
        if len(without):
            raise UserError(
                f"{self.place(int(without[0]))} has no {self.what} ({', '.join(self.contents)}); is it cut off?"
            )
        self.has_captions = "txt" in self.table.types
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.table.keys)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}

    def key(self, sample: int) -> str:
        return self.table.keys[sample]

    def place(self, sample: int) -> str:
        """Where a sample is, for messages."""
        return f"{self.shards[self._shard(sample)]}: sample {self.key(sample)!r}"

    def read(self, sample: int) -> Sample:
        members = self.members(sample, (*self.contents, "cls", "txt"))
        image = next(members[kind] for kind in self.contents if kind in members)
        caption = members.get("txt")
        return Sample(image, int(members.get("cls", b"-1")), None if caption is None else caption.decode())

    def largest_label(self) -> int:
        if "cls" not in self.table.types:
            return -1
        return max(int(self.members(sample, ("cls",)).get("cls", b"-1")) for sample in range(len(self)))

    def members(self, sample: int, types: Sequence[str] | None = None) -> dict[str, bytes]:
        """The bytes of a sample's members, all or of these types. Raises UserError when the shard became shorter."""
        shard = self._shard(sample)
        members = {}
        for row in range(self.table.first[sample], self.table.first[sample + 1]):
            kind = self.table.types[self.table.kinds[row]]
            if types is None or kind in types:
                length = int(self.table.lengths[row])
                members[kind] = os.pread(self._file(shard), length, int(self.table.offsets[row]))
                if len(members[kind]) != length:
                    raise UserError(f"{self.place(sample)} is cut off: the shard became shorter after it was indexed")
        return members

    def close(self) -> None:
        """Close this process's files; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _shard(self, sample: int) -> int:
        return int(np.searchsorted(self._ends, sample, side="right"))

    def _file(self, shard: int) -> int:
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            file = self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        else:
            self._files.move_to_end(shard)
        return file

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a folder of shards, or an empty dict."""
    file = folder / "index.json"
    if not file.is_file():
        return {}
    try:
        index = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); delete it or write the shards again") from error
    return index if isinstance(index, dict) and "shardlist" in index else {}


def write_shard(file: Path, samples: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One shard with its offset table, each whole or not at all; returns its entry for index.json.

    A sample has `__key__` (no dot behind the last slash: a dot ends a key) and members by type: bytes as they are, a
    string, an int, or anything that JSON can hold. Equal samples give equal bytes: headers carry no date and no owner.
    """
    members: list[tuple[str, str, int, int]] = []
    digest = hashlib.sha256()
    count = position = 0
    with replacing(file) as temporary, open(temporary, "wb") as output:

        def write(data: bytes) -> None:
            nonlocal position
            digest.update(data)
            position += output.write(data)

        for sample in samples:
            count += 1
            key = sample["__key__"]
            if "." in key.rpartition("/")[2] or not key:
                raise ValueError(f"key {key!r}: a key is not empty and has no dot, which would end it")
            for kind, value in sample.items():
                if kind != "__key__":
                    data = _to_bytes(value)
                    header = tarfile.TarInfo(f"{key}.{kind}")
                    header.size = len(data)
                    write(header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
                    members.append((key, kind, position, len(data)))
                    write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        write(bytes(2 * tarfile.BLOCKSIZE))
    OffsetTable.build(members).save(file.with_suffix(".offsets.npz"), file)
    return {"url": file.name, "nsamples": count, "filesize": position, "sha256": digest.hexdigest()}


def write_index(
    folder: Path, entries: Sequence[dict[str, Any]], classes: Sequence[str] | None = None, **more: Any
) -> Path:
    """index.json of a folder of shards, in webdataset's wids layout; written last, so that it stands for them all.

    more: further plain JSON values.
    """
    index: dict[str, Any] = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": list(entries), **more}
    if classes is not None:
        index["classes"] = list(classes)
    with replacing(folder / "index.json") as temporary:
        temporary.write_text(json.dumps(index, indent=1) + "\n")
    return folder / "index.json"


def write_shards(
    folder: str | os.PathLike[str],
    samples: Iterable[dict[str, Any]],
    *,
    samples_per_shard: int = 4000,
    name: str = "shard",
    classes: Sequence[str] | None = None,
) -> Path:
    """Any iterable of samples (see `write_shard`) as a new folder of shards with its index; returns the index.

    Samples keep their order, and training mixes only neighbouring shards: shuffle first what is sorted by class.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.glob("*.tar")):
        raise UserError(f"output={folder} has shards already; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    iterator = iter(samples)
    entries: list[dict[str, Any]] = []
    while block := list(islice(iterator, samples_per_shard)):
        entries.append(write_shard(folder / f"{name}-{len(entries):06d}.tar", block))
    return write_index(folder, entries, classes)


def write_image_folder(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    samples_per_shard: int = 4000,
    seed: int = 0,
    name: str = "shard",
    classes: Sequence[str] | None = None,
) -> Path:
    """An ImageFolder as shards, shuffled by `seed`; files of the stored types keep their bytes, others become PNG.

    Keys are the paths below the folder. classes: the names that class numbers refer to, if not this folder's own.
    """
    if not Path(source).is_dir():
        raise UserError(f"source={source} is not a folder")
    images = FolderSource(Path(source), classes=classes, name="source")
    order = np.argsort(np.random.PCG64(seed).random_raw(len(images)), kind="stable")

    def samples() -> Iterator[dict[str, Any]]:
        for number, key in zip(order.tolist(), keys_for_shards(images, order), strict=True):
            sample = images.read(number)
            kind, data = os.path.splitext(images.place(number))[1][1:].lower(), sample.image
            if kind not in IMAGE_TYPES:
                kind, data = "png", _png(decode_image(data))
            yield {"__key__": key, kind: data} | ({"cls": sample.label} if sample.label >= 0 else {})

    return write_shards(folder, samples(), samples_per_shard=samples_per_shard, name=name, classes=images.classes)


def keys_for_shards(images: FolderSource, order: np.ndarray) -> list[str]:
    """The keys of a folder's images in a shard: their paths, without dots behind the last slash, each once."""
    taken: dict[str, None] = {}
    for number in order.tolist():
        path, _, stem = images.key(number).rpartition("/")
        stem = stem.replace(".", "_")
        key = f"{path}/{stem}" if path else stem
        while key in taken:  # a.jpg beside a.png
            key += "_"
        taken[key] = None
    return list(taken)


def verify(folder: str | os.PathLike[str]) -> int:
    """Compare every shard with its sha256 in index.json; returns their number, raises UserError at a difference."""
    entries = read_index(Path(folder)).get("shardlist", [])
    if not entries:
        raise UserError(f"folder={folder} has no index.json to verify against")
    for entry in entries:
        file = Path(folder) / entry["url"]
        if not file.is_file():
            raise UserError(f"{file} is in index.json but does not exist")
        if "sha256" in entry:
            with open(file, "rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != entry["sha256"]:
                    raise UserError(f"{file} has another sha256 than index.json says; copy or write it again")
    return len(entries)


def _compare_with_index(shard: Path, index: dict[str, Any]) -> None:
    for entry in index.get("shardlist", ()):
        size = entry.get("filesize")
        if Path(entry.get("url", "")).name == shard.name and size is not None and size != shard.stat().st_size:
            raise UserError(f"{shard} has {shard.stat().st_size} bytes but index.json says {size}; copy it again")


def _to_bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value)).encode()


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m smalti.data.shards", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="an ImageFolder as shards")
    write.add_argument("source", help="folder with one folder of images per class, or with images alone")
    write.add_argument("output", help="new folder for the shards and their index.json")
    write.add_argument("--samples-per-shard", type=int, default=4000)
    write.add_argument("--seed", type=int, default=0, help="of the order in which images are written")
    commands.add_parser("verify", help="compare shards with the sums in index.json").add_argument("folder")
    arguments = parser.parse_args()
    if arguments.command == "write":
        index = write_image_folder(
            arguments.source, arguments.output, samples_per_shard=arguments.samples_per_shard, seed=arguments.seed
        )
        count = sum(entry["nsamples"] for entry in read_index(index.parent)["shardlist"])
        print(f"wrote {count} samples to {index.parent}")
    else:
        print(f"{verify(arguments.folder)} shards are as index.json says")


if __name__ == "__main__":
    run_command(_main)
