"""The latents of continuous tokens over a data set: their statistics, and a tokenizer scaled by them.

    python encode.py data.path=IMAGES model_path=VAE rescale=10000 output=DIR

Generators want tokens of about unit variance: latents times one factor, 1 over the standard deviation of all their
values (Rombach et al. 2021, arXiv:2112.10752, section D.1); means stay where they are. The factor belongs to the
tokenizer. Trainings measure it, some published weights come with it, and for others this measures it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from smalti.errors import UserError
from smalti.evaluation.processes import processes
from smalti.evaluation.run import data_for
from smalti.headway import Headway
from smalti.registry import build, describe
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.quantizers.kl import GaussianQuantizer


class LatentSums:
    """Number, mean and squared deviations by channel, float64: constant memory, whatever the number of latents.

    Of posteriors, these are the sums of their samples without drawing any: the variance of all samples is that of the
    means plus the mean of the variances.
    """

    def __init__(self, count: int, mean: np.ndarray | Sequence[float], squares: np.ndarray | Sequence[float]) -> None:
        self.count, self.mean, self.squares = count, np.array(mean), np.array(squares)

    @classmethod
    def empty(cls, dim: int) -> LatentSums:
        return cls(0, np.zeros(dim), np.zeros(dim))

    @classmethod
    def of(cls, latents: Tensor) -> LatentSums:
        """latents: (…, d)."""
        values = latents.flatten(0, -2).double().cpu().numpy()
        mean = values.mean(0)
        return cls(len(values), mean, np.square(values - mean).sum(0))

    @classmethod
    def of_moments(cls, moments: Tensor) -> LatentSums:
        """moments: (…, 2·d), see `GaussianQuantizer.posterior`."""
        mean, log_variance = GaussianQuantizer.posterior(moments.cpu())
        sums = cls.of(mean)
        sums.squares += log_variance.flatten(0, -2).double().exp().sum(0).numpy()
        return sums

    def add(self, other: LatentSums) -> None:
        """Chan et al. 1979: no difference of large sums."""
        count, apart = self.count + other.count, other.mean - self.mean
        if count:
            self.mean += apart * other.count / count
            self.squares += other.squares + np.square(apart) * self.count * other.count / count
        self.count = count

    @property
    def std(self) -> np.ndarray:
        """By channel."""
        return np.sqrt(self.squares / max(self.count, 1))

    @property
    def variance(self) -> float:
        """Of the values of all channels together."""
        return float((np.square(self.std) + np.square(self.mean)).mean() - self.mean.mean() ** 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, of which `LatentSums(**values)` are the same."""
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    def described(self, factor: float) -> dict[str, Any]:
        """As index.json has it. factor: what makes tokens of these latents."""
        return {
            "scale_factor": factor,
            "measured_scale_factor": self.variance**-0.5 if self.variance > 0 else None,
            "count": self.count,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
        }


def factor_of(tokenizer: Tokenizer) -> float:
    """What the tokenizer multiplies its latents by."""
    scale = tokenizer.latent_scale
    return 1.0 if scale is None else float(scale.factor)


def check_scale(tokenizer: Tokenizer, key: str, path: str) -> None:
    """Raises UserError where nobody knows the scale of a continuous tokenizer's latents."""
    scale = tokenizer.latent_scale
    if tokenizer.spec.kind == "continuous" and scale is not None and not scale.known:
        raise UserError(
            f"{key}={path} has latents whose scale is not known; measure it on your images and use what that writes: "
            f"python encode.py data.path=IMAGES model_path={path} rescale=10000 output=DIR"
        )


def rescale(config: DictConfig | Mapping[str, Any]) -> Tokenizer:
    """Write the tokenizer of configs/encode.yaml anew, with the scale of its latents as measured on the data.

    Raises UserError for what cannot work, before anything is written.
    """
    cfg: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)
    with processes(cfg["device"]) as (_, world_size, device):
        if world_size > 1:
            raise UserError(f"rescale={cfg['rescale']} takes one process, not {world_size}; leave torchrun out")
        tokenizer = Tokenizer.from_pretrained(cfg["model_path"])
        scaled = unscaled(tokenizer, cfg["model_path"])
        data = data_for(tokenizer, cfg)
        data.check()
        loader = data.reference_loader(images=cfg["rescale"])
        images, headway = 0, Headway(min(cfg["rescale"], len(data.train)), "images encoded")
        sums = LatentSums.empty(tokenizer.spec.dim)
        for part in measured(scaled.to(device).eval(), (batch["image"].to(device).float() / 255 for batch in loader)):
            sums.add(part[1])
            images += part[0]
            headway.add(part[0])
    if not sums.variance > 0:
        raise UserError(f"model_path={cfg['model_path']} gives latents that do not vary on these images; give others")
    scale = scaled.latent_scale
    assert scale is not None
    scale.set_variance(sums.variance)
    of = f"{images:,} images of {Path(str(data.path or 'shapes')).name}"
    scaled.metadata = {**tokenizer.metadata, "latent_scale": f"{factor_of(scaled):.6g}, measured on {of}"}
    scaled.cpu().save_pretrained(cfg["output"])
    before = "not known" if not (known := tokenizer.latent_scale) or not known.known else f"{factor_of(tokenizer):.4g}"
    print(f"scale of its latents: {factor_of(scaled):.4g}, measured on {of} (before: {before})")
    print(f"export: {cfg['output']}", file=sys.stdout, flush=True)
    return scaled


@torch.inference_mode()
def measured(tokenizer: Tokenizer, batches: Iterable[Tensor]) -> Iterable[tuple[int, LatentSums]]:
    """The number of images of each batch, in [0, 1], and the sums of their latents, not scaled."""
    for images in batches:
        if tokenizer.has_posterior:
            yield len(images), LatentSums.of_moments(tokenizer.moments_of(images))
        else:
            latents = tokenizer.encode(images).latents
            assert latents is not None
            yield len(images), LatentSums.of(latents / factor_of(tokenizer))


def unscaled(tokenizer: Tokenizer, path: str) -> Tokenizer:
    """The same tokenizer with a scale that is measured, not given. Raises UserError where it has none."""
    if tokenizer.latent_scale is None:
        raise UserError(f"model_path={path} has {tokenizer.spec.words()}, and no scale to measure; leave rescale out")
    described = describe(tokenizer)
    for part in (described, described.get("quantizer")):
        if isinstance(part, dict) and "scaling_factor" in part:
            part["scaling_factor"] = None
            break
    fresh = build(described)
    assert isinstance(fresh, Tokenizer)
    fresh.load_state_dict({**fresh.state_dict(), **tokenizer.state_dict()})
    return fresh
