"""LlamaGen's VQ-GANs (FoundationVision/LlamaGen, arXiv:2406.06525) and their training losses as ours.

Files are read by smalti/published/llamagen.py, for GPTs and VQ-GANs alike: released ones (vq_ds16_c2i.pt, …) and
checkpoints of the published training, of which averaged weights are taken where there are any. Sizes are read off the
names and shapes of the weights.

What differs: names (`our_name`, `published_name`); images here are in [0, 1], there in [−1, 1]; the published ring of
recently used codes (`quantize.codebook_used`) is a figure of its training and dropped.

Published, the start of the discriminator counts from step 1 (`disc_start`), here from 0 (`start`); it and its optimizer
run before the start with a weight of 0 (`before_start="idle"`); "non-saturating" losses have the arguments of their
cross-entropy swapped (`swapped_bce`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.objectives.adversarial import Adversarial
from smalti.objectives.discriminators import PatchGAN, StyleGANDiscriminator
from smalti.objectives.pixels import PixelObjective
from smalti.published.names import check_shapes, count
from smalti.tokenizers.quantizers.vq import VectorQuantizer
from smalti.tokenizers.vqgan import VQGAN

State = dict[str, Tensor]

# What the published code has in its source, not in its configuration.
HARD_CODED: dict[str, int] = {"ch": 128, "num_groups": 32, "num_res_blocks": 2}
IMAGE_SIZE = 256  # of the recipes; the weights serve any multiple of their factor and do not tell

_NAMES = (  # published, ours; parts of names, in this order
    ("quantize.embedding.weight", "quantizer.embedding"),
    (".conv_blocks.", ".levels."),
    (".downsample.", ".resize."),
    (".upsample.", ".resize."),
    (".nin_shortcut.", ".shortcut."),
)
_USED_CODES = "quantize.codebook_used"


def is_vq(state: Mapping[str, Any]) -> bool:
    """Whether these are the weights of a VQ-GAN (and not of a GPT)."""
    return "quantize.embedding.weight" in state and "quant_conv.weight" in state


def our_name(name: str) -> str:
    """Our name of a published parameter."""
    for theirs, ours in _NAMES:
        name = name.replace(theirs, ours)
    return name


def published_name(name: str) -> str:
    """The published name of a parameter of ours; the inverse of `our_name`."""
    name = name.replace(".resize.", ".downsample." if name.startswith("encoder.") else ".upsample.")
    for theirs, ours in _NAMES:
        name = name.replace(ours, theirs)
    return name


def to_published(model: VQGAN) -> State:
    """The weights of a model of ours under published names."""
    return {published_name(name): tensor for name, tensor in model.state_dict().items()}


def load_published(model: VQGAN, state: Mapping[str, Tensor]) -> None:
    """Copy published weights into a model; raises UserError naming the first key that does not fit."""
    state = {name: tensor for name, tensor in state.items() if name != _USED_CODES}
    check_shapes(to_published(model), state)
    model.load_state_dict({our_name(name): tensor for name, tensor in state.items()})


def build_tokenizer(
    config: Mapping[str, Any], patched: Mapping[str, Any] | None = None, image_size: int = IMAGE_SIZE
) -> VQGAN:
    """The model of a published configuration (the keys of its `ModelArgs`), with fresh weights.

    patched: replaces parts of HARD_CODED.
    """
    fixed = {**HARD_CODED, **(patched or {})}
    normalised = config["codebook_l2_norm"]
    quantizer = VectorQuantizer(
        codebook_size=config["codebook_size"],
        dim=config["codebook_embed_dim"],
        distance="cosine" if normalised else "euclidean",
        commitment_weight=config["commit_loss_beta"],
        init="unit" if normalised else "uniform",
        entropy_weight=config["entropy_loss_ratio"],
        entropy_eps=1e-5,
    )
    encoder, decoder = list(config["encoder_ch_mult"]), list(config["decoder_ch_mult"])
    return VQGAN(
        image_size=image_size,
        quantizer=quantizer,
        channels=fixed["ch"],
        channel_mult=encoder,
        decoder_channel_mult=None if decoder == encoder else decoder,
        num_res_blocks=fixed["num_res_blocks"],
        z_channels=config["z_channels"],
        norm_groups=fixed["num_groups"],
        dropout=config["dropout_p"],
    )


def infer(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(published configuration, hard-coded sizes) read off the names and shapes of published weights.

    Not to be seen there, hence as in all published models: codes of length 1, groups of normalisation, commitment 0.25.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    codes, dim = shapes["quantize.embedding.weight"]
    channels = shapes["encoder.conv_in.weight"][0]
    mult = {
        tower: [
            shapes[f"{tower}.conv_blocks.{level}.res.0.conv1.weight"][0] // channels
            for level in range(count(shapes, rf"{tower}\.conv_blocks\.(\d+)\."))
        ]
        for tower in ("encoder", "decoder")
    }
    config = {
        "codebook_size": codes,
        "codebook_embed_dim": dim,
        "codebook_l2_norm": True,
        "commit_loss_beta": 0.25,
        "entropy_loss_ratio": 0.0,
        "encoder_ch_mult": mult["encoder"],
        "decoder_ch_mult": mult["decoder"][::-1],
        "z_channels": shapes["encoder.conv_out.weight"][0],
        "dropout_p": 0.0,
    }
    fixed = {
        "ch": channels,
        "num_res_blocks": count(shapes, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "num_groups": min(HARD_CODED["num_groups"], channels),
    }
    return config, fixed


def convert(state: Mapping[str, Tensor], checkpoint: Path, config: Mapping[str, Any] | None = None) -> VQGAN:
    """Published weights as a model of ours, in evaluation mode, with origin and licence in `metadata`.

    checkpoint: where they come from (smalti.published.llamagen reads files). config: keys of the published
    `ModelArgs`, and image_size, for what the weights do not tell. Raises UserError with one line.
    """
    config = config or {}
    settings, fixed = infer(state)
    settings |= {name: value for name, value in config.items() if name in settings}
    try:
        model = build_tokenizer(settings, fixed, image_size=config.get("image_size", IMAGE_SIZE))
    except (TypeError, ValueError) as error:
        raise UserError(f"checkpoint={checkpoint} does not make a VQ-GAN: {error}; check config=") from error
    load_published(model, state)
    model.metadata = _metadata(model, checkpoint)
    return model.eval()


# rFID on the 50,000 ImageNet validation images at 256 × 256 as the published README states it.
_RFID = {"vq_ds16_c2i": 2.19, "vq_ds8_c2i": 0.59}


def _metadata(model: VQGAN, checkpoint: Path) -> dict[str, Any]:
    """What is known of a published checkpoint by its name; a name that the sizes contradict is not believed."""
    metadata: dict[str, Any] = {
        "source": f"FoundationVision/LlamaGen, converted from {checkpoint.name}",
        "licence": "MIT",
    }
    found = re.search(r"vq_ds(8|16)_(c2i|t2i)", checkpoint.name)
    if found and model.spec.length == (model.spec.image_size // int(found[1])) ** 2:
        metadata["title"] = f"{found[0]} (published weights)"
        metadata["preprocessing"] = f"RGB in [0, 1], ADM centre crop, {model.spec.image_size} px"
        metadata["training_data"] = (
            "ImageNet-1k, training split, 256 × 256" if found[2] == "c2i" else "ImageNet-1k, then captioned images"
        )
        if found[0] in _RFID and model.spec.image_size == IMAGE_SIZE:
            metadata["results"] = {
                "rFID, ImageNet validation, as published (not measured here)": _RFID[found[0]],
            }
    return metadata


def objective_from_config(
    loss: Mapping[str, Any],
    *,
    perceptual: nn.Module | None,
    stylegan_channels: Mapping[str, int] | None = None,
) -> PixelObjective:
    """The objective of a published loss configuration (the arguments of its `VQLoss`).

    perceptual: LPIPS, or what stands in its place. stylegan_channels: the published discriminator's table of widths by
    side, where it was made small. `codebook_weight` has no effect there.
    """
    if loss["disc_type"] == "patchgan":
        discriminator: nn.Module = PatchGAN(channels=loss["disc_dim"], num_layers=loss["disc_num_layers"])
    elif loss["disc_type"] == "stylegan":
        table = {int(side): width for side, width in (stylegan_channels or {}).items()}
        sides = [side for side in sorted(table) if side <= loss["image_size"]]
        discriminator = StyleGANDiscriminator(
            image_size=loss["image_size"], channels=[table[side] for side in sides] or None
        )
    else:
        raise UserError(f"disc_type={loss['disc_type']} is not known; use patchgan or stylegan")
    names = [loss[key].replace("-", "_") for key in ("disc_loss", "gen_adv_loss")]
    return PixelObjective(
        reconstruction=loss["reconstruction_loss"],
        reconstruction_weight=loss["reconstruction_weight"],
        pixel_range="signed",
        perceptual=perceptual,
        perceptual_weight=loss["perceptual_weight"],
        adversarial=Adversarial(
            discriminator=discriminator,
            loss=names[0],
            generator_loss=names[1],
            swapped_bce="non_saturating" in names,
            weight=1.0,
            factor=loss["disc_weight"],
            start=max(loss["disc_start"] - 1, 0),
            before_start="idle",
            adaptive_weight_max=1e4 if loss["disc_adaptive_weight"] else None,
        ),
    )


def published_discriminator_names(objective: PixelObjective) -> dict[str, str]:
    """{our name: published name} of the discriminator's state: layers in the same order, containers named otherwise."""
    discriminator = objective.discriminator
    assert isinstance(discriminator, (PatchGAN, StyleGANDiscriminator))
    names = {}
    for name in discriminator.state_dict():
        if isinstance(discriminator, PatchGAN):
            names[name] = name.replace("layers.", "main.")
        else:
            names[name] = _stylegan_name(name)
    return names


def _stylegan_name(name: str) -> str:
    # There the activation after the first convolution has a place in the list of blocks.
    name = re.sub(r"^stages\.(\d+)\.", lambda match: f"blocks.{int(match[1]) + 2}.", name)
    for ours, theirs in (
        ("stem.", "blocks.0."),
        (".skip.", ".conv_res."),
        (".conv1.", ".net.0."),
        (".conv2.", ".net.2."),
        (".halve.", ".downsample.1."),
        ("mix.", "final_conv.0."),
        ("hidden.", "final_linear.0."),
        ("to_logits.", "final_linear.2."),
    ):
        name = name.replace(ours, theirs)
    return name


@torch.no_grad()
def load_discriminator(objective: PixelObjective, state: Mapping[str, Tensor]) -> None:
    """Load a published discriminator's state dict; its constant blur kernels are ours already."""
    assert objective.discriminator is not None
    names, own = published_discriminator_names(objective), objective.discriminator.state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".downsample.0.f")}
    check_shapes({theirs: own[ours] for ours, theirs in names.items()}, state)
    objective.discriminator.load_state_dict({ours: state[theirs] for ours, theirs in names.items()})
