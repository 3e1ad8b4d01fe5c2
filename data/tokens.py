"""Token shards: a data set encoded once, by one tokenizer, for generators to be trained on.

Webdataset's tar shards again: `KEY.npy` (views, n) or (views, n, q), uint16 or uint32, beside the image's `KEY.cls` and
`KEY.txt`. index.json has, beside what every index has, `tokenizer` (its fingerprint and TokenSpec) and `views`, what
the rows of an array are:

    center    the centre crop
    flip      the centre crop, and its mirror image
    ten_crop  corners (top left, top right, bottom left, bottom right) and centre of a larger centre crop, then the same
              of its mirror image; ten for each enlargement

Of continuous tokens, `KEY.npy` has the moments of the posterior, (views, n, 2·d), means and then log-variances in
[−30, 20], not scaled, so that each epoch samples it anew; or the tokens themselves, (views, n, d), of a tokenizer
without a posterior. float16 or float32. index.json says which (`latents`), and has `statistics` of the latents: what
they are multiplied by to become tokens (`scale_factor`), and their number, mean and standard deviation by channel.

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
LATENTS = {"moments": 2, "latents": 1}  # kinds of continuous tokens in a shard: numbers for each channel


class TokenSource(ShardSource):
    """The samples of a list of token shards; `read` gives an array's bytes in place of an image's.

    index: what index.json says. spec: of the tokens. shape, dtype: of every sample's array.
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
        self.shape = (rows, *view_shape(self.spec, self.index.get("latents")))
        self.dtype = dtype_of(self.spec, self.index.get("latents"))
        for folder in folders[1:]:
            _check_same(self.folder, self.index, folder, token_index(folder) or {})


class TokenViews(Samples):
    """indices (b, n) or (b, n, q) int64 of one view a sample: drawn from (seed, epoch, sample), or without `seed` the
    centre crop."""

    name = "indices"

    def __init__(self, split: Split, source: TokenSource, seed: int | None) -> None:
        super().__init__(split)
        self.seed, self.shape, self.spec = seed, source.shape, source.spec
        self.dtype = source.dtype
        self.header = npy(np.empty(self.shape, self.dtype))[: -self.dtype.itemsize * math.prod(self.shape)]
        self.centre = CENTRE[source.index["views"]]

    def empty(self, count: int) -> Tensor:
        return torch.empty(count, *self.shape[1:], dtype=torch.int64)

    def fill(self, row: np.ndarray, sample: Sample, epoch: int, number: int) -> None:
        if sample.image.startswith(self.header):  # 40x np.load, which parses the header (2.5 against 100 µs)
            views = np.frombuffer(sample.image, self.dtype, offset=len(self.header)).reshape(self.shape)
        else:
            views = decode_member("npy", sample.image)
        if views.shape != self.shape or views.dtype.kind != self.dtype.kind:
            raise ValueError(f"an array of {views.dtype} {views.shape}, but index.json says {self.shape}")
        view = views[self.centre if self.seed is None else chosen_view(self.seed, epoch, number, len(views))]
        self.check(view)
        row[:] = view

    def check(self, view: np.ndarray) -> None:
        """Raises ValueError for what the tokenizer cannot have given."""
        if view.max() >= (self.spec.codebook_size or 0):
            raise ValueError(f"index {view.max()}, but the tokenizer has {self.spec.codebook_size} codes")


class LatentViews(TokenViews):
    """moments (b, n, 2·d) or latents (b, n, d), float32, of one view a sample, chosen as `TokenViews` does."""

    def __init__(self, split: Split, source: TokenSource, seed: int | None) -> None:
        super().__init__(split, source, seed)
        self.name = source.index["latents"]["kind"]

    def empty(self, count: int) -> Tensor:
        return torch.empty(count, *self.shape[1:])

    def check(self, view: np.ndarray) -> None:
        if not np.isfinite(view).all():
            raise ValueError(f"{self.name} that are not finite numbers")


def views_of(split: Split, source: TokenSource, seed: int | None) -> TokenViews:
    """The batches of token shards, of either kind."""
    return (LatentViews if source.spec.kind == "continuous" else TokenViews)(split, source, seed)


def chosen_view(seed: int, epoch: int, sample: int, views: int) -> int:
    """Which view of a sample an epoch sees. Of two, it is the second where training on images flips the sample."""
    return views - 1 - int(augment.draw(seed, epoch, sample).flip * views)


def view_shape(spec: TokenSpec, latents: Mapping[str, str] | None) -> tuple[int, ...]:
    """Of one view: (n,) or (n, q) indices; (n, 2·d) or (n, d) of the `latents` that index.json describes."""
    if latents is not None:
        return spec.length, LATENTS[latents["kind"]] * spec.dim
    return (spec.length, spec.depth) if spec.depth > 1 else (spec.length,)


def dtype_of(spec: TokenSpec, latents: Mapping[str, str] | None) -> np.dtype[Any]:
    """The type that holds a tokenizer's indices, or the `latents` that index.json describes."""
    if latents is not None:
        return np.dtype({"float16": "<f2", "float32": "<f4"}[latents["dtype"]])
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
        spec = TokenSpec.from_dict(index["tokenizer"]["spec"])
        known = index["views"] in VIEWS and isinstance(index["tokenizer"]["fingerprint"], str)
        if spec.kind == "continuous":
            dtype_of(spec, index["latents"])
            known = known and index["latents"]["kind"] in LATENTS
    except (TypeError, ValueError, KeyError):
        known = False
    if not known:
        raise UserError(f"{folder / 'index.json'} is damaged, or of a newer smalti; encode the images again")
    if spec.kind == "continuous" and not _has_scale(index.get("statistics")):
        raise UserError(
            f"{folder / 'index.json'} has no statistics of its latents (scale_factor): nobody knows their scale; "
            "encode the images again"
        )
    return index


def _has_scale(statistics: Any) -> bool:
    factor = statistics.get("scale_factor") if isinstance(statistics, dict) else None
    return isinstance(factor, float) and math.isfinite(factor) and factor > 0


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
        ("latents", *(one.get("latents") for one in (index, its))),
    ):
        if one != two:
            raise UserError(f"{other} differs from {folder} in {what}: {two} against {one}; encode both alike")


def _kind(source: Source) -> str:
    return "token shards" if isinstance(source, TokenSource) else "images"
