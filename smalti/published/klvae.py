"""Published KL autoencoders as ours: KL-16 of MAR (LTH14/mar), latent diffusion's, and diffusers' AutoencoderKL.

    convert("kl16.ckpt")                 MAR's, or any checkpoint in latent diffusion's names
    convert("…/sd-vae-ft-mse")           a diffusers folder: config.json and diffusion_pytorch_model.safetensors

Sizes, and where attention stands, are read off the names and shapes of the weights; diffusers' config.json is read as
data, and one that asks for what `KLVAE` has not is refused. What differs: names (`from_ldm`; diffusers' are ours);
queries, keys, values and projections of attention, which are 1×1 convolutions there and linear maps here; images, which
are in [−1, 1] there.

MAR's KL-16 has attention at the encoder's last level and none in the decoder, by an oversight of its authors when they
adapted latent diffusion's network. Latents are multiplied by 0.2325, 1 over their standard deviation on ImageNet; the
factor of another checkpoint in these names is not known unless config= says `scaling_factor`: it is to be measured.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from smalti.errors import UserError, did_you_mean
from smalti.published.files import config_beside, read_config, read_weights, weights_file
from smalti.published.names import check_shapes, count, renamed
from smalti.tokenizers.klvae import KLVAE

State = dict[str, Tensor]

# What MAR's code has in its source, not in its configuration.
HARD_CODED: dict[str, Any] = {
    "ch": 128, "num_res_blocks": 2, "resolution": 256, "encoder_attn_resolutions": [16], "decoder_attn_resolutions": [],
}  # fmt: skip
GROUPS = 32  # of every group norm in latent diffusion's code
IMAGE_SIZE = 256  # of their training; the weights serve any multiple of their factor and do not tell
KL16 = {
    "latent_channels": 16, "block_out_channels": [128, 128, 256, 256, 512], "layers_per_block": 2,
    "encoder_attention": [4], "decoder_attention": [],
}  # fmt: skip
KL16_SCALE = 0.2325
_OURS = ("image_size", "scaling_factor")  # keys of a config= for checkpoints in latent diffusion's names

_LDM = (  # latent diffusion's, ours; parts of names, in this order
    (r"\.down\.(\d+)\.block\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d+)\.attn\.(\d+)\.", r".down_blocks.\1.attentions.\2."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
    (r"\.up\.(\d+)\.attn\.(\d+)\.", r".up_blocks.\1.attentions.\2."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
_OLD = (  # older diffusers', ours
    (r"(\.attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(\.attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(\.attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
)
_DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}  # whether with attention
_UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
# Arguments of diffusers' class that KLVAE has with this value only.
_FIXED: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "act_fn": "silu", "shift_factor": None, "latents_mean": None,
    "latents_std": None, "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True,
}  # fmt: skip
_WITHOUT_EFFECT = {"force_upcast"}  # on the values: it is about half precision


def from_ldm(state: Mapping[str, Tensor]) -> State:
    """Weights in latent diffusion's names under ours; there the decoder's levels are counted from the finest."""
    levels = 1 + max((int(name.split(".")[2]) for name in state if name.startswith("decoder.up.")), default=0)
    ours: State = {}
    for name, tensor in state.items():
        name = renamed(name, _LDM)
        name = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up_blocks.{levels - 1 - int(match[1])}.", name)
        ours[name] = tensor
    return _linear(ours)


def from_diffusers(state: Mapping[str, Tensor]) -> State:
    """Weights in diffusers' names under ours, which are its present ones."""
    return _linear({renamed(name, _OLD): tensor for name, tensor in state.items()})


