"""Figures of a reconstruction: PSNR, SSIM, LPIPS, rFID, Inception Score, codebook use and entropy.

Every metric is a set of float64 sums over images (`Sums`): constant memory, and parts of a data set, or processes, are
merged by adding. Images are compared as they would be stored, clamped and rounded to 8 bits.

The published evaluator (bytedance/1d-tokenizer, titok.md §6) has rFID, Inception Score, usage and entropy; ours gives
its figures. PSNR, SSIM and LPIPS are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, Self

import torch
import torch.distributed as dist
from einops import reduce
from torch import Tensor

ENTROPY_EPS = 1e-8  # published: inside the logarithm of the codebook entropy
SCORE_EPS = 1e-16  # published: inside the logarithms of the Inception Score
LEAST_MSE = 1 / 12  # grey levels²: the error of rounding itself; no image counts as more than 58.92 dB


def to_8_bit(images: Tensor) -> Tensor:
    """Images clamped to [0, 1] and rounded to multiples of 1/255, float32: what a PNG would keep of them."""
    return images.float().clamp(0, 1).mul(255).round() / 255


def truncate_to_uint8(images: Tensor) -> Tensor:
    """The published conversion before Inception: x·255 cut off, not rounded. Exact for images of `to_8_bit`."""
    return (images * 255).to(torch.uint8)


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """PSNR (b,) in dB of each image (b, c, h, w), over its pixels and channels as 8-bit numbers, peak 255."""
    if images.device.type == "mps":  # which has no float64
        images, reconstructions = images.cpu(), reconstructions.cpu()
    difference = (to_8_bit(images).double() - to_8_bit(reconstructions).double()) * 255
    mse = reduce(difference**2, "b c h w -> b", "mean").clamp(min=LEAST_MSE)
    return 10 * torch.log10(255**2 / mse)


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """SSIM (b,) of each image as 8-bit colours: torchmetrics' Gaussian window of 11, sigma 1.5; mean over channels."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    ours, theirs = to_8_bit(reconstructions), to_8_bit(images)
    value = structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return value.reshape(len(images))


class Sums:
    """Named float64 sums on the CPU. `merge` adds another part's, `all_reduce` those of every process."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def add(self, **terms: Tensor | float) -> None:
        """Add a term to each named sum, in float64."""
        for name, term in terms.items():
            self.sums[name] += torch.as_tensor(term).detach().cpu().double()

    def merge(self, other: Self) -> None:
        """Add the sums of another part of the images."""
        self.add(**other.sums)

    def all_reduce(self) -> None:
        """Add up over all processes, where there are several; afterwards each holds the sums of all images."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        for name, value in self.sums.items():
            moved = value.to(device)
            dist.all_reduce(moved)
            self.sums[name] = moved.cpu()


class Mean(Sums):
    """The mean of one number an image."""

    def __init__(self) -> None:
        super().__init__(total=(), count=())

    def update(self, values: Tensor) -> None:
        """values: (b,), one an image."""
        self.add(total=values.detach().cpu().double().sum(), count=len(values))

    def compute(self) -> float:
        """The mean; NaN of nothing."""
        count = self.sums["count"].item()
        return self.sums["total"].item() / count if count else math.nan


class CodebookStatistics(Sums):
    """How often each code was used, over all tokens of all images; each of a token's `depth` codes is counted apart."""

    def __init__(self, codebook_size: int, depth: int = 1) -> None:
        super().__init__(counts=(depth, codebook_size))

    def update(self, indices: Tensor) -> None:
        """indices: int64 in [0, v), any shape; the last dimension is q where depth is q > 1."""
        depth, size = self.sums["counts"].shape
        places = indices.detach().cpu().reshape(-1, depth) + size * torch.arange(depth)
        self.add(counts=torch.bincount(places.flatten(), minlength=depth * size).view(depth, size))

    def compute(self) -> dict[str, float]:
        """codebook_usage: distinct codes seen / v. codebook_entropy: bits a code, as published.
        codebook_perplexity: the number of equally frequent codes of the same (exact) entropy. Means over a token's
        codes, of the exact entropy for the last."""
        counts = self.sums["counts"]
        p = counts / counts.sum(1, keepdim=True)
        exact = -torch.xlogy(p, p).sum(1).mean()
        return {
            "codebook_usage": (counts > 0).double().mean().item(),
            "codebook_entropy": -(p * torch.log2(p + ENTROPY_EPS)).sum(1).mean().item(),
            "codebook_perplexity": exact.exp().item(),
        }


