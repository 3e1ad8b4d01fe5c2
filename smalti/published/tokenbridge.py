"""Published TokenBridge generators (YuqingWang1029/TokenBridge) as models of ours.

    convert("…/checkpoint-last.pth")        the averaged weights, as the published numbers have them

The released files hold weights, `model` and `model_ema`, and what the training needs: sizes are read off names and
shapes, the number of heads is that of the published models. What differs: names; the order of channels, which is
hard-coded there and which ours leave to the tokenizer, so that the encoder's columns change places; the class table's
last row, which is `fake_latent` there; embeddings of codes, one table of ours. Buffers of the published `model` (levels
and boundaries) are compared with ours; `model_ema` has none. The published sampler begins the head's sequence otherwise
than training does, and so does a converted model (`shifted_start`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.errors import UserError
from smalti.generators.tokenbridge import TokenBridge
from smalti.published.files import read_config
from smalti.published.mar import body_names, body_to_published, heads_of, read_checkpoint
from smalti.published.names import check_shapes, count, renamed
from smalti.published.titok import IMAGENET
from smalti.tokenizers.quantizers.bridge import (
    KL16_ORDER,
    BridgeQuantizer,
    gaussian_boundaries,
    gaussian_levels,
)
from smalti.tokenizers.spec import TokenSpec
from smalti.tokenizers.tokenbridge import bridged_spec

State = dict[str, Tensor]

HEAD_HEADS = 8  # of all published models; weights do not tell
# FID and IS on 50,000 images as the published README states them, by width; guidance and temperature they take.
_RESULTS = {1024: ("TokenBridge-L", 1.76, 294.8, 3.1, 0.96), 1280: ("TokenBridge-H", 1.55, 313.3, 3.45, 0.91)}

_BUFFERS = ("reconstruction_values", "boundaries", "channel_mask")  # of `model`, computed from the configuration
_HEAD = (  # ours, published; parts of names
    (r"^condition\.", "condition_proj."),
    (r"^positions$", "channel_embed"),
    (r"^steps$", "timesteps_embeddings"),
    (r"^blocks\.", "channel_blocks."),
    (r"^norm\.", "channel_norm."),
    (r"^modulation\.", "channel_final.adaLN_modulation.1."),
    (r"^logits\.", "channel_heads."),
    (r"\.modulation\.", ".adaLN_modulation.1."),
    (r"\.attn\.out\.", ".attn.proj."),
    (r"\.mlp\.fc\.", ".mlp.fc1."),
    (r"\.mlp\.proj\.", ".mlp.fc2."),
)


def published_names(model: TokenBridge) -> dict[str, tuple[str, ...]]:
    """{our name: published name}; or several names, whose tensors are stacked in one of ours."""
    names: dict[str, tuple[str, ...]] = {"class_embedding.weight": ("class_emb.weight", "fake_latent")}
    for ours, theirs in body_names(model.body).items():
        names[f"body.{ours}"] = ("output_pos_embed" if ours == "output_positions" else theirs,)
    for ours in model.head.state_dict():
        tables = tuple(f"token_embeddings.{code}.weight" for code in range(model.head.codes - 1))
        names[f"head.{ours}"] = tables if ours == "embedding.weight" else (renamed(ours, _HEAD),)
    return names


def to_published(model: TokenBridge, tensors: Mapping[str, Tensor] | None = None) -> State:
    """Tensors by our names (None: the weights) under published names and in published shapes; without buffers."""
    tensors = model.state_dict() if tensors is None else tensors
    state: State = {}
    for ours, theirs in published_names(model).items():
        tensor, name = tensors[ours], theirs[0]
        if name == "class_emb.weight":
            state |= dict(zip(theirs, tensor.split((len(tensor) - 1, 1)), strict=True))
        elif name.startswith("token_embeddings."):
            state |= dict(zip(theirs, tensor.chunk(len(theirs)), strict=True))
        elif name == "z_proj.weight":
            state[name] = tensor[:, torch.tensor(KL16_ORDER).argsort()]
        elif name in ("channel_embed", "timesteps_embeddings", "output_pos_embed"):
            state[name] = tensor[None]
        else:
            state[name] = body_to_published(name, tensor)
    return state


@torch.no_grad()
def load_published(model: TokenBridge, state: Mapping[str, Tensor]) -> None:
    """Copy published weights into a model; raises UserError naming the first key that does not fit."""
    state = {name: tensor for name, tensor in state.items() if name not in _BUFFERS}
    own = to_published(model)  # views of our weights, but for the encoder's columns
    check_shapes(own, state)
    for name, tensor in state.items():
        own[name].copy_(tensor)
    model.body.embed.weight.copy_(state["z_proj.weight"][:, list(KL16_ORDER)])


def quantizer_of(config: Mapping[str, Any]) -> BridgeQuantizer:
    """The quantizer of a published configuration, whose channels are ordered as published."""
    channels, v = config.get("vae_embed_dim", 16), config.get("quant_levels", 64)
    if channels != len(KL16_ORDER):
        raise UserError(f"config: vae_embed_dim={channels}, but published TokenBridge has an order of 16 channels only")
    if v != 2 ** (bits := int(v).bit_length() - 1):
        raise UserError(f"config: quant_levels={v} is not a power of two")
    low, high, std = (config.get(key, value) for key, value in (("quant_min", -5), ("quant_max", 5), ("std_range", 3)))
    return BridgeQuantizer(dim=channels, bits=bits, low=low, high=high, std_range=std, order=KL16_ORDER)


def tokens_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The TokenSpec of the tokens that a published generator models."""
    size, p = config.get("img_size", 256), config.get("patch_size", 1)
    if p != 1:
        raise UserError(f"config: patch_size={p} is not known; known: 1")
    grid = size // config.get("vae_stride", 16)
    continuous = TokenSpec(kind="continuous", length=grid * grid, dim=16, image_size=size, grid=(grid, grid))
    with torch.device("cpu"):  # levels are numbers, also where the model is built on the meta device
        return bridged_spec(continuous, quantizer_of(config)).to_dict()


