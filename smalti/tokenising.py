"""A data set as token shards (data/tokens.py), for generators; the program behind `encode.py data.path=…`.

    python encode.py data.path=IMAGES model_path=TOKENIZER output=DIR
    torchrun --nproc-per-node 8 encode.py data.path=IMAGES model_path=TOKENIZER output=DIR views=ten_crop
    python encode.py data.path=IMAGES model_path=TOKENIZER output=DIR text_encoder=google/flan-t5-xl

Shards of images become shards of tokens one by one; the files of a folder are shuffled and cut into shards. Processes
share the shards and need not wait for each other: the last one to finish writes index.json. What they write does not
depend on how many they are. A shard that is finished is kept, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from smalti.data import augment
from smalti.data.batches import Crop, Images, Samples, Split
from smalti.data.decode import decode_image
from smalti.data.folder import FolderSource
from smalti.data.module import DataModule, loader_of
from smalti.data.order import Batch
from smalti.data.shards import ShardSource, keys_for_shards, read_index, write_index, write_shard
from smalti.data.source import Sample, Source, replacing
from smalti.data.text import FEATURES, LONG, SHORT, Texts, captions_of, is_large
from smalti.data.tokens import VIEWS, dtype_of, npy, text_key, token_index
from smalti.errors import UserError
from smalti.evaluation.processes import processes
from smalti.evaluation.run import data_for
from smalti.exports import absolute
from smalti.headway import Headway
from smalti.latents import LatentSums, check_scale, factor_of
from smalti.text import TextEncoder
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.quantizers.kl import GaussianQuantizer

SAMPLES_PER_SHARD = 4000  # of a folder of images


@dataclass(frozen=True)
class Views:
    """Which crops of an image are encoded. kind: of data.tokens.VIEWS. enlarge: side of the centre crop that ten_crop
    cuts its crops from, in sides of a crop. crop: of the centre crop, "center" or "adm"."""

    kind: str
    enlarge: tuple[float, ...]
    crop: Crop

    @property
    def count(self) -> int:
        return VIEWS[self.kind] * (len(self.enlarge) if self.kind == "ten_crop" else 1)

    def described(self) -> dict[str, Any]:
        """As index.json has it."""
        if self.kind == "ten_crop":
            return {"views": self.kind, "enlarge": list(self.enlarge)}
        return {"views": self.kind, "crop": self.crop}


class Crops(Samples):
    """views (b, v, 3, h, w) uint8 of whole samples."""

    name = "views"

    def __init__(self, split: Split, views: Views, image_size: int) -> None:
        super().__init__(split)
        self.views, self.image_size = views, image_size
        self.centre = Images(split, image_size, views.crop, image_size)

    def empty(self, count: int) -> Tensor:
        return torch.empty(count, self.views.count, 3, self.image_size, self.image_size, dtype=torch.uint8)

    def fill(self, row: np.ndarray, sample: Sample, epoch: int, number: int) -> None:
        for place, view in enumerate(self.cut(decode_image(sample.image))):
            row[place].transpose(1, 2, 0)[:] = view

    def cut(self, image: np.ndarray) -> Iterator[np.ndarray]:
        """(h, w, 3) uint8 to its views, in the order of data/tokens.py."""
        size = self.image_size
        if self.views.kind == "ten_crop":
            for factor in self.views.enlarge:
                yield from augment.ten_crops(augment.adm_crop(image, int(factor * size)), size)
            return
        centre = self.centre.transform(image, 0, 0)
        yield centre
        if self.views.kind == "flip":
            yield augment.flip(centre)


class BothCaptions(Texts):
    """captions: of each sample, by the member that holds it (LONG, SHORT); none of an image smaller than its crop, from
    which no generator by text is to learn."""

    def __init__(self, source: ShardSource, image_size: int) -> None:
        self.source, self.image_size = source, image_size

    def read(self, sample: Sample, epoch: int, number: int) -> dict[str, str]:
        if not is_large(sample.image, self.image_size):
            return {}
        both = zip((LONG, SHORT), captions_of(self.source, number), strict=True)
        return {kind: caption for kind, caption in both if caption is not None}

    def batch(self, texts: Sequence[dict[str, str]]) -> dict[str, Any]:
        return {"captions": list(texts)}


@dataclass(frozen=True)
class Unit:
    """One shard to be written: some samples of a source, in order, under keys of their own."""

    source: Source
    folder: Path
    number: int
    samples: np.ndarray
    keys: Sequence[str]

    @property
    def file(self) -> Path:
        return self.folder / f"tokens-{self.number:06d}.tar"

    @property
    def part(self) -> Path:
        """Its entry for index.json, and what that will say of all, from when it is finished until all are."""
        return self.folder / ".parts" / f"{self.file.stem}.json"

    @cached_property
    def digest(self) -> str:
        """Of the keys: a finished shard is kept only if it is of the same samples."""
        return hashlib.sha256("\0".join(self.keys).encode(errors="surrogateescape")).hexdigest()[:16]


def tokenise(config: DictConfig | Mapping[str, Any]) -> None:
    """Write the token shards that configs/encode.yaml describes.

    Raises UserError for what cannot work, before anything is written, and for an image that cannot be read.
    """
    cfg: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)
    with processes(cfg["device"]) as (rank, world_size, device):
        tokenizer = Tokenizer.from_pretrained(cfg["model_path"]).to(device).eval()
        check_scale(tokenizer, "model_path", cfg["model_path"])
        data = data_for(tokenizer, cfg)
        data.check()
        crop: Crop = "adm" if data.crop.startswith("adm") else "center"
        views = Views(cfg["views"], tuple(cfg["enlarge"]), crop)
        output = Path(cfg["output"])
        text_encoder = open_text_encoder(cfg, data, device)
        about: dict[str, Any] = {
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint(),
                "path": absolute(cfg["model_path"]),
                "spec": tokenizer.spec.to_dict(),
            },
            **views.described(),
            **({} if text_encoder is None else {"text": text_encoder.describe()}),
            **described_latents(tokenizer, cfg["latent_dtype"]),
        }
        for folder in {folder for folder, _ in sources_of(data, output)}:
            _check_folder(folder, about)
        units = [unit for folder, source in sources_of(data, output) for unit in units_of(source, folder)]
        writer = _Writer(tokenizer, data, views, about, cfg["batch_size"], device, text_encoder)
        writer.run(units[rank::world_size], say=rank == 0)
        finish(units, about, factor_of(tokenizer))
        if rank == 0:
            count = sum(len(unit.samples) for unit in units)
            whose = "" if world_size == 1 else f"; {world_size} processes share them"
            texts = "" if text_encoder is None else f", and features of their captions by {text_encoder.name}"
            print(f"tokens of {count:,} images, {views.count} views each{texts}: {output}{whose}", flush=True)


def open_text_encoder(cfg: Mapping[str, Any], data: DataModule, device: torch.device) -> TextEncoder | None:
    """The text encoder that the config names. Raises UserError where there are no captions for it."""
    if (name := cfg["text_encoder"]) is None:
        return None
    if not all(split.source.has_captions for split in (data.train, data.validation)):
        raise UserError(
            f"text_encoder={name}, but data.path={data.path} has no captions; give shards with KEY.txt, or leave it out"
        )
    return TextEncoder(name, length=cfg["text_length"]).to(device)


def described_latents(tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """What index.json says of continuous tokens: what of them is stored, in which type; nothing of discrete ones."""
    if tokenizer.spec.kind == "discrete":
        return {}
    return {"latents": {"kind": "moments" if tokenizer.has_posterior else "latents", "dtype": dtype}}


def sources_of(data: DataModule, output: Path) -> list[tuple[Path, Source]]:
    """Every source of images once, and the folder that its tokens go to: `output`, or one in it for each split."""
    found: dict[int, tuple[str, Source]] = {}
    for name in ("train", "validation", "test"):
        source = getattr(data, name).source
        found.setdefault(id(source), (name, source))
    return [(output if len(found) == 1 else output / name, source) for name, source in found.values()]


def units_of(source: Source, folder: Path) -> list[Unit]:
    """The shards that a source becomes."""
    if not isinstance(source, FolderSource):
        ends = np.cumsum(source.sizes)
        parts = [np.arange(end - size, end) for size, end in zip(source.sizes, ends, strict=True) if size]
        return [
            Unit(source, folder, number, samples, [source.key(n) for n in samples.tolist()])
            for number, samples in enumerate(parts)
        ]
    # Training mixes neighbouring shards only, and a folder is sorted by class.
    order = np.argsort(np.random.PCG64(0).random_raw(len(source)), kind="stable")
    keys = keys_for_shards(source, order)
    starts = range(0, len(order), SAMPLES_PER_SHARD)
    cuts = [slice(start, start + SAMPLES_PER_SHARD) for start in starts]
    return [Unit(source, folder, number, order[cut], keys[cut]) for number, cut in enumerate(cuts)]


def finish(units: Sequence[Unit], about: Mapping[str, Any], factor: float) -> None:
    """Write index.json of every folder whose shards are all there; another process may do so at the same time.

    factor: of the tokenizer's latents; those that are stored are scaled already where there are no moments.
    """
    folders: dict[Path, list[Unit]] = {}
    for unit in units:
        folders.setdefault(unit.folder, []).append(unit)
    for folder, its in folders.items():
        try:
            entries = [json.loads(unit.part.read_text())["entry"] for unit in its]
        except FileNotFoundError:
            continue  # others are at work, or have just finished
        statistics = {}
        if "latents" in about:
            sums = LatentSums.empty(about["tokenizer"]["spec"]["dim"])
            for entry in entries:
                sums.add(LatentSums(**entry["latents"]))
            statistics = {"statistics": sums.described(factor if about["latents"]["kind"] == "moments" else 1.0)}
        write_index(folder, entries, its[0].source.classes, **about, **statistics)
        shutil.rmtree(folder / ".parts", ignore_errors=True)
        for left in folder.glob(".*.tar"):  # by a process that was killed
            left.unlink(missing_ok=True)


class _Writer:
    """Encodes units one after the other, and says how far it is."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: DataModule,
        views: Views,
        about: Mapping[str, Any],
        batch_size: int,
        device: torch.device,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        self.text_encoder = text_encoder
        self.tokenizer, self.data, self.views, self.about = tokenizer, data, views, about
        self.samples_a_batch = max(1, batch_size // views.count)
        self.batch_size, self.device = batch_size, device
        self.latents: Mapping[str, str] | None = about.get("latents")
        self.dtype = dtype_of(tokenizer.spec, self.latents)

    def run(self, units: Sequence[Unit], *, say: bool) -> None:
        missing = [unit for unit in units if not self.kept(unit)]
        mine, left = (sum(len(unit.samples) for unit in some) for some in (units, missing))
        if say and mine > left:
            print(f"{mine - left:,} images are encoded already", file=sys.stderr, flush=True)
        headway = Headway(left, "images encoded", say=say)
        for source in {id(unit.source): unit.source for unit in missing}.values():
            its = [unit for unit in missing if unit.source is source]
            batches = self._batches(its)
            for unit in its:
                self.write(unit, batches, headway)

    def kept(self, unit: Unit) -> bool:
        """Whether the shard is finished, of the same samples and whole; then its entry is there for `finish`."""
        entries = [*read_index(unit.folder).get("shardlist", ())]
        with suppress(FileNotFoundError):
            entries.append(json.loads(unit.part.read_text())["entry"])
        for entry in entries:
            if entry["url"] == unit.file.name and entry.get("keys") == unit.digest and unit.file.is_file():
                with unit.file.open("rb") as file:
                    whole = hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
                if whole:
                    self.note(unit, entry)
                    return True
        return False

    @torch.inference_mode()
    def encode(self, views: Tensor) -> tuple[list[np.ndarray], LatentSums | None]:
        """The array of each sample of (b, v, 3, h, w) uint8; and, of continuous tokens, the sums of all latents."""
        b, v = views.shape[:2]
        images = views.flatten(0, 1)
        found = []
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size].to(self.device, non_blocking=True)
            found.append(self.values_of(part.float() / 255).cpu())
        values = torch.cat(found)
        sums = None
        if self.latents is not None:
            sums = (LatentSums.of_moments if self.latents["kind"] == "moments" else LatentSums.of)(values)
            if not values.isfinite().all():
                raise UserError(
                    f"model_path={self.about['tokenizer']['path']} gives latents that are no finite numbers"
                )
        with np.errstate(over="ignore"):
            arrays = values.unflatten(0, (b, v)).numpy().astype(self.dtype)
        if self.latents is not None and not np.isfinite(arrays).all():
            largest = float(values.abs().max())
            raise UserError(f"latent_dtype=float16 does not hold latents as large as {largest:.3g}; use float32")
        return list(arrays), sums

    def values_of(self, images: Tensor) -> Tensor:
        """What is written of images (b, 3, h, w) in [0, 1]: indices; moments, with the log-variance clamped as whoever
        samples does, so that float16 holds it; latents."""
        if self.latents is None or self.latents["kind"] == "latents":
            return self.tokenizer.encode(images).values
        return torch.cat(GaussianQuantizer.posterior(self.tokenizer.moments_of(images)), dim=-1)

    def encode_texts(self, captions: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
        """The members that a sample's captions add to it: features of both, and the short one itself."""
        assert self.text_encoder is not None
        members: list[dict[str, Any]] = [{kind: its[kind] for kind in (SHORT,) if kind in its} for its in captions]
        for kind, name in FEATURES.items():
            rows = [row for row, its in enumerate(captions) if kind in its]
            if not rows:
                continue
            made = self.text_encoder.encode([captions[row][kind] for row in rows])
            assert made.features is not None and made.mask is not None
            for row, features, mask in zip(rows, made.features.cpu(), made.mask.cpu(), strict=True):
                members[row][name] = npy(features[mask].numpy())
        return members

    def write(self, unit: Unit, batches: Iterator[dict[str, Any]], headway: Headway) -> None:
        """One shard of the next samples of `batches`; no more than a batch of them is held."""
        sums = LatentSums.empty(self.tokenizer.spec.dim)

        def samples() -> Iterator[dict[str, Any]]:
            keys = iter(unit.keys)
            for _ in range(0, len(unit.samples), self.samples_a_batch):
                batch = next(batches)
                arrays, its = self.encode(batch["views"])
                if its is not None:
                    sums.add(its)
                captions = batch.get("caption", [])
                texts = self.encode_texts(batch["captions"]) if self.text_encoder else [{}] * len(arrays)
                for place, (array, label) in enumerate(zip(arrays, batch["label"].tolist(), strict=True)):
                    sample: dict[str, Any] = {"__key__": next(keys), "npy": npy(array)}
                    sample |= ({"cls": label} if label >= 0 else {}) | ({"txt": captions[place]} if captions else {})
                    yield sample | texts[place]
                headway.add(len(arrays))

        try:
            unit.part.parent.mkdir(parents=True, exist_ok=True)
            entry = write_shard(unit.file, samples()) | {"keys": unit.digest}
            self.note(unit, entry | ({} if self.latents is None else {"latents": sums.to_dict()}))
        except OSError as error:
            raise UserError(
                f"output: {unit.file} cannot be written ({error.strerror}); make room and run the same command again"
            ) from error

    def note(self, unit: Unit, entry: Mapping[str, Any]) -> None:
        unit.part.parent.mkdir(parents=True, exist_ok=True)
        with replacing(unit.part) as temporary:
            temporary.write_text(json.dumps({"entry": entry, "about": self.about}))

    def _batches(self, units: Sequence[Unit]) -> Iterator[dict[str, Any]]:
        """The views of all samples of units of one source, in order; no batch is of two units."""
        split = Split(units[0].source)
        size = self.samples_a_batch
        batches = [
            Batch(0, unit.samples[start : start + size])
            for unit in units
            for start in range(0, len(unit.samples), size)
        ]
        crops = Crops(split, self.views, self.data.image_size)
        if self.text_encoder is not None:
            assert isinstance(split.source, ShardSource)  # which has captions, as `open_text_encoder` has seen
            crops.texts = BothCaptions(split.source, self.data.image_size)
        return iter(loader_of(crops, batches, self.data.workers))


def _check_folder(folder: Path, about: Mapping[str, Any]) -> None:
    """A new folder, or one that the same tokenizer wrote the same views into. Raises UserError for another one."""
    found = [index] if (index := token_index(folder)) else []
    with suppress(ValueError, KeyError):
        found += [json.loads(part.read_text())["about"] for part in sorted(folder.glob(".parts/*.json"))[:1]]
    if not found and any(folder.glob("*.tar")):
        raise UserError(f"output={folder} has other shards already; name a new folder")
    for its in found:
        same = its["tokenizer"]["fingerprint"] == about["tokenizer"]["fingerprint"]
        if same and text_key(its) != text_key(about):
            raise UserError(
                f"output={folder} has tokens already, with {_texts_of(its)}, not {_texts_of(about)}; name a new folder"
            )
        if not same or any(its.get(key) != value for key, value in about.items() if key not in ("tokenizer", "text")):
            of = f"views={its['views']}" if same else f"tokenizer {its['tokenizer']['fingerprint'][:16]}"
            if same and its.get("latents") != about.get("latents"):
                of = f"latent_dtype={its['latents']['dtype']}"
            raise UserError(f"output={folder} has other tokens already ({of}); name a new folder, or remove it first")


def _texts_of(about: Mapping[str, Any]) -> str:
    text = about.get("text")
    return "no text features" if text is None else f"text features of {text['path']} (length {text['length']})"
