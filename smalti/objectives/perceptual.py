"""Perceptual terms: LPIPS-VGG, ConvNeXt-S logits, and both as TiTok combines them.

LPIPS: Zhang et al. 2018 (arXiv:1801.03924), v0.1 linear weights, in the form of the taming-transformers port (features
normalised with 1e-10 outside the root). ConvNeXt-S logits: MaskBit (arXiv:2409.16211) and TiTok (arXiv:2406.07550).
Images are float (b, 3, h, w) in [0, 1]. The graph is recorded for the reconstruction only.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.objectives.frozen import Frozen

DOWNLOAD = "download"
_TAPS = (4, 9, 16, 23, 30)  # ends of the slices of VGG16's `features`: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TappedVGG(nn.Module):
    """A VGG's `features` cut behind five activations, LPIPS's weight of each channel there, and its input scaling.

    features: layers as in torchvision's VGG16 (any widths). channel_weights: five tensors (c,) or (1, c, 1, 1).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, features: nn.Sequential, channel_weights: Sequence[Tensor]) -> None:
        super().__init__()
        starts = (0, *_TAPS[:-1])
        self.slices = nn.ModuleList(features[start:end] for start, end in zip(starts, _TAPS, strict=True))
        self.channel_weights = nn.ParameterList(weight.detach().flatten() for weight in channel_weights)
        _register_channels(self, shift=_SHIFT, scale=_SCALE)

    def scaled(self, images: Tensor) -> Tensor:
        """[0, 1] to what the networks of LPIPS were trained on."""
        scaled: Tensor = (images.float() * 2 - 1 - self.shift) / self.scale
        return scaled


def _register_channels(module: nn.Module, **values: tuple[float, float, float]) -> None:
    for name, value in values.items():
        module.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)


class LPIPS(nn.Module):
    """LPIPS-VGG distances (b,) of images and reconstructions.

    weights: torchvision's VGG16 ImageNet weights: "download" (528 MB, once, into torch.hub's folder) or a file, .pth or
    .safetensors, with or without the classifier. linear_weights: a file of LPIPS's own weights (`lin0.model.1.weight`,
    …); null takes the v0.1 file that torchmetrics ships, which is the published one (md5 d507d734…).
    network: a VGG of your own with its weights, instead of both.
    """

    def __init__(
        self, *, weights: str | None = None, linear_weights: str | None = None, network: TappedVGG | None = None
    ) -> None:
        super().__init__()
        if network is None:
            network = TappedVGG(_vgg16_features(weights), _lpips_weights(linear_weights))
        self._network = Frozen(network)

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        network = self._network.on(images.device)
        real, fake = network.scaled(images.detach()), network.scaled(reconstruction)
        distance = fake.new_zeros(len(fake))
        for layers, weight in zip(network.slices, network.channel_weights, strict=True):
            with torch.no_grad():
                real = layers(real)
                real_direction = _direction(real)
            fake = layers(fake)
            difference = (_direction(fake) - real_direction).square().mean(dim=(2, 3))
            distance = distance + (weight * difference).sum(dim=1)
        return distance


def _direction(features: Tensor) -> Tensor:
    """Unit length over channels. Where all are 0 the published gradient is NaN; here it is finite, the value equal."""
    squared = features.square().sum(dim=1, keepdim=True)  # 1.7x as fast as vector_norm (b 1, c 64, 256 px)
    return features / (squared.masked_fill(squared == 0, 1).sqrt() + 1e-10)


class ConvNeXtLogits(nn.Module):
    """Mean squared difference () of the 1000 ImageNet logits of ConvNeXt-Small, at 224 px.

    weights: torchvision's ConvNeXt-S weights (IMAGENET1K_V1): "download" (192 MB, once, into torch.hub's folder) or a
    file, .pth or .safetensors. network: a classifier of your own instead.
    """

    def __init__(self, *, weights: str | None = None, network: nn.Module | None = None) -> None:
        super().__init__()
        self._network = Frozen(_Normalised(_convnext_small(weights) if network is None else network))

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.logits(images)
        return F.mse_loss(self.logits(reconstruction), target)

    def resize(self, images: Tensor) -> Tensor:
        """(b, 3, 224, 224), bilinear with antialiasing."""
        return F.interpolate(images.float(), size=224, mode="bilinear", align_corners=False, antialias=True)

    def logits(self, images: Tensor) -> Tensor:
        """(b, 1000) of images in [0, 1] at any size."""
        logits: Tensor = self._network.on(images.device)(self.resize(images))
        return logits