def build_generator(config: Mapping[str, Any], sampling: Mapping[str, Any] | None = None) -> TokenBridge:
    """The model of a published configuration, with fresh weights.

    config: the published constructor's keyword arguments; those left out are as the published training sets them.
    sampling: fields of TokenBridgeSampling; its start is the published one.
    """
    return TokenBridge(
        tokens=tokens_of(config),
        num_classes=config.get("class_num", 1000),
        width=config["encoder_embed_dim"],
        depth=config["encoder_depth"],
        heads=config["encoder_num_heads"],
        decoder_width=config["decoder_embed_dim"],
        decoder_depth=config["decoder_depth"],
        decoder_heads=config["decoder_num_heads"],
        mlp_ratio=config.get("mlp_ratio", 4.0),
        norm_eps=config.get("norm_eps", 1e-6),
        buffer=config.get("buffer_size", 64),
        dropout=config.get("proj_dropout", 0.1),
        attention_dropout=config.get("attn_dropout", 0.1),
        mask_ratio_min=config.get("mask_ratio_min", 0.7),
        label_dropout=config.get("label_drop_prob", 0.1),
        head_width=config["channel_embed_dim"],
        head_depth=config["channel_depth"],
        head_heads=config["channel_heads"],
        sampling={"shifted_start": True, **(sampling or {})},
    )


def sampling_of(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of TokenBridgeSampling of the published sampler's arguments."""
    return {
        "iterations": sample["num_iter"],
        "guidance": sample["cfg"],
        "guidance_schedule": "linear" if sample["cfg_schedule"] == "linear" else "constant",
        "temperature": sample["temperature"],
        "shifted_start": True,
    }


def infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The published configuration, read off names and shapes of published weights.

    Not to be seen there, hence as in the published models: numbers of heads, dropouts, range of the levels. Raises
    UserError for weights of something else, and of another width.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if "fake_latent" not in shapes or "timesteps_embeddings" not in shapes:
        some = ", ".join(sorted(shapes)[:3])
        raise UserError(f"checkpoint is no TokenBridge generator: its names are {some}, …; check the file")
    n, out = shapes["output_pos_embed"][1:]
    rows, width = shapes["encoder_pos_embed_learned"][1:]
    config = {"img_size": 16 * math.isqrt(n), "vae_stride": 16, "buffer_size": rows - n}
    config["class_num"] = shapes["class_emb.weight"][0]
    config["vae_embed_dim"] = shapes["z_proj.weight"][1]
    for part, size in (("encoder", width), ("decoder", out)):
        depth = count(shapes, rf"{part}_blocks\.(\d+)\.")
        config |= {f"{part}_embed_dim": size, f"{part}_depth": depth, f"{part}_num_heads": heads_of(size)}
    config["channel_embed_dim"] = shapes["condition_proj.weight"][0]
    config["channel_depth"] = count(shapes, r"channel_blocks\.(\d+)\.")
    config["channel_heads"] = HEAD_HEADS
    config["quant_levels"] = shapes["channel_heads.0.weight"][0]
    return config


def convert(checkpoint: str | Path, config: str | Path | None = None, *, weights: str = "model_ema") -> TokenBridge:
    """A published checkpoint as a model of ours, in evaluation mode, with its origin and licence in `metadata`.

    checkpoint: a file, or the folder of a checkpoint-last.pth (tensors and plain settings only, nothing pickled is
    run). config: a .json or .yaml of the published constructor's arguments; None: read off the weights. weights: which
    of those in the file, "model_ema" or "model". Raises UserError with one line.
    """
    file, state, _ = read_checkpoint(checkpoint, weights)
    settings = infer(state) if config is None else read_config(Path(config))
    name, fid, score, guidance, temperature = _RESULTS.get(
        settings.get("encoder_embed_dim", 0), ("TokenBridge", None, None, 3.1, 0.96)
    )
    try:
        sampling = {"guidance": guidance, "guidance_schedule": "linear", "temperature": temperature}
        model = build_generator(settings, sampling)
    except (KeyError, TypeError, ValueError) as error:
        missing = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{config or file} does not describe a TokenBridge generator: {missing}; check config="
        ) from error
    check_buffers(state, settings, file)
    load_published(model, state)
    model.metadata = {"source": f"YuqingWang1029/TokenBridge, converted from {file.name}", "licence": "MIT"}
    if fid is not None and model.spec.length == 256 and weights == "model_ema":
        model.metadata |= {
            "title": f"{name} (published weights)",
            "training_data": IMAGENET,
            "results": {"FID, 50,000 images, as published (not measured here)": fid, "IS, as published": score},
        }
    return model.eval()


def check_buffers(state: Mapping[str, Tensor], config: Mapping[str, Any], file: Path) -> None:
    """Raises UserError where weights come with other levels than the configuration's."""
    quantizer = quantizer_of(config)
    ours = {
        "reconstruction_values": gaussian_levels(quantizer.bits, quantizer.std_range),
        "boundaries": gaussian_boundaries(quantizer.bits, quantizer.std_range),
    }
    for name, tensor in ours.items():
        theirs = state.get(name)
        if theirs is not None and (theirs.shape != tensor.shape or float((theirs - tensor).abs().max()) > 1e-4):
            raise UserError(
                f"{file}: {name} are not those of std_range={quantizer.std_range:g}; give config=FILE with it"
            )
