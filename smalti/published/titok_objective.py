"""Objectives of bytedance/1d-tokenizer: its `losses` configuration and loss-module weights in, ours out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.objectives.adversarial import Adversarial, LeCam, PatchDiscriminator
from smalti.objectives.base import Objective
from smalti.objectives.codes import ProxyCodeObjective
from smalti.objectives.perceptual import LPIPS, ConvNeXtLogits, LPIPSAndConvNeXt
from smalti.objectives.pixels import PixelObjective
from smalti.tokenizers.base import Tokenizer

_RENAMES = [
    (r"adversarial\.discriminator\.stem\.(\w+)", r"discriminator.block_in.0.\1"),
    (r"adversarial\.discriminator\.stages\.(\d+)\.conv\.(\w+)", r"discriminator.blocks.\1.0.\2"),
    (r"adversarial\.discriminator\.stages\.(\d+)\.norm\.(\w+)", r"discriminator.blocks.\1.2.\2"),
    (r"adversarial\.discriminator\.mix\.(\w+)", r"discriminator.to_logits.0.\1"),
    (r"adversarial\.discriminator\.to_logits\.(\w+)", r"discriminator.to_logits.2.\1"),
    (r"adversarial\.lecam\.(real|fake)_mean", r"ema_\1_logits_mean"),
    (r"perceptual\.(.+)", r"perceptual_loss.\1"),
    (r"(logvar)", r"\1"),
]
# Constants of ours (blur kernels), and networks that we read from their own files (VGG16, ConvNeXt-S).
_NOT_NEEDED = re.compile(r"discriminator\.blocks\.\d+\.1\.kernel|perceptual_loss\..+")


def objective_from_config(
    config: Mapping[str, Any],
    size_overrides: Mapping[str, Any] | None = None,
    perceptual: nn.Module | None = None,
    teacher: Tokenizer | None = None,
) -> Objective:
    """The objective of a published configuration (`losses`, and `model.vq_model` where the recipe depends on it).

    size_overrides: constructor arguments of the published discriminator, under `discriminator`. perceptual: the network
    to use instead of the one that `perceptual_loss` names. teacher: of stage 1, whose `losses` name no reconstruction.
    """
    losses = config["losses"]
    if "reconstruction_loss" not in losses:
        return ProxyCodeObjective(teacher=teacher, quantizer_weight=losses["quantizer_weight"])
    model = (config.get("model") or {}).get("vq_model") or {}
    gaussian = model.get("quantize_mode", "vq") == "vae" and not model.get("finetune_decoder", False)
    lecam_weight = losses["lecam_regularization_weight"]
    if perceptual is None and losses["perceptual_weight"] > 0:
        perceptual = perceptual_from_name(losses["perceptual_loss"])
    return PixelObjective(
        reconstruction=losses["reconstruction_loss"],
        reconstruction_weight=losses["reconstruction_weight"],
        perceptual=perceptual,
        perceptual_weight=losses["perceptual_weight"],
        quantizer_weight=losses.get("kl_weight", 1e-6) if gaussian else losses["quantizer_weight"],
        adversarial=Adversarial(
            discriminator=_discriminator((size_overrides or {}).get("discriminator") or {}),
            loss="hinge",
            weight=losses["discriminator_weight"],
            factor=losses["discriminator_factor"],
            start=losses["discriminator_start"],
            lecam=LeCam(weight=lecam_weight, decay=losses.get("lecam_ema_decay", 0.999)) if lecam_weight > 0 else None,
        ),
        logvar_init=losses.get("logvar_init", 0.0) if gaussian else None,
    )


def perceptual_from_name(
    name: str,
    lpips: LPIPS | None = None,
    convnext: ConvNeXtLogits | None = None,
) -> nn.Module:
    """The module of a published `perceptual_loss`: "lpips", "convnext_s" or "lpips-convnext_s-<a>-<b>".

    Networks that are not given are built without weights, which raises the UserError that says how to get them.
    """
    has_lpips, has_convnext = "lpips" in name, "convnext_s" in name
    if not has_lpips and not has_convnext:
        raise UserError(f"losses.perceptual_loss={name!r}: use lpips, convnext_s, or lpips-convnext_s-<a>-<b>")
    if not has_convnext:
        return lpips or LPIPS()
    if not has_lpips:
        return convnext or ConvNeXtLogits()
    try:
        a, b = (float(weight) for weight in name.split("-")[-2:])
    except ValueError:
        raise UserError(f"losses.perceptual_loss={name!r} ends in no two weights; published is …-1.0-0.1") from None
    return LPIPSAndConvNeXt(
        lpips=lpips or LPIPS(), convnext=convnext or ConvNeXtLogits(), lpips_weight=a, convnext_weight=b
    )


def _discriminator(arguments: Mapping[str, Any]) -> PatchDiscriminator:
    blur = arguments.get("blur_kernel_size", 4) if arguments.get("blur_resample", True) else None
    ours = {name: value for name, value in arguments.items() if name in ("hidden_channels", "num_stages")}
    return PatchDiscriminator(blur=blur, **ours)


def published_names(objective: Objective) -> dict[str, str]:
    """{our name: published name} of everything in the objective's state dict."""
    names = {}
    for ours in objective.state_dict():
        for pattern, replacement in _RENAMES:
            if re.fullmatch(pattern, ours):
                names[ours] = re.sub(pattern, replacement, ours)
                break
        else:
            raise KeyError(f"{ours} has no counterpart in the published loss module")
    return names


@torch.no_grad()
def load_objective_weights(objective: Objective, published_state: Mapping[str, Tensor]) -> None:
    """Load a published loss module's state dict; a missing, unknown or misshapen entry is a UserError that names it."""
    names = published_names(objective)
    unknown = sorted(name for name in set(published_state) - set(names.values()) if not _NOT_NEEDED.fullmatch(name))
    if unknown:
        raise UserError(f"{unknown[0]} of the published loss module has no place in this objective; compare `losses`")
    state = objective.state_dict()
    for ours, published in names.items():
        if published not in published_state:
            raise UserError(f"{published} is missing from the published loss module; {ours} of this objective needs it")
        value, here = published_state[published], tuple(state[ours].shape)
        if tuple(value.shape) != here:
            raise UserError(
                f"{published} has shape {tuple(value.shape)} but {ours} of this objective has {here}; "
                "compare the discriminator's sizes"
            )
        state[ours].copy_(value)
