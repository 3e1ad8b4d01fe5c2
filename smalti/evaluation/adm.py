"""What ADM's evaluation suite (Dhariwal & Nichol 2021, arXiv:2105.05233) does beside FID: samples, precision, recall.

Precision and recall: Kynkäänniemi et al. 2019 (arXiv:1904.06991), on Inception features. The Inception Score of its
splits is `metrics.InceptionScore`, the Fréchet distance `metrics.frechet_distance`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

NEIGHBOURS = 3
BLOCK = 10_000  # points a side of a block of distances, as published: 400 MB, however many points there are


def sample_to_uint8(images: Tensor, size: int | None = None) -> Tensor:
    """Images (b, 3, h, w), meant for [0, 1] and best not clamped yet, as the (b, size, size, 3) uint8 of an `.npz`.

    Resized bicubically where `size` is not theirs (without antialiasing, as LlamaGen brings 384 px to 256), then
    clamped; halves are rounded up.
    """
    images = images.float()
    if size is not None and images.shape[-1] != size:
        images = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False)
    return rearrange((images * 255 + 0.5).clamp(0, 255).to(torch.uint8), "b c h w -> b h w c")


def precision_recall(
    reference: Tensor, samples: Tensor, *, neighbours: int = NEIGHBOURS, half: bool = False, block: int = BLOCK
) -> tuple[float, float]:
    """Precision: the share of samples in a ball around a reference point; recall: of reference points in one around a
    sample. A ball reaches to the point's k-th nearest neighbour among its own kind.

    reference: (n, f), samples: (m, f) features. half: distances in float16, as the suite computes them, but for blocks
    in which some overflow (ties among them make its figures coarser).
    """
    of_reference, of_samples = (
        nearest_radii(points, neighbours, half=half, block=block) for points in (reference, samples)
    )
    precise = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for row in range(0, len(reference), block):
        rows = slice(row, row + block)
        for column in range(0, len(samples), block):
            columns = slice(column, column + block)
            distances = squared_distances(reference[rows], samples[columns], half=half)
            precise[columns] |= (distances <= of_reference[rows, None]).any(0)
            recalled[rows] |= (distances <= of_samples[None, columns]).any(1)
    return precise.double().mean().item(), recalled.double().mean().item()


def nearest_radii(points: Tensor, neighbours: int = NEIGHBOURS, *, half: bool = False, block: int = BLOCK) -> Tensor:
    """(n,) squared distance of each point (n, f) to its k-th nearest neighbour. Raises ValueError for k points or
    fewer."""
    if len(points) <= neighbours:
        raise ValueError(f"{len(points)} points have no {neighbours} neighbours each")
    radii = []
    for rows in points.split(block):
        nearest = rows.new_empty(len(rows), 0, dtype=torch.float32)
        for columns in points.split(block):
            candidates = torch.cat([nearest, squared_distances(rows, columns, half=half)], dim=1)
            nearest = candidates.topk(min(neighbours + 1, candidates.shape[1]), dim=1, largest=False).values
        radii.append(nearest.amax(1))  # the nearest of all is the point itself
    return torch.cat(radii)


def squared_distances(a: Tensor, b: Tensor, *, half: bool = False) -> Tensor:
    """(n, m) squared Euclidean distances of points (n, f) and (m, f), float32."""
    if half:
        distances = _squared(a.half(), b.half())
        if distances.isfinite().all():
            return distances.float()
    return _squared(a.float(), b.float())


def _squared(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(1)[:, None] - 2 * (a @ b.T) + b.square().sum(1)).clamp(min=0)
