"""Pictures from an exported generator; the program behind `generate.py`.

    python generate.py model_path=DIR labels=[0,1,2] num=16                     a picture of all, samples.png
    python generate.py model_path=DIR 'prompts=["a red circle"]'                     of a text
    python generate.py model_path=DIR output=FOLDER num=1000                    a PNG each
    torchrun --nproc-per-node 8 generate.py model_path=DIR output=adm.npz num=50000

Picture i is made from (seed, i) alone: neither batches nor processes change it, beyond the order of sums. A folder and
an .npz are made in parts, which the processes share; a part that is finished is kept, so that the same command goes on
where it stopped, and no process holds more than a part.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from smalti.data.source import replacing
from smalti.errors import UserError
from smalti.evaluation.adm import sample_to_uint8
from smalti.evaluation.pictures import grid, save_png
from smalti.evaluation.processes import processes
from smalti.evaluation.run import load_tokenizer
from smalti.evaluation.sampling import describe_sampling, override_sampling
from smalti.generators.base import Condition, Generator
from smalti.headway import Headway
from smalti.text import LENGTH, TextEncoder
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.spec import Tokens
from smalti.training.draws import generator as draws_of
from smalti.training.draws import seed_of

PART = 512  # pictures
LISTED = 1024  # prompts


@dataclass(frozen=True)
class Sampler:
    """A generator with its tokenizer: numbers of pictures to pictures.

    labels: class numbers, of picture i the (i modulo their number)-th; None for a generator without classes. prompts:
    texts likewise, for a generator by text, and the encoder that makes features of them.
    length: tokens of a picture, None: all. size: side in pixels, None: the tokenizer's.
    """

    generator: Generator
    tokenizer: Tokenizer
    device: torch.device
    labels: Sequence[int] | None = None
    length: int | None = None
    size: int | None = None
    seed: int = 0
    batch_size: int = 16
    half: bool = False
    prompts: Sequence[str] | None = None
    text_encoder: TextEncoder | None = None

    def label(self, number: int) -> int:
        """The class of picture `number`, -1: none."""
        return -1 if self.labels is None else self.labels[number % len(self.labels)]

    def pictures(self, numbers: Sequence[int]) -> Iterator[Tensor]:
        """(b, h, w, 3) uint8 of the pictures of these numbers, `batch_size` at a time."""
        for start in range(0, len(numbers), self.batch_size):
            batch = numbers[start : start + self.batch_size]
            yield sample_to_uint8(self.decode(self.tokens(batch), batch), self.size).cpu()

    @torch.inference_mode()
    def tokens(self, numbers: Sequence[int]) -> Tokens:
        seeds = torch.tensor([seed_of("generate", self.seed, n) for n in numbers])
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.half else nullcontext()
        try:
            with autocast:
                return self.generator.generate(self.condition(numbers), seeds=seeds, length=self.length)
        except ValueError as error:  # labels, guidance or a length that this generator does not take
            raise UserError(str(error)) from error

    def condition(self, numbers: Sequence[int]) -> Condition:
        """What the pictures of these numbers are to show."""
        if self.prompts is not None and self.text_encoder is not None:
            return self.text_encoder.encode([self.prompts[number % len(self.prompts)] for number in numbers])
        labels = None if self.labels is None else torch.tensor([self.label(number) for number in numbers])
        return Condition(labels).to(self.device)

    def decode(self, tokens: Tokens, numbers: Sequence[int]) -> Tensor:
        return decode_numbered(self.tokenizer, tokens, numbers, self.seed)

    def describe(self) -> dict[str, Any]:
        """Everything that the pictures depend on, as plain values."""
        return {
            "generator": self.generator.fingerprint(),
            "tokenizer": self.tokenizer.fingerprint(),
            "sampling": describe_sampling(self.generator),
            "decoding": describe_sampling(self.tokenizer),
            "labels": None if self.labels is None else list(self.labels),
            "prompts": None if self.prompts is None else _listed(self.prompts),
            "text_encoder": None if self.text_encoder is None else self.text_encoder.fingerprint,
            "length": self.length,
            "size": self.size or self.tokenizer.spec.image_size,
            "precision": "bf16-mixed" if self.half else "32-true",
            "seed": self.seed,
        }


def decode_numbered(tokenizer: Tokenizer, tokens: Tokens, numbers: Sequence[int], seed: int) -> Tensor:
    """Images (b, 3, h, w); a decoder that samples takes its noise from (seed, number) alone."""
    if (shape := getattr(tokenizer, "latent_shape", None)) is None:
        return tokenizer.decode(tokens, seed=seed)
    noise = [torch.randn(shape, generator=draws_of("decode", seed, n)) for n in numbers]
    sampling: Any = tokenizer
    return sampling.decode(tokens, seed=seed, noise=torch.stack(noise))


def generate(config: DictConfig | Mapping[str, Any]) -> Path:
    """Make the pictures that configs/generate.yaml describes; the file or folder that was written.

    Raises UserError for what cannot work, before anything is written.
    """
    cfg: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)
    output, num = Path(cfg["output"]), cfg["num"]
    with processes(cfg["device"]) as (rank, world_size, device):
        sampler = load_sampler(cfg, device)
        if (prompts := prompts_of(sampler.generator, cfg)) is not None:
            sampler = with_prompts(sampler, prompts, cfg)
        about = {**sampler.describe(), "num": num}
        _check_file(output, about)
        if output.suffix == ".png":
            if rank == 0:
                _picture(sampler, num, output)
                _write_json(output.with_suffix(".json"), about)
        else:
            folder = output if output.suffix != ".npz" else output.with_name(f"{output.name}.parts")
            sink = _Folder(folder) if output.suffix != ".npz" else _Parts(folder)
            _check_same(folder, about)
            if rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                _write_json(folder / "samples.json", about)
            _wait(world_size)
            parts = [range(start, min(start + PART, num)) for start in range(0, num, PART)]
            missing = [part for part in parts[rank::world_size] if not sink.has(part)]
            headway = Headway(sum(map(len, missing)), "pictures", say=rank == 0)
            for part in missing:
                sink.write(part, sampler, headway)
            _wait(world_size)
            if rank == 0 and isinstance(sink, _Parts):
                sink.join(parts, [sampler.label(n) for n in range(num)], output)
                _write_json(output.with_suffix(".json"), about)
                shutil.rmtree(folder)
        if rank == 0:
            print(f"{num:,} picture{'s' if num > 1 else ''}: {output}", flush=True)
    return output


def load_sampler(cfg: Mapping[str, Any], device: torch.device) -> Sampler:
    """A generator, its tokenizer and how they are to be used, from keys of configs/generate.yaml.

    A generator by text is given prompts by `with_prompts`. Raises UserError for a tokenizer that is missing or another
    one, and for settings that the two do not take.
    """
    generator = Generator.from_pretrained(cfg["model_path"])
    if cfg["text_encoder"] is not None and generator.text_dim is None:
        raise UserError(f"text_encoder={cfg['text_encoder']}, but {_takes(generator, cfg)}; leave it out")
    tokenizer = tokenizer_of(generator, cfg["model_path"], cfg["tokenizer_path"], cfg["teacher_path"])
    override_sampling(generator, cfg["sampling"])
    override_sampling(tokenizer, cfg["decoding"], "decoding")
    sampler = Sampler(
        generator.to(device),
        tokenizer.to(device),
        device,
        labels=labels_of(generator, cfg["labels"]),
        length=cfg["length"],
        size=cfg["size"],
        seed=cfg["seed"],
        batch_size=cfg["batch_size"],
        half=cfg["precision"] == "bf16-mixed",
    )
    try:
        generator.check_length(sampler.length)
        generator.check_sampling()
        if sampler.labels is not None:
            generator.check_guidance((describe_sampling(generator) or {}).get("guidance", 1))
    except ValueError as error:
        raise UserError(str(error)) from error
    return sampler


def tokenizer_of(generator: Generator, model_path: str, given: str | None, teacher_path: str | None) -> Tokenizer:
    """The tokenizer that a generator was trained with: where its export says that it lies, or at `given`.

    Raises UserError where it is not there, or is another one.
    """
    origin = generator.metadata.get("tokenizer") or {}
    path, key = given or origin.get("path"), "tokenizer_path"
    if path is None or (given is None and Path(path).is_absolute() and not Path(path).exists()):
        where = f" ({path}, which is not there)" if path else ""
        raise UserError(
            f"tokenizer_path is required: model_path={model_path} writes the tokens of a tokenizer{where}; give the "
            "folder of that one's export"
        )
    tokenizer = load_tokenizer(path, teacher_path, key=key)
    own, its = tokenizer.fingerprint(), origin.get("fingerprint")
    if its is not None and own != its:
        raise UserError(
            f"tokenizer_path={path} is tokenizer {own[:16]}, but model_path={model_path} was trained on tokens of "
            f"{its[:16]}; give that one's export"
        )
    mine, theirs = generator.spec, tokenizer.spec
    for name in ("kind", "length", "depth", "codebook_size") if mine.kind == "discrete" else ("kind", "length", "dim"):
        if getattr(mine, name) != getattr(theirs, name):
            raise UserError(
                f"tokenizer_path={path} has {theirs.words()}, but model_path={model_path} writes {mine.words()}; give "
                "the tokenizer that it was trained with"
            )
    if (mine.levels, mine.order) != (theirs.levels, theirs.order):
        what = "levels" if mine.levels != theirs.levels else f"order={list(theirs.order or ())}"
        need = (
            "export.py bridge=DIR fit=false"
            if what == "levels"
            else f"export.py bridge=DIR order={list(mine.order or ())}"
        )
        raise UserError(
            f"tokenizer_path={path} was bridged with other {what} than model_path={model_path} was trained with; give "
            f"that one, or make it: {need}"
        )
    return tokenizer


def labels_of(generator: Generator, given: int | Sequence[int] | None) -> list[int] | None:
    """The classes that pictures show in turn. Raises UserError for those that the generator does not know."""
    count = generator.num_classes
    if given is None:
        return None if count is None else list(range(count))
    labels = [given] if isinstance(given, int) else list(given)
    shown = f"labels=[{','.join(map(str, labels))}]"
    if generator.text_dim is not None:
        raise UserError(f"{shown}, but this generator takes texts; give prompts instead")
    if count is None:
        raise UserError(f"{shown}, but this generator was trained without classes; leave labels out")
    for label in labels:
        if not -1 <= label < count:
            raise UserError(f"{shown}: this generator knows the classes 0 to {count - 1}; {label} is none of them")
    return labels


def prompts_of(generator: Generator, cfg: Mapping[str, Any]) -> list[str] | None:
    """The texts that pictures of a generator by text show in turn, None for others.

    Raises UserError where there are none, and where they have no meaning.
    """
    prompts, file = cfg["prompts"], cfg["prompts_file"]
    if generator.text_dim is None:
        for key, value in (("prompts", prompts), ("prompts_file", file)):
            if value is not None:
                raise UserError(f"{key}={value}, but {_takes(generator, cfg)}; leave it out")
        return None
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"prompts_file={file} cannot be read as text ({error}); give one prompt a line") from error
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"prompts_file={file} is empty; give one prompt a line")
    if prompts is None:
        raise UserError(
            f"prompts is required: model_path={cfg['model_path']} makes pictures of texts; give some, such as "
            "'prompts=[\"a red circle\"]', or prompts_file=FILE"
        )
    return [prompts] if isinstance(prompts, str) else list(prompts)


def with_prompts(sampler: Sampler, prompts: Sequence[str], cfg: Mapping[str, Any]) -> Sampler:
    """The same for these texts, with the encoder that the generator learned from, or the one that is named instead.

    Raises UserError where it is not known, or is another one.
    """
    generator, given = sampler.generator, cfg["text_encoder"]
    origin = generator.metadata.get("text_encoder") or {}
    name = given or origin.get("path")
    if name is None:
        raise UserError(
            f"text_encoder is required: model_path={cfg['model_path']} does not say which one made the text features "
            f"that it learned from; give one of {generator.text_dim} channels"
        )
    encoder = TextEncoder(name, length=origin.get("length") or generator.text_length or LENGTH)
    if encoder.dim != generator.text_dim:
        raise UserError(
            f"text_encoder={name} has features of {encoder.dim} channels, but model_path={cfg['model_path']} takes "
            f"{generator.text_dim}; give the encoder that it learned from"
        )
    if (its := origin.get("fingerprint")) is not None and encoder.fingerprint != its:
        raise UserError(
            f"text_encoder={name} is text encoder {encoder.fingerprint[:16]}, but model_path={cfg['model_path']} knows "
            f"features of {its[:16]} ({origin.get('path')}); give that one"
        )
    return replace(sampler, prompts=prompts, text_encoder=encoder.to(sampler.device))


def _takes(generator: Generator, cfg: Mapping[str, Any]) -> str:
    what = "no condition" if generator.num_classes is None else "classes (labels=…)"
    return f"model_path={cfg['model_path']} takes {what}"


def _listed(prompts: Sequence[str]) -> list[str] | str:
    """Prompts as a report has them: many as their number and a hash."""
    if len(prompts) <= LISTED:
        return list(prompts)
    return f"{len(prompts):,}, sha256 {hashlib.sha256(chr(0).join(prompts).encode()).hexdigest()[:16]}"


def columns_for(conditions: Sequence[int | str] | None) -> int:
    """Of a picture of samples: a few labels, or prompts, have columns of their own."""
    distinct = len(conditions or ())
    return next((c for c in range(8, 2, -1) if distinct and c % distinct == 0), 8)


def _picture(sampler: Sampler, num: int, output: Path) -> None:
    """All pictures in one."""
    headway = Headway(num, "pictures")
    made = []
    for batch in sampler.pictures(range(num)):
        made.append(batch)
        headway.add(len(batch))
    images = torch.cat(made).permute(0, 3, 1, 2)
    _writing(output, lambda: save_png(grid([images], columns=columns_for(sampler.labels or sampler.prompts)), output))


class _Folder:
    """A PNG each, by number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.png"

    def has(self, part: range) -> bool:
        return all(self.file(number).is_file() for number in part)

    def write(self, part: range, sampler: Sampler, headway: Headway) -> None:
        numbers = iter(part)
        for batch in sampler.pictures(part):
            for picture, number in zip(batch.numpy(), numbers, strict=False):
                _writing(self.file(number), partial(_save, Image.fromarray(picture), self.file(number)))
            headway.add(len(batch))


