"""Published losses of TiTok: stage 1, stage 2 and one-stage (both turns), and the perceptual networks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from smalti.objectives.perceptual import LPIPS, ConvNeXtLogits, LPIPSAndConvNeXt, TappedVGG
from smalti.published.titok_objective import (
    load_objective_weights,
    objective_from_config,
    perceptual_from_name,
    published_names,
)
from smalti.tokenizers.base import TokenizerOutput
from smalti.tokenizers.quantizers.base import Quantized


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def quantized(losses: dict[str, Tensor]) -> Quantized:
    return Quantized(torch.zeros(()), None, losses)


class GivenCodes(nn.Module):
    """A teacher that answers with the codes of the case."""

    def __init__(self, codes: Tensor, codebook_size: int) -> None:
        super().__init__()
        self.given = codes
        self.spec = SimpleNamespace(codebook_size=codebook_size, length=codes.shape[1], depth=1)

    def encode(self, images: Tensor) -> Any:
        return SimpleNamespace(indices=self.given)


class ConvolutionDistance(nn.Module):
    """The stand-in that the fixtures describe: mean of (conv(image) − conv(reconstruction))²."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, stride=2, padding=1)

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return (self.conv(images) - self.conv(reconstruction)).square().mean()


@pytest.mark.family("titok-stage1")
def test_stage_1_gives_the_published_losses_and_gradients(case):
    logits, codes = leaf(case.inputs["proxy_logits"]), case.inputs["proxy_codes"]
    quantizer_loss = leaf(case.inputs["quantizer_loss"])
    teacher: Any = GivenCodes(codes, logits.shape[1])
    objective = objective_from_config(case.config, case.size_overrides, teacher=teacher)
    output = TokenizerOutput(quantized({"sum": quantizer_loss}), logits=logits)

    terms = objective(output, torch.zeros(len(codes), 3, 8, 8), step=0)
    total = sum(terms.values())
    total.backward()

    ours = {
        "total_loss": total,
        "reconstruction_loss": terms["reconstruction"],
        "quantizer_loss": terms.get("quantizer", torch.zeros(())),
        "commitment_loss": case.inputs["commitment_loss"],
        "codebook_loss": case.inputs["codebook_loss"],
        "grad/proxy_logits": logits.grad,
        "grad/quantizer_loss": gradient(quantizer_loss),
    }
    for name in case.outputs:
        case.compare(name, ours[name])


def gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def kl_of_moments(moments: Tensor) -> Tensor:
    """Σ KL / b of published moments (b, 2c, 1, n), log-variance clamped to [−30, 20]."""
    mean, logvar = moments.chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / len(moments)


@pytest.mark.family("titok-stage2")
def test_both_turns_give_the_published_terms_and_gradients(case):
    objective = objective_from_config(case.config, case.size_overrides, perceptual=ConvolutionDistance())
    load_objective_weights(objective, case.weights)
    theirs = published_names(objective)
    images, start = case.inputs["image"], case.config["losses"]["discriminator_start"]
    with torch.no_grad():
        case.compare("logits_real_map", objective.discriminator(images))
        case.compare("logits_fake_map", objective.discriminator(case.inputs["reconstruction"]))

    for turn, step in (("generator_before_start", start - 1), ("generator_at_start", start)):
        reconstruction = leaf(case.inputs["reconstruction"])
        source = "moments" if "moments" in case.inputs else "quantizer_loss"
        bottleneck = leaf(case.inputs[source])
        quantizer_loss = kl_of_moments(bottleneck) if source == "moments" else bottleneck
        terms = objective(TokenizerOutput(quantized({"sum": quantizer_loss}), reconstruction), images, step)
        total = sum(terms.values())
        total.backward()
        raw = objective.statistics()
        ours = {
            "total_loss": total,
            "reconstruction_loss": terms.get("reconstruction", torch.zeros(())),
            "perceptual_loss": terms.get("perceptual", torch.zeros(())),
            "kl_loss" if source == "moments" else "quantizer_loss": terms.get("quantizer", torch.zeros(())),
            "weighted_gan_loss": terms.get("adversarial", torch.zeros(())),
            "gan_loss": raw.get("generator_loss", torch.zeros(())),
            "d_weight": raw.get("adversarial_weight", objective.adversarial.weight),
            "discriminator_factor": raw.get("adversarial_factor", objective.adversarial.factor_at(step)),
            "grad/reconstruction": gradient(reconstruction),
            f"grad/{source}": gradient(bottleneck),
            **{name: case.inputs[name] for name in ("commitment_loss", "codebook_loss") if name in case.inputs},
        }
        for name in case.names(f"{turn}/"):
            case.compare(f"{turn}/{name}", ours[name])
        assert all(parameter.grad is None for parameter in objective.parameters())

    for step, when in enumerate(("before_start", "at_start", "next"), start - 1):
        turn = f"discriminator_{when}"
        objective.zero_grad()
        output = TokenizerOutput(quantized({}), case.inputs["reconstruction"])
        terms = objective.discriminator_turn(output, images, step)
        total = sum(terms.values())
        if total.requires_grad:
            total.backward()
        raw = objective.statistics()
        gradients = {theirs[name]: gradient(parameter) for name, parameter in objective.named_parameters()}
        averages = {theirs[name]: value for name, value in objective.named_buffers() if "lecam" in name}
        ours = {
            "discriminator_loss": total,
            "lecam_loss": terms.get("lecam", torch.zeros(())),
            "logits_real": raw["logits_real"],
            "logits_fake": raw["logits_fake"],
            **averages,
            **{f"grad/{name}": value for name, value in gradients.items()},
            **{f"grad_norm/{name}": value.norm() for name, value in gradients.items()},
        }
        for name in case.names(f"{turn}/"):
            case.compare(f"{turn}/{name}", ours[name])


