"""Where the members of a tar shard lie: found once by going through its headers, then kept beside it.

A table (`NAME.offsets.npz`) is taken for good as long as its shard has the size and the date that it had.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smalti.data.decode import decodable
from smalti.data.source import PackedStrings, replacing
from smalti.errors import UserError

_VERSION = 2


@dataclass(frozen=True)
class OffsetTable:
    """Where the members of one or several shards lie, grouped by sample.

    keys: n samples. first: (n + 1,) into the members of all samples, which have a type (into `types`), the offset and
    the size of their bytes.
    """

    keys: PackedStrings
    first: np.ndarray
    types: list[str]
    kinds: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray

    @classmethod
    def build(cls, members: Iterable[tuple[str, str, int, int]]) -> OffsetTable:
        """From (key, type, offset, size) in the order of the shard; neighbours with one key are one sample."""
        keys: list[str] = []
        first: list[int] = []
        types: dict[str, int] = {}
        rows: list[tuple[int, int, int]] = []
        for key, kind, offset, size in members:
            if not keys or keys[-1] != key:
                keys.append(key)
                first.append(len(rows))
            rows.append((types.setdefault(kind, len(types)), offset, size))
        columns = np.array(rows, dtype=np.int64).reshape(-1, 3)
        return cls(
            PackedStrings.pack(keys),
            np.array([*first, len(rows)], dtype=np.int64),
            list(types),
            columns[:, 0].astype(np.uint16),
            columns[:, 1],
            columns[:, 2],
        )

    @classmethod
    def join(cls, tables: Sequence[OffsetTable]) -> OffsetTable:
        types = list(dict.fromkeys(kind for table in tables for kind in table.types))
        shifts = np.cumsum([0, *(len(table.kinds) for table in tables)])
        starts = [table.first[:-1] + shift for table, shift in zip(tables, shifts, strict=False)]
        renamed = [np.array([types.index(kind) for kind in table.types] or [0], np.uint16) for table in tables]
        return cls(
            PackedStrings.join([table.keys for table in tables]),
            np.append(np.concatenate(starts), shifts[-1]),
            types,
            np.concatenate([names[table.kinds] for names, table in zip(renamed, tables, strict=True)]),
            np.concatenate([table.offsets for table in tables]),
            np.concatenate([table.lengths for table in tables]),
        )

    def having(self, types: Iterable[str]) -> np.ndarray:
        """(n,) bool: which samples have a member of one of these types."""
        wanted = np.isin(self.kinds, [self.types.index(kind) for kind in types if kind in self.types])
        counts = np.concatenate([[0], np.cumsum(wanted)])
        return counts[self.first[1:]] > counts[self.first[:-1]]

    def save(self, file: Path, shard: Path) -> None:
        """Write it whole or not at all, with what tells whether the shard has changed since."""
        with replacing(file) as temporary:
            np.savez(
                temporary,
                version=_VERSION,
                shard=_stamp(shard),
                keys=self.keys.buffer,
                key_ends=self.keys.ends,
                first=self.first,
                types=np.frombuffer(json.dumps(self.types).encode(), dtype=np.uint8),
                kinds=self.kinds,
                offsets=self.offsets,
                lengths=self.lengths,
            )

    @classmethod
    def load(cls, file: Path, shard: Path) -> OffsetTable | None:
        """The saved table; None when there is none, it is damaged, or the shard has another size or date."""
        try:
            with np.load(file, allow_pickle=False) as saved:
                if saved["version"] != _VERSION or not np.array_equal(saved["shard"], _stamp(shard)):
                    return None
                return cls(
                    PackedStrings(saved["keys"], saved["key_ends"]),
                    saved["first"],
                    json.loads(saved["types"].tobytes()),
                    saved["kinds"],
                    saved["offsets"],
                    saved["lengths"],
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None


def offset_table(shard: Path, cache: Path) -> OffsetTable:
    """The table of a shard: read where it was kept, else built by going through the shard's headers, and kept."""
    beside = shard.with_suffix(".offsets.npz")
    digest = hashlib.sha256(str(shard.resolve()).encode()).hexdigest()[:16]
    places = (beside, cache / "offsets" / f"{shard.stem}-{digest}.npz")
    for place in places:
        table = OffsetTable.load(place, shard)
        if table is not None:
            return table
    table = OffsetTable.build(_members(shard))
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            table.save(place, shard)
            break
        except OSError:
            continue  # a folder that cannot be written; with neither, the next run builds the table again
    return table


def _members(shard: Path) -> Iterator[tuple[str, str, int, int]]:
    """(key, type, offset, size) of every member that may be decoded, in order; webdataset's rule for keys.

    Raises UserError when the shard is no tar, ends early, or has a member twice.
    """
    previous: tuple[str, set[str]] = ("", set())
    try:
        with open(shard, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                path, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                kind = kind.lower()
                if not (member.isreg() and stem and decodable(kind)):
                    continue
                key = f"{path}/{stem}" if path else stem
                if key != previous[0]:
                    previous = (key, set())
                if kind in previous[1]:
                    raise UserError(f"{shard}: sample {key!r} has two members .{kind}; keys end at the first dot")
                previous[1].add(kind)
                yield key, kind, member.offset_data, member.size
            # A tar ends with blocks of zeros; tarfile takes anything else behind a member for the end as well.
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise UserError(f"{shard} is damaged or cut off at byte {tar.offset}; copy or write it again")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{shard} cannot be read as a tar ({error}); copy or write it again") from error


def _stamp(shard: Path) -> np.ndarray:
    status = shard.stat()
    return np.array([status.st_size, status.st_mtime_ns], dtype=np.int64)