def sizes_of(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """The sizes of a KLVAE that names and shapes of an AutoencoderKL's weights show, in diffusers' names."""
    down, up = f"{prefix}encoder.down_blocks.", f"{prefix}decoder.up_blocks."
    if not any(name.startswith(down) for name in state):
        return {}
    levels = count(state, rf"{re.escape(down)}(\d+)\.resnets\.")
    attended = {
        place: sorted({int(name.removeprefix(place).split(".")[0]) for name in state if name.startswith(place)
                       and ".attentions." in name})
        for place in (down, up)
    }  # fmt: skip
    return {
        "block_out_channels": [len(state[f"{down}{level}.resnets.0.conv2.weight"]) for level in range(levels)],
        "layers_per_block": count(state, rf"{re.escape(down)}\d+\.resnets\.(\d+)\."),
        "encoder_attention": attended[down],
        "decoder_attention": [levels - 1 - level for level in reversed(attended[up])],
    }


def build_tokenizer(config: Mapping[str, Any], scaling_factor: float | None = KL16_SCALE) -> KLVAE:
    """The model of a configuration of MAR's code (embed_dim, ch_mult; what HARD_CODED has may be there, too), with
    fresh weights."""
    given = {**HARD_CODED, **config}
    sides = [given["resolution"] // 2**level for level in range(len(given["ch_mult"]))]
    attention = {
        tower: [level for level, side in enumerate(sides) if side in given[f"{tower}_attn_resolutions"]]
        for tower in ("encoder", "decoder")
    }
    return KLVAE(
        image_size=given["resolution"],
        latent_channels=given["embed_dim"],
        block_out_channels=[given["ch"] * factor for factor in given["ch_mult"]],
        layers_per_block=given["num_res_blocks"],
        norm_num_groups=GROUPS,
        encoder_attention=attention["encoder"],
        decoder_attention=attention["decoder"],
        scaling_factor=scaling_factor,
    )


def convert(checkpoint: str | Path, config: str | Path | None = None) -> KLVAE:
    """A published checkpoint as a model of ours, in evaluation mode, with its origin in `metadata`.

    checkpoint: a file (tensors only, nothing pickled is run), or a diffusers folder. config: diffusers' config.json, or
    a .json or .yaml with `image_size` or `scaling_factor` (null: to be measured) for checkpoints in latent diffusion's
    names; None: the one beside the file. Raises UserError with one line.
    """
    checkpoint = Path(checkpoint).expanduser()
    file = weights_file(checkpoint)
    state = read_weights(file)
    found = Path(config) if config is not None else config_beside(file)
    settings = {} if found is None else read_config(found)
    if any(name.startswith("encoder.down.") for name in state):
        # Latent diffusion's training saves its losses' networks, too.
        state = from_ldm({name: tensor for name, tensor in state.items() if not name.startswith("loss.")})
        arguments, metadata = _of_ldm(state, settings, checkpoint.name)
    elif any(name.startswith("encoder.down_blocks.") for name in state):
        state = from_diffusers(state)
        arguments, metadata = _of_diffusers(state, settings, found)
    else:
        some = ", ".join(sorted(state)[:3])
        raise UserError(f"checkpoint={checkpoint} is no KL autoencoder: its names are {some}, …; check the file")
    try:
        model = KLVAE(**arguments)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{found or file} does not describe a KL autoencoder: {error}; check config=") from error
    _load(model, state)
    model.metadata = {**metadata, "source": f"{metadata['source']}, converted from {checkpoint.name}"}
    return model.eval()


def _of_ldm(state: State, config: Mapping[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and metadata of weights that came in latent diffusion's names, now under ours."""
    if isinstance(config.get("model"), Mapping):  # the configuration of a training of latent diffusion
        params = config["model"].get("params") or {}
        config = {"image_size": (params.get("ddconfig") or {}).get("resolution", IMAGE_SIZE)}
    for key in config:
        if key not in _OURS:
            known = f"; known: {', '.join(_OURS)}"
            raise UserError(
                f"config: {key} is not known for latent diffusion's names{did_you_mean(key, _OURS) or known}"
            )
    sizes = {**sizes_of(state), "latent_channels": _latent_channels(state)}
    metadata: dict[str, Any] = {"source": "a KL autoencoder in latent diffusion's names"}
    scale: float | None = None
    if "kl16" in name.lower() and sizes == KL16:
        scale = KL16_SCALE
        metadata = {
            "title": "KL-16 of MAR (published weights)",
            "source": "LTH14/mar",
            "licence": "MIT",
            "training_data": "ImageNet-1k, training split, 256 × 256",
            "results": {"rFID, ImageNet validation, as its users report it (not measured here)": 0.53},
        }
    arguments = {
        **sizes,
        "image_size": config.get("image_size", IMAGE_SIZE),
        "norm_num_groups": GROUPS,
        "scaling_factor": config.get("scaling_factor", scale),
    }
    return arguments, metadata


def _of_diffusers(state: State, config: Mapping[str, Any], where: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and metadata of a diffusers folder; what its config.json does not say is as in diffusers' class."""
    if config.get("_class_name") != "AutoencoderKL":
        said = "no config.json beside it" if where is None else f"{where} says _class_name={config.get('_class_name')}"
        raise UserError(f"checkpoint has diffusers' names, but {said}; give the config.json of an AutoencoderKL")
    parameters = inspect.signature(AutoencoderKL.__init__).parameters
    given = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    given |= {key: value for key, value in config.items() if not key.startswith("_")}
    for key, value in _FIXED.items():
        if given[key] != value:
            raise UserError(f"config: {key}={given[key]} is not known to this version of smalti, which has {value}")
    read = {"down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "latent_channels",
            "norm_num_groups", "sample_size", "scaling_factor"}  # fmt: skip
    for key in config:
        if not key.startswith("_") and key not in read | _FIXED.keys() | _WITHOUT_EFFECT:
            raise UserError(f"config: {key}={config[key]} is not known to this version of smalti")
    levels = len(given["block_out_channels"])
    arguments = {
        "image_size": given["sample_size"],
        "latent_channels": given["latent_channels"],
        "block_out_channels": list(given["block_out_channels"]),
        "layers_per_block": given["layers_per_block"],
        "norm_num_groups": given["norm_num_groups"],
        "encoder_attention": _attended("down_block_types", given["down_block_types"], _DOWN),
        "decoder_attention": sorted(
            levels - 1 - place for place in _attended("up_block_types", given["up_block_types"], _UP)
        ),
        "scaling_factor": given["scaling_factor"],
    }
    return arguments, {"source": "diffusers' AutoencoderKL"}


def _attended(key: str, types: Any, known: Mapping[str, bool]) -> list[int]:
    """The places of blocks with attention."""
    for kind in types:
        if kind not in known:
            raise UserError(f"config: {key} has {kind}, which is not known; known: {', '.join(known)}")
    return [place for place, kind in enumerate(types) if known[kind]]


def _latent_channels(state: Mapping[str, Tensor]) -> int:
    if "post_quant_conv.weight" not in state:
        raise UserError("checkpoint is incomplete: post_quant_conv.weight is missing; download it again")
    return state["post_quant_conv.weight"].shape[1]


def _linear(state: State) -> State:
    """Attention's 1×1 convolutions as the linear maps that they are."""
    return {
        name: tensor[:, :, 0, 0] if ".attentions." in name and tensor.ndim == 4 else tensor
        for name, tensor in state.items()
    }


def _load(model: KLVAE, state: State) -> None:
    """Weights by our names into the network; raises UserError naming the first one that does not fit."""
    check_shapes(model.autoencoder.state_dict(), state)
    model.autoencoder.load_state_dict(state)
