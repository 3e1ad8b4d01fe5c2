"""Images to `.tok` files and back; the program behind `encode.py`.

How many tokens of an image are kept: all, a number, or the smallest prefix that reaches a quality. That one is found by
bisection for all images of a batch at once, each with a length of its own: log₂ n decodes a batch, and one that checks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from smalti import tokfile
from smalti.encode import Pair
from smalti.errors import UserError
from smalti.evaluation import pictures
from smalti.evaluation.lpips import load_lpips, why_absent
from smalti.evaluation.metrics import psnr, ssim, to_8_bit
from smalti.evaluation.photo import read_square
from smalti.evaluation.processes import processes
from smalti.evaluation.run import LPIPS_SIZE, load_tokenizer
from smalti.evaluation.sampling import override_sampling
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.spec import Tokens, TokenSpec
from smalti.tokfile import TokFile
from smalti.training.draws import generator

Item = TypeVar("Item")
IN_PICTURE = 16  # images that `picture` shows at most


@dataclass(frozen=True)
class Target:
    """The figure that a prefix must reach.

    name: "psnr", "ssim" or "lpips". measure: (b,) figures of images (b, 3, h, w) and what was decoded.
    """

    name: str
    value: float
    measure: Callable[[Tensor, Tensor], Tensor]

    def reached(self, figures: Tensor) -> Tensor:
        """(b,) bool, on the CPU."""
        figures = figures.cpu().double()
        return figures <= self.value if self.name == "lpips" else figures >= self.value


@dataclass(frozen=True)
class Encoded:
    """One image as it was written.

    length: tokens kept. payload: bytes that they take in the file of `size` bytes. figures: of what they decode to,
    against the image as the tokenizer saw it: psnr, ssim, and the target's. reached: whether the target was, if any.
    """

    source: Path
    target: Path
    length: int
    payload: int
    size: int
    figures: dict[str, float]
    reached: bool | None


def encode(config: DictConfig | Mapping[str, Any], pairs: Sequence[Pair]) -> list[Encoded]:
    """Write each image as the `.tok` file beside it in `pairs`, as configs/encode.yaml says, and print a line each.

    What cannot work is refused before anything is written. Images that cannot be read are left out and named at the
    end, by a UserError.
    """
    cfg = _plain(config)
    done: list[Encoded] = []
    unreadable: list[str] = []
    shown: list[Tensor] = []  # originals and what was decoded, (2, b, 3, h, w)
    with processes(cfg["device"]) as (_, _, device):
        tokenizer = load_tokenizer(cfg["model_path"], cfg["teacher_path"]).to(device)
        override_sampling(tokenizer, cfg["sampling"])
        _check_tokenizer(tokenizer, cfg)
        target = target_of(cfg, device, tokenizer.spec.image_size)
        fingerprint, seconds = tokenizer.fingerprint(), 0.0
        for batch in _batches(pairs, cfg["batch_size"]):
            readable, squares = _read(batch, tokenizer.spec.image_size, unreadable)
            if not readable:
                continue
            images = torch.stack(squares).to(device)
            started = time.perf_counter()
            tokens, decoded = compress(tokenizer, images, length=cfg["length"], target=target, seed=cfg["seed"])
            files = pack(tokens, tokenizer.spec, fingerprint)
            seconds += time.perf_counter() - started
            for pair, file, figures in zip(readable, files, measure(images, decoded, target), strict=True):
                done.append(_write(pair, file, figures, target))
                print(_in_words(done[-1], tokenizer.spec, target))
            if cfg["picture"] is not None and len(done) - len(readable) < IN_PICTURE:
                shown.append(torch.stack([images, decoded.to(images)]).cpu())
        if shown:
            _save_picture(torch.cat(shown, dim=1)[:, :IN_PICTURE], done, Path(cfg["picture"]))
        if done:
            size = sum(encoded.size for encoded in done)
            print(f"{_count(len(done), 'image')}, {_count(size, 'byte')}, {seconds:.2f} s on {device.type}")
    if unreadable:
        more = f" (nor can {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
        rest = "; the others are written" if done else ""
        raise UserError(f"image={unreadable[0]}{more}; give JPEG, PNG or WebP files{rest}")
    return done


def decode(config: DictConfig | Mapping[str, Any], pairs: Sequence[Pair], files: Sequence[TokFile]) -> None:
    """Write the image of each of `files` as the PNG beside it in `pairs`, and print a line each.

    Raises UserError, before anything is written, for files of another tokenizer.
    """
    cfg = _plain(config)
    with processes(cfg["device"]) as (_, _, device):
        tokenizer = load_tokenizer(cfg["model_path"], cfg["teacher_path"]).to(device)
        override_sampling(tokenizer, cfg["sampling"])
        _check_tokenizer(tokenizer, cfg)
        fingerprint, seconds = tokenizer.fingerprint(), 0.0
        rows = [
            unpack(file, tokenizer.spec, fingerprint, f"decode={source}")
            for file, (source, _) in zip(files, pairs, strict=True)
        ]
        for batch in _batches(list(zip(pairs, rows, strict=True)), cfg["batch_size"]):
            tokens = together([row[: cfg["length"]] for _, row in batch], tokenizer, device)
            started = time.perf_counter()
            images = pictures.to_uint8(decode_alike(tokenizer, tokens, cfg["seed"]))
            seconds += time.perf_counter() - started
            for ((source, target), row), image, kept in zip(batch, images, tokens.lengths.tolist(), strict=True):
                with _writing(target):
                    pictures.save_png(pictures.to_pil(image), target)
                used = _count(kept, "token") + (f" of the file's {len(row)}" if kept < len(row) else "")
                print(f"{source} -> {target}: {used}, {image.shape[-1]} × {image.shape[-2]} pixels")
        print(f"{_count(len(files), 'image')}, {seconds:.2f} s on {device.type}")


def compress(
    tokenizer: Tokenizer, images: Tensor, *, length: int | None = None, target: Target | None = None, seed: int = 0
) -> tuple[Tokens, Tensor]:
    """Tokens of images (b, 3, h, w) in [0, 1], and the images that the kept ones decode to.

    All are kept; or the first `length`; or the smallest prefix that reaches `target`, and all where none does.
    """
    tokens = tokenizer.encode(images)
    if length is not None:
        tokens = tokens.prefix(length)
    if target is not None:

        def decode_to(lengths: Tensor) -> Tensor:
            return decode_alike(tokenizer, replace(tokens, lengths=lengths), seed)

        tokens = replace(tokens, lengths=smallest_prefixes(decode_to, images, tokens.lengths, target))
    return tokens, decode_alike(tokenizer, tokens, seed)


def decode_alike(tokenizer: Tokenizer, tokens: Tokens, seed: int) -> Tensor:
    """Images (b, 3, h, w), each as it is decoded alone: what a file gives must not depend on the files beside it.

    Decoders that sample draw other noise at each place in a batch; here all get that of the first place.
    """
    if (shape := getattr(tokenizer, "latent_shape", None)) is None:
        return tokenizer.decode(tokens, seed=seed)
    noise = torch.randn(shape, generator=generator("decode", seed, 0)).expand(len(tokens), *shape)
    sampling: Any = tokenizer
    return sampling.decode(tokens, seed=seed, noise=noise)


def smallest_prefixes(decode_to: Callable[[Tensor], Tensor], images: Tensor, most: Tensor, target: Target) -> Tensor:
    """Keep lengths (b,) at which `target` is reached, by bisection: one `decode_to` a step for the whole batch.

    decode_to: keep lengths (b,) to images (b, 3, h, w). most: (b,), the tokens that there are. Where quality falls as
    tokens are added, this is one of the lengths at which it passes the target, not always the first. It is `most`,
    which is not tried, where no tried length reaches it.
    """
    high = most.cpu()  # where a decoder looks at lengths before it starts
    low = torch.ones_like(high)
    while bool((open := low < high).any()):
        middle = (low + high) // 2
        reached = target.reached(target.measure(images, decode_to(middle)))
        high = torch.where(open & reached, middle, high)
        low = torch.where(open & ~reached, middle + 1, low)
    return high


def target_of(cfg: Mapping[str, Any], device: torch.device, image_size: int) -> Target | None:
    """The quality that is asked for, None when none is. Raises UserError where it cannot be measured."""
    asked = [(name, value) for name, value in cfg["quality"].items() if value is not None]
    if not asked:
        return None
    name, value = asked[0]
    if name != "lpips":
        return Target(name, value, {"psnr": psnr, "ssim": ssim}[name])
    if image_size < LPIPS_SIZE:
        raise UserError(
            f"quality.lpips={value} needs images of at least {LPIPS_SIZE} × {LPIPS_SIZE} pixels, this tokenizer's have "
            f"{image_size}; use quality.psnr or quality.ssim"
        )
    network = load_lpips(cfg["lpips_weights"])
    if network is None:
        raise UserError(f"quality.lpips={value} {why_absent()}; or use quality.psnr or quality.ssim")
    network.network.to(device)
    return Target(name, value, lambda images, decoded: network(to_8_bit(images), to_8_bit(decoded)))


def measure(images: Tensor, decoded: Tensor, target: Target | None) -> list[dict[str, float]]:
    """PSNR, SSIM and the target's figure of each image, by name."""
    figures = {"psnr": psnr(images, decoded), "ssim": ssim(images, decoded)}
    if target is not None and target.name not in figures:
        figures[target.name] = target.measure(images, decoded)
    return [{name: values[number].item() for name, values in figures.items()} for number in range(len(images))]