class FeatureMoments(Sums):
    """Mean and covariance of feature vectors from running sums."""

    def __init__(self, width: int) -> None:
        super().__init__(total=(width,), outer=(width, width), count=())

    def update(self, features: Tensor) -> None:
        """features: (b, f)."""
        features = features.detach().cpu().double()
        self.add(total=features.sum(0), outer=features.T @ features, count=len(features))

    @property
    def mean(self) -> Tensor:
        return self.sums["total"] / self.sums["count"]

    @property
    def covariance(self) -> Tensor:
        """Unbiased (divided by N - 1)."""
        total, count = self.sums["total"], self.sums["count"]
        return (self.sums["outer"] - torch.outer(total, total) / count) / (count - 1)


class Moments(Protocol):
    """Mean (f,) and covariance (f, f): `FeatureMoments`, or those that a file gives."""

    @property
    def mean(self) -> Tensor: ...

    @property
    def covariance(self) -> Tensor: ...


def frechet_distance(real: Moments, fake: Moments) -> float:
    """|m - m'|² + tr(C) + tr(C') - 2 tr((C C')^½) between the Gaussians of two sets of features.

    The trace of the root is the sum of the roots of the eigenvalues of C^½ C' C^½, which is symmetric: real, and exact
    also for singular covariances, where the published `scipy.linalg.sqrtm(C C')` carries rounding noise (1e-8
    relative with fewer images than features). Where it is not finite the published fallback stands: the sum of the
    roots of the products of the diagonals. NaN with fewer than two images.
    """
    covariances = [real.covariance, fake.covariance]
    apart = (real.mean - fake.mean).square().sum() + covariances[0].trace() + covariances[1].trace()
    if not torch.isfinite(apart):
        return math.nan
    values, vectors = torch.linalg.eigh(covariances[0])
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    if not torch.isfinite(trace):
        trace = (covariances[0].diagonal() * covariances[1].diagonal()).sqrt().sum()
    return (apart - 2 * trace).item()


