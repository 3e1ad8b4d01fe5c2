"""Token shards: a data set encoded once, by one tokenizer, for generators to be trained on.

Webdataset's tar shards again: `KEY.npy` (views, n) or (views, n, q), uint16 or uint32, beside the image's `KEY.cls` and
`KEY.txt`. index.json has, beside what every index has, `tokenizer` (its fingerprint and TokenSpec) and `views`, what
the rows of an array are:

    center    the centre crop
    flip      the centre crop, and its mirror image
    ten_crop  corners (top left, top right, bottom left, bottom right) and centre of a larger centre crop, then the same
              of its mirror image; ten for each enlargement

With features of their captions (data/text.py) index.json also has `text`: path, fingerprint and dim of the encoder that
made them, and the most tokens (length) that it read of a caption.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smalti.data import augment
from smalti.data.batches import Samples, Split
from smalti.data.decode import decode_member
from smalti.data.shards import ShardSource, find_shards, read_index
from smalti.data.source import Sample, Source
from smalti.errors import UserError
from smalti.tokenizers.spec import TokenSpec

VIEWS = {"center": 1, "flip": 2, "ten_crop": 10}  # rows of an array, for each enlargement
CENTRE = {"center": 0, "flip": 0, "ten_crop": 4}  # the row of the centre crop, which validation takes


class TokenSource(ShardSource):
    """The samples of a list of token shards; `read` gives an array's bytes in place of an image's.

    index: what index.json says. spec: of the tokens. shape: (views, n) or (views, n, q) of every sample.
    Raises UserError where shards are of several tokenizers or views.
    """

    contents = ("npy",)
    what = "tokens"

    def __init__(self, shards: Sequence[Path], cache: Path) -> None:
        super().__init__(shards, cache)
        folders = list(dict.fromkeys(shard.parent for shard in shards))
        self.folder, self.index = folders[0], token_index(folders[0]) or {}
        self.spec = TokenSpec.from_dict(self.index["tokenizer"]["spec"])
        rows = VIEWS[self.index["views"]] * len(self.index.get("enlarge") or [1])
        self.shape = (rows, self.spec.length, *([self.spec.depth] if self.spec.depth > 1 else []))
        for folder in folders[1:]:
            _check_same(self.folder, self.index, folder, token_index(folder) or {})


class TokenViews(Samples):
    """indices (b, n) or (b, n, q) int64 of one view a sample: drawn from (seed, epoch, sample), or without `seed` the
    centre crop."""

    name = "indices"

    def __init__(self, split: Split, source: TokenSource, seed: int | None) -> None:
        super().__init__(split)
        self.seed, self.shape, self.spec = seed, source.shape, source.spec
        self.dtype = dtype_of(source.spec)
        self.header = npy(np.empty(self.shape, self.dtype))[: -self.dtype.itemsize * math.prod(self.shape)]
        self.centre = CENTRE[source.index["views"]]

    def empty(self, count: int) -> Tensor:
        return torch.empty(count, *self.shape[1:], dtype=torch.int64)

    def fill(self, row: np.ndarray, sample: Sample, epoch: int, number: int) -> None:
        if sample.image.startswith(self.header):  # 40x np.load, which parses the header (2.5 against 100 µs)
            views = np.frombuffer(sample.image, self.dtype, offset=len(self.header)).reshape(self.shape)
        else:
            views = decode_member("npy", sample.image)
        if views.shape != self.shape or views.dtype.kind != "u":
            raise ValueError(f"an array of {views.dtype} {views.shape}, but index.json says {self.shape}")
        view = self.centre if self.seed is None else chosen_view(self.seed, epoch, number, len(views))
        if views[view].max() >= (self.spec.codebook_size or 0):
            raise ValueError(f"index {views[view].max()}, but the tokenizer has {self.spec.codebook_size} codes")
        row[:] = views[view]


def chosen_view(seed: int, epoch: int, sample: int, views: int) -> int:
    """Which view of a sample an epoch sees. Of two, it is the second where training on images flips the sample."""
    return views - 1 - int(augment.draw(seed, epoch, sample).flip * views)


def dtype_of(spec: TokenSpec) -> np.dtype[Any]:
    """The type that holds a tokenizer's indices."""
    return np.dtype("<u2" if (spec.codebook_size or 0) <= 2**16 else "<u4")


def npy(array: np.ndarray) -> bytes:
    """An array as a .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def token_index(folder: Path) -> dict[str, Any] | None:
    """index.json of a folder of token shards; None for shards of other things. Raises UserError when it is damaged."""
    index = read_index(folder)
    if "tokenizer" not in index:
        return None
    try:
        TokenSpec.from_dict(index["tokenizer"]["spec"])
        known = index["views"] in VIEWS and isinstance(index["tokenizer"]["fingerprint"], str)
    except (TypeError, ValueError, KeyError):
        known = False
    if not known:
        raise UserError(f"{folder / 'index.json'} is damaged, or of a newer smalti; encode the images again")
    return index


def holds_tokens(path: str | Sequence[str]) -> bool:
    """Whether a `data.path` names token shards. Raises UserError where it names nothing."""
    folder = Path(path).expanduser() if isinstance(path, str) else None
    if folder is not None and folder.is_dir():
        folders = [folder, folder / "train"]
    else:
        folders = [shard.parent for shard in find_shards(path)]
    return any(token_index(one) is not None for one in dict.fromkeys(folders))


def check_alike(source: Source, other: Source) -> None:
    """Raises UserError unless training and validation data are both images, or tokens of one tokenizer and kind."""
    if isinstance(source, TokenSource) != isinstance(other, TokenSource):
        raise UserError(
            f"data.path has {_kind(source)} and the validation data {_kind(other)}; give the same kind for both"
        )
    if isinstance(source, TokenSource) and isinstance(other, TokenSource):
        _check_same(source.folder, source.index, other.folder, other.index)


def text_key(index: Mapping[str, Any]) -> tuple[str, int] | None:
    """What tells text features apart, of an index: the encoder's fingerprint, and how many tokens it read at most."""
    return None if index.get("text") is None else (index["text"]["fingerprint"], index["text"]["length"])


def _check_same(folder: Path, index: dict[str, Any], other: Path, its: dict[str, Any]) -> None:
    for what, one, two in (
        ("the tokenizer", index["tokenizer"]["fingerprint"], its["tokenizer"]["fingerprint"]),
        ("views", *([one.get(key) for key in ("views", "enlarge", "crop")] for one in (index, its))),
        ("the text encoder", *(text_key(one) for one in (index, its))),
    ):
        if one != two:
            raise UserError(f"{other} differs from {folder} in {what}: {two} against {one}; encode both alike")


def _kind(source: Source) -> str:
    return "token shards" if isinstance(source, TokenSource) else "images"