def pack(tokens: Tokens, spec: TokenSpec, fingerprint: str) -> list[TokFile]:
    """The kept tokens of each image as a file."""
    assert tokens.indices is not None and spec.codebook_size is not None
    rows = tokens.indices.reshape(len(tokens), spec.length, spec.depth).tolist()
    lengths = tokens.lengths.tolist()
    return [
        TokFile.of(row[:length], spec.codebook_size, fingerprint) for row, length in zip(rows, lengths, strict=True)
    ]


def unpack(file: TokFile, spec: TokenSpec, fingerprint: str, name: str) -> list[list[int]]:
    """The file's indices (k, q). Raises UserError for those of another tokenizer; `name` is the file's in messages."""
    assert spec.codebook_size is not None
    if file.fingerprint != (own := tokfile.shortened(fingerprint)):
        raise UserError(
            f"{name} was written with tokenizer {file.fingerprint}, but model_path is {own}; give the model_path that "
            "it was encoded with"
        )
    if file.length < spec.length and not spec.prefix_decodable:
        raise UserError(
            f"{name} holds {file.length} of {spec.length} tokens, but this tokenizer decodes all of them only; encode "
            "the image again"
        )
    return file.indices(spec.codebook_size, spec.depth, spec.length, name)


@torch.inference_mode()
def together(rows: Sequence[list[list[int]]], tokenizer: Tokenizer, device: torch.device) -> Tokens:
    """Tokens of several images of (k, q) indices each, k of its own."""
    spec = tokenizer.spec
    nothing = [0] * spec.depth
    padded = [row + [nothing] * (spec.length - len(row)) for row in rows]
    indices = torch.tensor(padded, dtype=torch.int64, device=device)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device=device)
    return replace(tokenizer.tokens(indices if spec.depth > 1 else indices.squeeze(-1)), lengths=lengths)