class SmallConvNeXt(nn.Module):
    """The classifier that the fixtures put in ConvNeXt-Small's place."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        kernel, classes = weights["conv.weight"].shape, len(weights["head.bias"])
        self.conv = nn.Conv2d(kernel[1], kernel[0], kernel[-1], stride=kernel[-1])
        self.head = nn.Linear(kernel[0], classes)
        self.load_state_dict(weights)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(nn.functional.gelu(self.conv(images)).mean(dim=(2, 3)))


def small_lpips(case: Any) -> LPIPS:
    """LPIPS on a VGG of the case's widths: published `net.slice<k>.<index>` is layer <index> of `features`."""
    weights = case.weights_of("lpips")
    layers = {int(name.split(".")[2]): name.rsplit(".", 1)[0] for name in weights if name.startswith("net.")}
    widths: list[str | int] = []
    for index in sorted(layers):
        widths += ["M"] if index in (5, 10, 17, 24) else []
        widths.append(len(weights[f"{layers[index]}.bias"]))
    features = make_layers([*widths, "M"])  # type: ignore[list-item]
    parts = ("weight", "bias")
    features.load_state_dict({f"{i}.{part}": weights[f"{name}.{part}"] for i, name in layers.items() for part in parts})
    return LPIPS(network=TappedVGG(features, [weights[f"lin{i}.model.1.weight"] for i in range(5)]))


@pytest.mark.family("titok-perceptual")
def test_perceptual_losses_are_the_published_ones(case):
    lpips = small_lpips(case) if case.weights_of("lpips") else None
    convnext = (
        ConvNeXtLogits(network=SmallConvNeXt(case.weights_of("convnext"))) if case.weights_of("convnext") else None
    )
    perceptual = perceptual_from_name(case.config["losses"]["perceptual_loss"], lpips, convnext)
    assert isinstance(perceptual, LPIPSAndConvNeXt) == (lpips is not None and convnext is not None)
    images, reconstruction = case.inputs["image"], leaf(case.inputs["reconstruction"])

    distance = perceptual(images, reconstruction)
    distance.mean().backward()

    case.compare("loss_raw", distance.view_as(case.outputs["loss_raw"]))
    case.compare("loss", distance.mean())
    case.compare("grad/reconstruction", reconstruction.grad)
    if lpips is not None:
        case.compare("lpips_per_sample", lpips(images, reconstruction).view(-1, 1, 1, 1))
    if convnext is not None:
        corner = case.outputs["resized_corner"].shape[-1]
        case.compare("resized_corner", convnext.resize(images)[..., :corner, :corner])
        case.compare("convnext_logits", convnext.logits(images))
