"""LPIPS as a figure: the objective's network (smalti/objectives/perceptual.py) with the hash of its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from smalti.evaluation.protocol import sha256_of
from smalti.objectives.perceptual import DOWNLOAD, LPIPS

FILE = "vgg16-397923af.pth"  # torchvision's VGG16, trained on ImageNet; named by its hash


class MeasuredLPIPS:
    """LPIPS-VGG v0.1 distances; hash: SHA-256 of the VGG16 file, which a figure must name."""

    def __init__(self, network: LPIPS, hash: str) -> None:
        self.network, self.hash = network, hash

    @torch.no_grad()
    def __call__(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Distances (b,) of images (b, 3, h, w) in [0, 1]."""
        return self.network(images, reconstructions)


def load_lpips(weights: str | None) -> MeasuredLPIPS | None:
    """LPIPS with VGG16 weights of a file or, by the name "download", torchvision's; for None, those of an earlier
    download, or None when there are none. Raises UserError for a file that is not such weights.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if weights is None and not cached.is_file():
        return None
    source = str(cached) if weights is None else weights
    network = LPIPS(weights=source)
    return MeasuredLPIPS(network, sha256_of(cached if source == DOWNLOAD else Path(source).expanduser()))


def why_absent() -> str:
    """What to do to get this figure."""
    return f"needs torchvision's VGG16 weights: lpips_weights=FILE ({FILE}), or lpips_weights={DOWNLOAD} to fetch them"
