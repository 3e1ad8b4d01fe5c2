"""Published MAR generators (LTH14/mar) as models of ours.

    convert("…/checkpoint-last.pth")                    the averaged weights, as the published numbers have them
    convert("…/checkpoint-last.pth", weights="model")   the live ones

The released files hold weights alone, `model` and `model_ema`: sizes are read off names and shapes, the number of heads
is that of the published models. Files of the training script also hold its settings, of which only the values are read.
What differs: names; the class table's last row, which stands for no class, is `fake_latent` there.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.generators.heads.diffusion import DiffusionHead
from smalti.generators.mar import MAR
from smalti.published import mar_head
from smalti.published.files import read_config, read_content, tensors_of
from smalti.published.names import check_shapes, count, renamed
from smalti.published.titok import IMAGENET

State = dict[str, Tensor]

HEADS = {768: 12, 1024: 16, 1280: 16}  # by width, of the published models
# FID and IS on 50,000 images as the published README states them, by width; guidance and diffusion steps they take.
_RESULTS = {768: ("MAR-B", 2.31, 281.7, 2.9), 1024: ("MAR-L", 1.78, 296.0, 3.0), 1280: ("MAR-H", 1.55, 303.7, 3.2)}
_SAMPLING = {"iterations": 256, "steps": 100, "temperature": 1.0, "guidance_schedule": "linear"}

_BODY = (  # ours, published; parts of names
    (r"^embed\.", "z_proj."),
    (r"^(encoder|decoder)_positions$", r"\1_pos_embed_learned"),
    (r"^output_positions$", "diffusion_pos_embed_learned"),
    (r"^input_norm\.", "z_proj_ln."),
    (r"^(encoder|decoder)\.", r"\1_blocks."),
    (r"\.attn\.out\.", ".attn.proj."),
    (r"\.mlp\.fc\.", ".mlp.fc1."),
    (r"\.mlp\.proj\.", ".mlp.fc2."),
)


def body_names(body: nn.Module) -> dict[str, str]:
    """{our name: published name} of a masked autoencoder's weights."""
    return {ours: renamed(ours, _BODY) for ours in body.state_dict()}


def body_to_published(theirs: str, tensor: Tensor) -> Tensor:
    """A weight of ours in its published shape: tables and the mask token have leading axes of 1 there."""
    leading = {"mask_token": 1}.get(theirs, 1 if theirs.endswith("_pos_embed_learned") else 0)
    return tensor[(None,) * leading]


def published_names(model: MAR) -> dict[str, tuple[str, ...]]:
    """{our name: published name}; the class table is two published tensors, classes and no class."""
    assert isinstance(model.head, DiffusionHead)
    body = {f"body.{ours}": (theirs,) for ours, theirs in body_names(model.body).items()}
    head = {f"head.{ours}": (f"diffloss.{theirs}",) for ours, theirs in mar_head.published_names(model.head).items()}
    return {"class_embedding.weight": ("class_emb.weight", "fake_latent"), **body, **head}


def to_published(model: MAR, tensors: Mapping[str, Tensor] | None = None) -> State:
    """Tensors by our names (None: the weights) under published names and in published shapes."""
    tensors = model.state_dict() if tensors is None else tensors
    state: State = {}
    for ours, theirs in published_names(model).items():
        if len(theirs) == 2:
            state |= dict(zip(theirs, tensors[ours].split((len(tensors[ours]) - 1, 1)), strict=True))
        else:
            state[theirs[0]] = body_to_published(theirs[0], tensors[ours])
    return state


@torch.no_grad()
def load_published(model: MAR, state: Mapping[str, Tensor]) -> None:
    """Copy published weights into a model; raises UserError naming the first key that does not fit."""
    own = to_published(model)  # views of our weights
    check_shapes(own, state)
    for name, tensor in state.items():
        own[name].copy_(tensor)


def build_generator(config: Mapping[str, Any], sampling: Mapping[str, Any] | None = None) -> MAR:
    """The model of a published configuration, with fresh weights.

    config: the published constructor's keyword arguments; those left out are as the published training sets them.
    sampling: fields of MARSampling, over what the configuration says of it.
    """
    p, stride, width = config.get("patch_size", 1), config.get("vae_stride", 16), config["encoder_embed_dim"]
    grid = config.get("img_size", 256) // stride
    return MAR(
        tokens={
            "kind": "continuous",
            "length": grid * grid,
            "dim": config.get("vae_embed_dim", 16),
            "image_size": config.get("img_size", 256),
            "grid": [grid, grid],
        },
        num_classes=config.get("class_num", 1000),
        width=width,
        depth=config["encoder_depth"],
        heads=config["encoder_num_heads"],
        decoder_width=_unless_equal(config, "embed_dim"),
        decoder_depth=_unless_equal(config, "depth"),
        decoder_heads=_unless_equal(config, "num_heads"),
        mlp_ratio=config.get("mlp_ratio", 4.0),
        norm_eps=config.get("norm_eps", 1e-6),
        buffer=config.get("buffer_size", 64),
        dropout=config.get("proj_dropout", 0.1),
        attention_dropout=config.get("attn_dropout", 0.1),
        patch_size=p,
        mask_ratio_min=config.get("mask_ratio_min", 0.7),
        label_dropout=config.get("label_drop_prob", 0.1),
        head_width=config["diffloss_w"],
        head_depth=config["diffloss_d"],
        loss_repeats=config.get("diffusion_batch_mul", 4),
        sampling={**mar_head.steps_of(config.get("num_sampling_steps", "100")), **(sampling or {})},
    )


