"""One photo through a tokenizer: its reconstruction beside the original, its tokens, and how many bits they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from smalti.data.augment import center_crop, resize_shorter
from smalti.data.decode import decode_image
from smalti.errors import UserError
from smalti.evaluation import pictures
from smalti.evaluation.lengths import bits_of, bytes_of, chosen_lengths, decode_prefixes
from smalti.evaluation.metrics import psnr, ssim
from smalti.evaluation.protocol import describe_model, preprocessing
from smalti.evaluation.sampling import describe_sampling
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.spec import TokenSpec
from smalti.training.draws import seed_of


@dataclass(frozen=True)
class Square:
    """A photo as a tokenizer sees it: (3, size, size) in [0, 1], cut from `pixels` = (width, height)."""

    image: Tensor
    pixels: tuple[int, int]


def read_square(path: Path, size: int) -> Square:
    """A photo of any size: its shorter side is resized to `size` and the middle cut, as in the evaluation.

    Raises OSError or ValueError with the reason when it cannot be read.
    """
    photo = decode_image(path.read_bytes())
    square = center_crop(resize_shorter(photo, size), size)
    return Square(torch.tensor(square).permute(2, 0, 1).float() / 255, (photo.shape[1], photo.shape[0]))


def reconstruct_photo(
    tokenizer: Tokenizer, cfg: Mapping[str, Any], folder: Path, device: torch.device
) -> dict[str, Any]:
    """Write NAME-original.png (what the tokenizer saw), NAME-reconstruction.png, NAME-side-by-side.png and
    NAME-tokens.json into `folder`, with `lengths` NAME-strip.png, too, and print what they say.

    A photo of any size: its shorter side is resized to the tokenizer's and the middle cut, as in the evaluation.
    """
    path, spec = Path(cfg["image"]).expanduser(), tokenizer.spec
    size, lengths = spec.image_size, chosen_lengths(cfg["lengths"], spec)
    try:
        photo = read_square(path, size)
    except (OSError, ValueError) as error:
        raise UserError(f"image={path} cannot be read: {error}; give a JPEG, PNG or WebP file") from error
    images = photo.image[None].to(device)
    tokens = tokenizer.encode(images)
    by_length = dict(decode_prefixes(tokenizer, tokens, lengths, seed=seed_of("evaluate", cfg["seed"], 0)))

    length = lengths[-1]
    decoded, bits = by_length[length], bits_of(spec, length)
    report: dict[str, Any] = {
        "image": str(path),
        "pixels": list(photo.pixels),
        "preprocessing": preprocessing("center", size),
        "model": describe_model(tokenizer, cfg),
        "psnr": psnr(images, decoded).item(),
        "ssim": ssim(images, decoded).item(),
        "bits": bits,
        "bytes": bytes_of(spec, length),
        "bits_per_pixel": None if bits is None else bits / size**2,
        "bytes_of_the_file": path.stat().st_size,
        "seed": cfg["seed"],
        "sampling": describe_sampling(tokenizer),
    }
    if cfg["lengths"] is not None:
        report["by_length"] = [
            {
                "tokens": k,
                "bits": bits_of(spec, k),
                "bytes": bytes_of(spec, k),
                "psnr": psnr(images, part).item(),
                "ssim": ssim(images, part).item(),
            }
            for k, part in by_length.items()
        ]
    values = tokens.values[:, :length]
    name = "latents" if tokens.indices is None else "indices"
    files = {
        kind: folder / f"{path.stem}-{kind}{'.json' if kind == 'tokens' else '.png'}"
        for kind in ("original", "reconstruction", "side-by-side", "tokens")
    }
    pictures.save_png(pictures.to_pil(images[0]), files["original"])
    pictures.save_png(pictures.to_pil(decoded[0]), files["reconstruction"])
    beside = pictures.side_by_side(
        [(f"original, {size} × {size}", images[0]), (_size_of(length, bits), decoded[0])],
        note=f"PSNR {report['psnr']:.2f} dB",
    )
    pictures.save_png(beside, files["side-by-side"])
    if "by_length" in report:
        files["strip"] = pictures.save_png(_strip(images, by_length, report), folder / f"{path.stem}-strip.png")
    content = {**report, "spec": spec.to_dict(), name: values[0].tolist()}
    files["tokens"].write_text(json.dumps(content) + "\n", encoding="utf-8")

    print(f"{path.name}, {photo.pixels[0]} × {photo.pixels[1]}: {_in_words(report, length, spec)}")
    print(f"  PSNR {report['psnr']:.2f} dB, SSIM {report['ssim']:.4f} against its middle at {size} × {size}")
    for row in report.get("by_length", []):
        taken = "" if row["bytes"] is None else f", {row['bytes']:,} bytes"
        print(f"  {row['tokens']:5,} tokens{taken}: PSNR {row['psnr']:.2f} dB, SSIM {row['ssim']:.4f}")
    report["files"] = {kind: str(file) for kind, file in files.items()}
    print("\n".join(f"{kind:15} {file}" for kind, file in report["files"].items()))
    return {**report, "tokens": values[0].tolist()}


def _strip(images: Tensor, by_length: Mapping[int, Tensor], report: Mapping[str, Any]) -> Image.Image:
    """The original, then what each number of tokens gives of it."""
    columns = [("original", images)]
    for row in report["by_length"]:
        caption = pictures.tokens_in_words(row["tokens"], row["bytes"])
        columns.append((f"{caption}\n{row['psnr']:.2f} dB", by_length[row["tokens"]]))
    return pictures.strip(columns)


def _size_of(length: int, bits: float | None) -> str:
    return f"{length} tokens" if bits is None else f"{length} tokens, {bits:,.0f} bits"


def _in_words(report: Mapping[str, Any], length: int, spec: TokenSpec) -> str:
    if spec.codebook_size is None:
        return f"{length} continuous tokens"
    return (
        f"{spec.words(length)} = {report['bits']:,.0f} bits = {report['bytes']:,} bytes, "
        f"{report['bits_per_pixel']:.3f} bits a pixel (the file has {report['bytes_of_the_file']:,} bytes)"
    )
