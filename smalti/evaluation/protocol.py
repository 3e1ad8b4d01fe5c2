"""How a figure was obtained, so that it can be compared with another one or refused."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("smalti", "torch", "torchvision", "torchmetrics", "torch-fidelity", "pillow", "numpy")

HOW = {
    "psnr": "dB; each image as 8-bit RGB against peak 255, averaged over images",
    "ssim": "8-bit RGB, Gaussian window of 11 with sigma 1.5, averaged over channels and images",
    "lpips": "LPIPS of 8-bit RGB, averaged over images; lower is better",
    "rfid": "Fréchet distance of Inception's 2048 pool features, reconstructions against these same images after the "
    "same crop; lower is better, and biased by the number of images: compare equal numbers only",
    "inception_score": "of the reconstructions, no splits",
    "codebook_usage": "distinct codes over all tokens of these images, divided by the codebook's size",
    "codebook_entropy": "bits a token over these images",
    "codebook_perplexity": "equally frequent codes of the same entropy",
    "tokens": "tokens an image",
    "bits_per_image": "tokens × log2 of the codebook's size, fixed-length codes",
    "bits_per_pixel": "bits an image / (height × width)",
    "mean_colour_psnr": "dB; every image painted in its own mean colour: what no tokens at all would give",
    "gain_over_mean_colour": "dB; psnr - mean_colour_psnr",
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