def _unless_equal(config: Mapping[str, Any], what: str) -> int | None:
    """A size of the decoder, None where it is the encoder's."""
    encoder, decoder = config[f"encoder_{what}"], config[f"decoder_{what}"]
    return None if decoder == encoder else decoder


def sampling_of(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of MARSampling of the published sampler's arguments."""
    return {
        "iterations": sample["num_iter"],
        "guidance": sample["cfg"],
        "guidance_schedule": sample["cfg_schedule"],
        "temperature": sample["temperature"],
    }


def infer(state: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The published configuration, read off names and shapes of published weights.

    settings: of the training script, where they are known: patches and dropouts are not to be seen in weights, hence
    otherwise as in the published models, and so is the number of heads. Raises UserError for weights of something else,
    and of another width.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if "fake_latent" not in shapes or "diffloss.net.input_proj.weight" not in shapes:
        some = ", ".join(sorted(shapes)[:3])
        raise UserError(f"checkpoint is no MAR generator: its names are {some}, …; check the file")
    settings = settings or {}
    p = settings.get("patch_size", 1)
    n, out = shapes["diffusion_pos_embed_learned"][1:]
    rows, width = shapes["encoder_pos_embed_learned"][1:]
    config = {"patch_size": p, "vae_stride": settings.get("vae_stride", 16), "buffer_size": rows - n}
    config["img_size"] = math.isqrt(n) * p * config["vae_stride"]
    config["class_num"] = shapes["class_emb.weight"][0]
    config["vae_embed_dim"] = shapes["z_proj.weight"][1] // p**2
    for part, size in (("encoder", width), ("decoder", out)):
        depth = count(shapes, rf"{part}_blocks\.(\d+)\.")
        config |= {f"{part}_embed_dim": size, f"{part}_depth": depth, f"{part}_num_heads": heads_of(size)}
    config["diffloss_w"] = shapes["diffloss.net.input_proj.weight"][0]
    config["diffloss_d"] = count(shapes, r"diffloss\.net\.res_blocks\.(\d+)\.")
    trained = ("mask_ratio_min", "label_drop_prob", "attn_dropout", "proj_dropout", "diffusion_batch_mul")
    return config | {name: settings[name] for name in (*trained, "num_sampling_steps") if name in settings}


def heads_of(width: int) -> int:
    """Of a published body. Raises UserError for a width that none has."""
    if width not in HEADS:
        known = ", ".join(map(str, HEADS))
        raise UserError(
            f"checkpoint has a width of {width}, whose number of heads is not known (known widths: {known}); give "
            "config=FILE with encoder_num_heads and the other arguments of the published constructor"
        )
    return HEADS[width]


def read_checkpoint(checkpoint: str | Path, weights: str) -> tuple[Path, State, dict[str, Any]]:
    """The file (also of the folder of a checkpoint-last.pth), its weights of that name, and the settings in it, if any.

    Raises UserError for what is not there.
    """
    file = Path(checkpoint).expanduser()
    file = file / "checkpoint-last.pth" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"checkpoint={file} does not exist; give a published checkpoint-last.pth, or its folder")
    content = read_content(file)
    if weights not in content and any(name in content for name in ("model", "model_ema")):
        raise UserError(f"checkpoint={file} holds no {weights}; it has {', '.join(sorted(content))}")
    args = content.get("args")
    return file, tensors_of(content, file, (weights,)), vars(args) if isinstance(args, argparse.Namespace) else {}


def convert(checkpoint: str | Path, config: str | Path | None = None, *, weights: str = "model_ema") -> MAR:
    """A published checkpoint as a model of ours, in evaluation mode, with its origin and licence in `metadata`.

    checkpoint: a file, or the folder of a checkpoint-last.pth (tensors and plain settings only, nothing pickled is
    run). config: a .json or .yaml of the published constructor's arguments; None: read off the weights. weights: which
    of those in the file, "model_ema" or "model". Raises UserError with one line.
    """
    file, state, said = read_checkpoint(checkpoint, weights)
    settings = infer(state, said) if config is None else read_config(Path(config))
    n = state["diffusion_pos_embed_learned"].shape[1] if "diffusion_pos_embed_learned" in state else 1
    name, fid, score, guidance = _RESULTS.get(settings.get("encoder_embed_dim", 0), ("MAR", None, None, 2.9))
    try:
        model = build_generator(settings, {**_SAMPLING, "iterations": min(n, 256), "guidance": guidance})
    except (KeyError, TypeError, ValueError) as error:
        missing = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{config or file} does not describe a MAR generator: {missing}; check config=") from error
    load_published(model, state)
    model.metadata = {"source": f"LTH14/mar, converted from {file.name}", "licence": "MIT"}
    sizes = (model.arguments["head_depth"], model.arguments["head_width"], n)
    if sizes in {(6, 1024, 256), (8, 1280, 256), (12, 1536, 256)} and weights == "model_ema" and fid is not None:
        model.metadata |= {
            "title": f"{name} (published weights)",
            "training_data": IMAGENET,
            "results": {"FID, 50,000 images, as published (not measured here)": fid, "IS, as published": score},
        }
    return model.eval()
