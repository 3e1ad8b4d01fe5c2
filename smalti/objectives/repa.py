"""Representation alignment (REPA, Yu et al. 2024, arXiv:2410.06940): a generator's early features resemble DINOv2's.

image -> frozen vision transformer -> features of its patches
loss = − mean over patches of cos(projected features of the generator, those)

FlexTok takes DINOv2-L and its decoder's second block; weight and resizing are not published.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor, nn

from smalti.errors import UserError, did_you_mean
from smalti.objectives.frozen import Frozen

CACHED, DOWNLOAD = "cached", "download"


class Representation(nn.Module):
    """Patch features (b, rows, columns, d) of images (b, 3, h, w) in [0, 1], from a frozen vision transformer of timm.

    model: timm's name of it, with the tag of its weights. weights: "cached", those in Hugging Face's cache, where an
    earlier download left them; "download", from there or else from the hub; or a file. size: side in pixels to which
    images are brought (224 as in REPA; then patches of 14 are a 16 × 16 grid, that of FlexTok's patches at 256 px).
    network: a transformer of your own instead, with timm's attributes.

    `available` is False where "cached" weights are not in the cache: nothing can be computed then; `missing` says so.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        model: str = "vit_large_patch14_dinov2.lvd142m",
        weights: str = CACHED,
        size: int = 224,
        network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model, self.size = model, size
        if network is None:
            network = _load(model, weights)
        self._network = None if network is None else Frozen(network)
        if network is not None:
            known: Any = network
            config = getattr(known, "pretrained_cfg", None) or {}
            self.patch, self.dim = int(known.patch_embed.patch_size[0]), int(known.num_features)
            patch = self.patch
            if size < patch or size % patch:
                below = max(size // patch, 1) * patch
                raise UserError(
                    f"objective.repa.size={size} is not a multiple of {patch}, the patches of {model}; use {below} or "
                    f"{below + patch}"
                )
            for name, default in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
                values = torch.tensor(config.get(name, default)).view(1, 3, 1, 1)
                self.register_buffer(name, values, persistent=False)

    @property
    def available(self) -> bool:
        return self._network is not None

    @property
    def missing(self) -> str:
        """What to say where it is not available."""
        return (
            f"objective.repa: off, weights of {self.model} are not in Hugging Face's cache; "
            "objective.repa.weights=download fetches them, or give a file"
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        assert self._network is not None
        network: Any = self._network.on(images.device)
        resized = F.interpolate(images.float(), size=self.size, mode="bicubic", antialias=True, align_corners=False)
        normalised = (resized.clamp(0, 1) - self.mean) / self.std
        # The target of a cosine needs no more digits.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            tokens = network.forward_features(normalised)[:, network.num_prefix_tokens :]
        return rearrange(tokens.float(), "b (h w) d -> b h w d", h=self.size // self.patch)


def misalignment(features: Tensor, target: Tensor) -> Tensor:
    """− mean over patches of the cosine, (b,) in −1…1.

    features: (b, n, d) of a square grid; target: (b, rows, columns, d). Features of another grid than the target's are
    resized to it (bilinear).
    """
    side = round(features.shape[1] ** 0.5)
    if side * side != features.shape[1]:
        raise ValueError(f"{features.shape[1]} features do not form a square grid")
    grid = rearrange(features, "b (h w) d -> b d h w", h=side)
    if grid.shape[2:] != target.shape[1:3]:
        grid = F.interpolate(grid, size=target.shape[1:3], mode="bilinear", align_corners=False)
    return -F.cosine_similarity(rearrange(grid, "b d h w -> b h w d"), target, dim=-1).mean((1, 2))


def _load(model: str, weights: str) -> nn.Module | None:
    """A pretrained network; None where it shall come from the cache and is not there."""
    import timm  # a second, and only where it is used
    from timm.models import load_checkpoint
    from timm.models.vision_transformer import checkpoint_filter_fn

    name = model.split(".")[0]
    if not timm.is_model(name):
        raise UserError(f"objective.repa.model={model} is not a model of timm{did_you_mean(name, timm.list_models())}")
    options: dict[str, Any] = {"num_classes": 0, "dynamic_img_size": True}
    if weights == DOWNLOAD:
        try:
            return timm.create_model(model, pretrained=True, **options)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"objective.repa.weights=download: {model} cannot be fetched ({_reason(error)}); give a file, or set "
                "objective.repa=null"
            ) from error
    if weights == CACHED:
        config = timm.get_pretrained_cfg(model)
        if config is None or config.hf_hub_id is None:
            raise UserError(
                f"objective.repa.model={model}: timm knows no weights of it; name their tag, or give a file"
            )
        files = [try_to_load_from_cache(config.hf_hub_id, file) for file in ("model.safetensors", "pytorch_model.bin")]
        file = next((found for found in files if isinstance(found, str)), None)
        if file is None:
            return None
    elif not Path(file := str(Path(weights).expanduser())).is_file():
        raise UserError(
            f"objective.repa.weights={weights} is not a file; give one, or {CACHED}, or {DOWNLOAD}, or set "
            "objective.repa=null"
        )
    network = timm.create_model(model, **options)
    try:
        # Not timm's own way with local files, which leaves what a file lacks at random values.
        loaded = load_checkpoint(network, file, strict=False, filter_fn=checkpoint_filter_fn, weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError, UnpicklingError) as error:
        raise UserError(f"objective.repa.weights={file} cannot be read as {model} ({_reason(error)})") from error
    if loaded.missing_keys:
        raise UserError(f"objective.repa.weights={file} does not fit {model}: it has no {loaded.missing_keys[0]}")
    return network


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:150] if lines else type(error).__name__
