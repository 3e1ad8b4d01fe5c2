"""How a figure was obtained, so that it can be compared with another one or refused."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from smalti.evaluation.baselines import CODECS
from smalti.model import Model

LIBRARIES = ("smalti", "torch", "torchvision", "torchmetrics", "torch-fidelity", "pillow", "numpy")

_CODEC = "the best file of no more bytes than the tokens, header and all, of the image or one 2, 4 or 8 times smaller"

HOW = {
    "psnr": "each image as 8-bit RGB against peak 255, averaged over images",
    "ssim": "8-bit RGB, Gaussian window of 11 with sigma 1.5, averaged over channels and images",
    "lpips": "LPIPS of 8-bit RGB, averaged over images; lower is better",
    "rfid": "Fréchet distance of Inception's 2048 pool features, reconstructions against these same images after the "
    "same crop; lower is better; biased by the number of images, so compare equal numbers",
    "inception_score": "of the reconstructions, no splits",
    "codebook_usage": "distinct codes over all tokens of these images, divided by the codebook's size",
    "codebook_entropy": "bits a code over these images",
    "codebook_perplexity": "the number of equally frequent codes with the same entropy",
    "tokens": "tokens an image",
    "bits_per_image": "tokens × log2 of the codebook's size: codes of fixed length",
    "bytes_per_image": "the fewest whole bytes that hold the tokens, packed as one number, without a header",
    "bits_per_pixel": "bits an image / (height × width)",
    "mean_colour_psnr": "each image painted in its own mean colour: what no tokens at all would give",
    "gain_over_mean_colour": "psnr − mean_colour_psnr",
}

_DISTANCE = "against the reference; no FID"
OF_SAMPLES = {
    "gfid": "Fréchet distance of Inception's 2048 pool features, samples against the reference named above; lower is "
    "better; biased by the number of samples, so compare equal numbers; not comparable with rfid",
    "inception_score": "of the samples, mean over splits of 5,000 in the order of their numbers",
    "precision": "share of samples within reach of a reference image: a ball to its 3rd nearest neighbour, in "
    "Inception's pool features, distances in float16",
    "recall": "share of the first reference images (at most 10,000) within reach of a sample, likewise",
    "classifier_frechet_distance": "Fréchet distance of 128 features of the small classifier named below, samples "
    "against the reference; no FID; lower is better; biased by the number of samples",
    "classifier_frechet_distance_real": f"the same of real images that are not the reference, {_DISTANCE}",
    "classifier_frechet_distance_reconstructions": f"the same of the tokenizer's reconstructions of these, {_DISTANCE}",
    "classifier_frechet_distance_uniform_tokens": f"the same of uniform random tokens, decoded, {_DISTANCE}",
    "classifier_frechet_distance_standard_normal_latents": f"the same of random latents, decoded, {_DISTANCE}",
}


def how(figure: str, *, samples: bool = False) -> str:
    """One line on how a figure is obtained, of samples or of reconstructions."""
    if samples:
        return OF_SAMPLES[figure]
    if figure in HOW:
        return HOW[figure]
    for name, codec in CODECS.items():
        if figure in (said := _of_codec(name, codec.title)):
            return said[figure]
    raise KeyError(figure)


def _of_codec(name: str, title: str) -> dict[str, str]:
    return {
        f"{name}_images": f"of the baseline images, those that {title} stores in no more bytes than the tokens",
        f"{name}_psnr": f"on those images, {_CODEC}",
        f"{name}_bytes": "mean size of those files",
        f"psnr_on_{name}_images": "the tokenizer's on those images",
    }


def preprocessing(crop: str, size: int) -> str:
    """The transform of evaluation images in words: figures after another one are not comparable."""
    if crop in ("adm", "adm_random"):
        return f"ADM centre crop: halved by box while at least {2 * size}, shorter side to {size} bicubic, centre crop"
    return f"shorter side to {size} (Pillow, bicubic, antialiased), centre crop"


def describe_model(model: Model, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Which weights were measured."""
    return {
        "path": str(cfg["model_path"]),
        "name": type(model).__name__,
        "fingerprint": model.fingerprint(),
        "teacher": cfg["teacher_path"],
    }


def libraries() -> dict[str, str]:
    """Versions of everything that a figure depends on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if "smalti" not in found:  # a checkout that is not installed
        from smalti import __version__

        found["smalti"] = __version__
    return found


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