class _Parts:
    """Arrays (k, h, w, 3) uint8 in files of their own, which become one `.npz`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, part: range) -> Path:
        return self.folder / f"{part.start:09d}.npy"

    def has(self, part: range) -> bool:
        return self.file(part).is_file()  # whole: it was renamed when it was finished

    def write(self, part: range, sampler: Sampler, headway: Headway) -> None:
        made = []
        for batch in sampler.pictures(part):
            made.append(batch.numpy())
            headway.add(len(batch))
        array, file = np.concatenate(made), self.file(part)
        _writing(file, partial(_save_array, array, file))

    def join(self, parts: Sequence[range], labels: Sequence[int], output: Path) -> None:
        """arr_0 (N, h, w, 3) uint8 and, where there are classes, arr_1 (N,) int64, as `numpy.savez` lays them out."""
        first = np.load(self.file(parts[0]), mmap_mode="r")
        shape = (len(labels), *first.shape[1:])

        def write() -> None:
            with replacing(output) as temporary, zipfile.ZipFile(temporary, "w") as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)  # type: ignore[arg-type]
                    for part in parts:
                        member.write(np.ascontiguousarray(np.load(self.file(part), mmap_mode="r")).data)
                if any(label >= 0 for label in labels):
                    with archive.open("arr_1.npy", "w") as member:
                        np.lib.format.write_array(member, np.array(labels, dtype=np.int64))  # type: ignore[arg-type]

        _writing(output, write)


def _check_file(output: Path, about: Mapping[str, Any]) -> None:
    """A picture of ours may be replaced, an `.npz` made again alike. Raises UserError for another file."""
    if output.is_file():
        known = _read_json(output.with_suffix(".json"))
        if known is None or "generator" not in known:
            raise UserError(f"output={output} exists, and not by generate.py; name another file, or remove it first")
        if output.suffix == ".npz":
            _compare(known, about, f"output={output}")


def _check_same(folder: Path, about: Mapping[str, Any]) -> None:
    """A new folder, or one that the same command began. Raises UserError for another one."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    known = _read_json(folder / "samples.json")
    if known is None:
        raise UserError(f"output={folder} holds something else than pictures of generate.py; name a new folder")
    _compare(known, about, f"output={folder}")


def _compare(known: Mapping[str, Any], about: Mapping[str, Any], where: str) -> None:
    for key, value in about.items():
        if known.get(key) != value:
            raise UserError(
                f"{where} was made with {key}={known.get(key)}, now it is {value}; name a new one, or remove it first"
            )


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    def write() -> None:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(values, indent=1) + "\n")

    _writing(file, write)


def _save(image: Image.Image, file: Path) -> None:
    with replacing(file) as temporary:
        image.save(temporary, "PNG")


def _save_array(array: np.ndarray, file: Path) -> None:
    with replacing(file) as temporary, temporary.open("wb") as stream:
        np.save(stream, array)


def _writing(file: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(
            f"output: {file} cannot be written ({error.strerror}); make room and run the same command again"
        ) from error


def _wait(world_size: int) -> None:
    """Until all processes are here."""
    if world_size > 1:
        dist.barrier()