def _plain(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    cfg: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)
    return cfg


def _check_tokenizer(tokenizer: Tokenizer, cfg: Mapping[str, Any]) -> None:
    """Its tokens fit into a file, and can be shortened where that is asked for."""
    spec, model = tokenizer.spec, f"model_path={cfg['model_path']}"
    if spec.codebook_size is None:
        raise UserError(
            f"{model} gives continuous tokens, which a {tokfile.SUFFIX} file does not hold; use a tokenizer with a "
            "codebook (tokenizer/quantizer=vq), or evaluate.py image=…, which writes latents"
        )
    shorter = {"length": cfg["length"], **{f"quality.{name}": value for name, value in cfg["quality"].items()}}
    asked = next((f"{key}={value}" for key, value in shorter.items() if value is not None), None)
    if asked is not None and not spec.prefix_decodable:
        raise UserError(
            f"{asked}: {model} decodes all of its {spec.length} tokens only; leave that out, or use a tokenizer that "
            "was trained with tokenizer/regularizer=tail_drop or nested_dropout"
        )
    if cfg["length"] is not None and cfg["length"] > spec.length:
        raise UserError(f"length={cfg['length']}: {model} has {spec.length} tokens an image; use 1 to {spec.length}")


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _read(batch: Sequence[Pair], size: int, unreadable: list[str]) -> tuple[list[Pair], list[Tensor]]:
    """The images (3, size, size) in [0, 1] that can be read; the others, with the reason, are added to `unreadable`."""
    readable, squares = [], []
    for pair in batch:
        try:
            squares.append(read_square(pair[0], size).image)
            readable.append(pair)
        except (OSError, ValueError) as error:
            unreadable.append(f"{pair[0]} cannot be read: {error}")
    return readable, squares


def _write(pair: Pair, file: TokFile, figures: dict[str, float], target: Target | None) -> Encoded:
    with _writing(pair[1]):
        pair[1].parent.mkdir(parents=True, exist_ok=True)
        size = tokfile.write(file, pair[1])
    reached = None if target is None else bool(target.reached(torch.tensor(figures[target.name])))
    return Encoded(*pair, file.length, len(file.payload), size, figures, reached)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"output: {path} cannot be written ({error.strerror}); choose another output") from error


def _in_words(encoded: Encoded, spec: TokenSpec, target: Target | None) -> str:
    figures = ", ".join(_show(name, value) for name, value in encoded.figures.items())
    size = f"{_count(encoded.size, 'byte')} ({encoded.payload:,} of tokens)"
    per_pixel = f"{8 * encoded.size / spec.image_size**2:.3f} bits a pixel"
    kept = f"{encoded.length} of {spec.length} tokens"
    said = f"{encoded.source} -> {encoded.target}: {kept}, {size}, {per_pixel}, {figures}"
    if target is not None and not encoded.reached:
        given = f"{kept} give {_show(target.name, encoded.figures[target.name])}"
        said += f"\n  quality.{target.name}={target.value:g} is not reached: {given}"
    return said


def _show(name: str, figure: float) -> str:
    return f"PSNR {figure:.2f} dB" if name == "psnr" else f"{name.upper()} {figure:.4f}"


def _save_picture(shown: Tensor, done: Sequence[Encoded], path: Path) -> None:
    """shown: (2, b, 3, h, w), the images over what their tokens give."""
    if len(done) == 1:
        (only,) = done
        size = f"{only.length} tokens, {only.size} bytes"
        picture = pictures.side_by_side(
            [(f"original, {shown.shape[-1]} × {shown.shape[-2]}", shown[0, 0]), (size, shown[1, 0])],
            note=f"PSNR {only.figures['psnr']:.2f} dB",
        )
    else:
        picture = pictures.reconstructions(shown[0], shown[1])
    with _writing(path):
        pictures.save_png(picture, path)
    print(f"picture {path}")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