class _Normalised(nn.Module):
    """A network behind ImageNet's mean and standard deviation."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        _register_channels(self, mean=_IMAGENET_MEAN, std=_IMAGENET_STD)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.network((images - self.mean) / self.std)
        return result


class LPIPSAndConvNeXt(nn.Module):
    """(a · LPIPS + b · ConvNeXt) / (a + b) per sample (b,), TiTok's "lpips-convnext_s-a-b"; published 1.0 and 0.1.

    The network of a weight 0 is not run.
    """

    def __init__(
        self, *, lpips: LPIPS, convnext: ConvNeXtLogits, lpips_weight: float = 1.0, convnext_weight: float = 0.1
    ) -> None:
        super().__init__()
        if min(lpips_weight, convnext_weight) < 0 or lpips_weight + convnext_weight == 0:
            raise UserError(
                f"objective.perceptual.lpips_weight={lpips_weight}, convnext_weight={convnext_weight}: weights must be "
                "0 or more and not both 0; published are 1.0 and 0.1"
            )
        self.lpips, self.convnext = lpips, convnext
        self.lpips_weight, self.convnext_weight = lpips_weight, convnext_weight

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        total = reconstruction.new_zeros(len(reconstruction), dtype=torch.float32)
        if self.lpips_weight > 0:
            total = total + self.lpips_weight * self.lpips(images, reconstruction)
        if self.convnext_weight > 0:
            total = total + self.convnext_weight * self.convnext(images, reconstruction)
        return total / (self.lpips_weight + self.convnext_weight)


def _vgg16_features(weights: str | None) -> nn.Sequential:
    from torchvision.models import VGG16_Weights
    from torchvision.models.vgg import cfgs, make_layers

    with torch.device("meta"):
        features = make_layers(cfgs["D"], batch_norm=False)
    tensors = _read(weights, "LPIPS", "VGG16", VGG16_Weights.IMAGENET1K_V1)
    prefix = "features." if any(name.startswith("features.") for name in tensors) else ""
    _fill(features, {name: tensors.get(prefix + name) for name in features.state_dict()}, f"LPIPS weights={weights}")
    return features


def _convnext_small(weights: str | None) -> nn.Module:
    from torchvision.models import ConvNeXt_Small_Weights, convnext_small

    with torch.device("meta"):
        network: nn.Module = convnext_small()
    tensors = _read(weights, "ConvNeXtLogits", "ConvNeXt-S", ConvNeXt_Small_Weights.IMAGENET1K_V1)
    _fill(network, {name: tensors.get(name) for name in network.state_dict()}, f"ConvNeXtLogits weights={weights}")
    return network


def _lpips_weights(path: str | None) -> list[Tensor]:
    if path is None:
        spec = find_spec("torchmetrics")  # found, not imported: the import takes 6 s
        assert spec is not None and spec.submodule_search_locations
        path = str(Path(spec.submodule_search_locations[0]) / "functional/image/lpips_models/vgg.pth")
    tensors = _load(path, f"LPIPS linear_weights={path}")
    names = [f"lin{i}.model.1.weight" for i in range(len(_TAPS))]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise UserError(f"LPIPS linear_weights={path} has no {missing[0]}; use LPIPS v0.1's vgg.pth, or null")
    return [tensors[name].float() for name in names]


def _read(weights: str | None, module: str, network: str, published: Any) -> dict[str, Tensor]:
    """The state dict that `weights` asks for: by the name "download" from torchvision, otherwise a file."""
    file_name = Path(published.url).name
    if weights is None:
        raise UserError(
            f"{module} weights=null: it measures with {network} trained on ImageNet; set objective.perceptual.weights "
            f"(in a combination objective.perceptual.{'lpips' if module == 'LPIPS' else 'convnext'}.weights) to "
            f"'download' or to a path of {file_name}, or objective.perceptual=null to train without"
        )
    if weights != DOWNLOAD:
        return _load(weights, f"{module} weights={weights}")
    try:
        return torch.hub.load_state_dict_from_url(
            published.url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"{module} weights=download: {published.url} could not be fetched ({error}); copy {file_name} here and set "
            f"weights to its path, or put it into {torch.hub.get_dir()}/checkpoints"
        ) from error


def _load(path: str, what: str) -> dict[str, Tensor]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{what} is not a file; give a path of .pth or .safetensors weights, or 'download'")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(file)
        else:
            # Mapped, where the format allows it: most of VGG16's file is a classifier that nobody reads.
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{what} cannot be read as a state dict ({reason}); fetch the file again") from error
    if not isinstance(tensors, dict):
        raise UserError(f"{what} holds a {type(tensors).__name__}, not a state dict; use torchvision's own file")
    return tensors


def _fill(network: nn.Module, tensors: dict[str, Tensor | None], what: str) -> None:
    """Give a network without storage its weights; names the first that is missing or of another shape."""
    weights = {}
    for name, expected in network.state_dict().items():
        tensor = tensors[name]
        if tensor is None or tensor.shape != expected.shape:
            has = "has no" if tensor is None else f"has {tuple(tensor.shape)} for"
            raise UserError(f"{what} {has} {name} {tuple(expected.shape)}; use torchvision's weights of this network")
        weights[name] = tensor.float().clone()
    network.load_state_dict(weights, assign=True)