class InceptionScore(Sums):
    """exp(mean KL(p(y|x) || p(y))), over all images at once as 1d-tokenizer has it, or the mean over splits of them.

    split_size, images: ADM takes consecutive splits of 5,000 in the order of the samples' numbers; a last, shorter one
    counts as much as any other.
    """

    def __init__(self, classes: int, *, split_size: int | None = None, images: int | None = None) -> None:
        if (split_size is None) != (images is None):
            raise ValueError("split_size and images go together: they say how many splits there are")
        self.split_size = split_size
        splits = 1 if split_size is None or images is None else -(-images // split_size)
        super().__init__(probabilities=(splits, classes), negative_entropy=(splits,), count=(splits,))

    def update(self, logits: Tensor, numbers: Tensor | None = None) -> None:
        """logits: (b, classes), without the bias in the published protocol. numbers: (b,) int64 of the samples, where
        there are splits."""
        p = logits.detach().cpu().double().softmax(-1)
        split = torch.zeros(len(p), dtype=torch.int64)
        if self.split_size is not None:
            assert numbers is not None
            split = numbers.cpu() // self.split_size
        entropy = (p * torch.log(p + SCORE_EPS)).sum(-1)
        for name, values in (("probabilities", p), ("negative_entropy", entropy), ("count", torch.ones(len(p)))):
            self.sums[name].index_add_(0, split, values.double())

    def compute(self) -> float:
        """The score, at least 1; NaN of nothing, or where a split has no image."""
        count = self.sums["count"]
        mean = self.sums["probabilities"] / count[:, None]
        divergence = self.sums["negative_entropy"] / count - (mean * torch.log(mean + SCORE_EPS)).sum(-1)
        return divergence.exp().mean().item()


class FeatureExtractor(Protocol):
    """uint8 images (b, 3, h, w) to features (b, width) and logits (b, classes): smalti.evaluation.inception's."""

    width: int
    classes: int

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


class ReconstructionMetrics:
    """All figures of one pass over images and their reconstructions.

    codebook_size: v, None for continuous tokens; depth: q, codes a token. lpips: distances (b,) between two batches
    (b, 3, h, w) in [0, 1].
    inception: for rFID and the Inception Score. What needs a network that is not given is left out.
    beside: figures of other reconstructions of the same images, updated and merged in step with these: Inception then
    sees the images themselves once.
    """

    def __init__(
        self,
        codebook_size: int | None = None,
        *,
        depth: int = 1,
        lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
        inception: FeatureExtractor | None = None,
        beside: ReconstructionMetrics | None = None,
    ) -> None:
        self.lpips, self.inception = lpips, inception
        self.psnr, self.ssim, self.distance = Mean(), Mean(), Mean()
        self.codebook = None if codebook_size is None else CodebookStatistics(codebook_size, depth)
        width, classes = (inception.width, inception.classes) if inception else (0, 0)
        self.beside = beside
        self.real: FeatureMoments = FeatureMoments(width) if beside is None else beside.real
        self.fake, self.score = FeatureMoments(width), InceptionScore(classes)

    @property
    def count(self) -> int:
        """Images measured so far."""
        return int(self.psnr.sums["count"].item())

    @torch.no_grad()
    def update(self, images: Tensor, reconstructions: Tensor, indices: Tensor | None = None) -> None:
        """images, reconstructions: (b, 3, h, w), meant for [0, 1]. indices: (b, n) or (b, n, q), None for
        continuous tokens."""
        images, reconstructions = to_8_bit(images), to_8_bit(reconstructions)
        self.psnr.update(psnr(images, reconstructions))
        self.ssim.update(ssim(images, reconstructions))
        if self.lpips is not None:
            self.distance.update(self.lpips(images, reconstructions))
        if self.codebook is not None and indices is not None:
            self.codebook.update(indices)
        if self.inception is not None:
            if self.beside is None:
                self.real.update(self.inception(truncate_to_uint8(images))[0])
            features, logits = self.inception(truncate_to_uint8(reconstructions))
            self.fake.update(features)
            self.score.update(logits)

    def merge(self, other: ReconstructionMetrics) -> None:
        """Add the images that another accumulator of the same kind has seen."""
        for mine, theirs in zip(self._sums(), other._sums(), strict=True):
            mine.merge(theirs)

    def all_reduce(self) -> None:
        """Add up over all processes."""
        for part in self._sums():
            part.all_reduce()

    def compute(self) -> dict[str, float]:
        """Figures by name: psnr, ssim, lpips, rfid, inception_score, codebook_usage, …; those that were measured."""
        figures = {"psnr": self.psnr.compute(), "ssim": self.ssim.compute()}
        if self.lpips is not None:
            figures["lpips"] = self.distance.compute()
        if self.inception is not None:
            figures["rfid"] = frechet_distance(self.real, self.fake)
            figures["inception_score"] = self.score.compute()
        if self.codebook is not None:
            figures |= self.codebook.compute()
        return figures

    def _sums(self) -> list[Sums]:
        parts: list[Sums] = [self.psnr, self.ssim]
        if self.lpips is not None:
            parts.append(self.distance)
        if self.inception is not None:
            parts += [self.fake, self.score] if self.beside is not None else [self.real, self.fake, self.score]
        return parts if self.codebook is None else [*parts, self.codebook]
