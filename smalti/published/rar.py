"""Published RAR generators (bytedance/1d-tokenizer) as models of ours.

    convert("rar_b.bin")                          a state dict alone: the sizes are read off its keys and shapes
    convert("…/checkpoint-250000")                a folder of the published training script, with its config

What differs: names; the tables of positions and steps, which have 1,022 and 98 rows there that nothing reads. They are
dropped on loading; `to_published` writes zeros for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from smalti.errors import UserError
from smalti.generators.rar import RAR
from smalti.published.files import config_beside, read_config, read_weights, weights_file
from smalti.published.maskgit import HEADS, resolved, tokens_of
from smalti.published.names import check_shapes, count, renamed
from smalti.published.titok import IMAGENET

State = dict[str, Tensor]

# By width, as the published README and paper have them: name, settings of sampling, gFID, inception score.
_PUBLISHED: dict[int, tuple[str, dict[str, float], float, float]] = {
    768: ("rar_b", {"randomize_temperature": 1.0, "guidance_scale": 16.0, "guidance_scale_pow": 2.75}, 1.95, 290.5),
    1024: ("rar_l", {"randomize_temperature": 1.02, "guidance_scale": 15.5, "guidance_scale_pow": 2.5}, 1.70, 299.5),
    1280: ("rar_xl", {"randomize_temperature": 1.02, "guidance_scale": 6.9, "guidance_scale_pow": 1.5}, 1.50, 306.9),
    1408: ("rar_xxl", {"randomize_temperature": 1.02, "guidance_scale": 8.0, "guidance_scale_pow": 1.2}, 1.48, 326.0),
}
# Published tables, ours, and rows of theirs that nothing reads.
TABLES = {
    "pos_embed": ("position_embedding", 1022),
    "target_aware_pos_embed": ("target_embedding", 1022),
    "timesteps_embeddings": ("step_embedding", 98),
}
_NAMES = (  # ours, published; parts of names
    (r"^embedding\.", "embeddings."),
    (r"^position_embedding$", "pos_embed"),
    (r"^target_embedding$", "target_aware_pos_embed"),
    (r"^step_embedding$", "timesteps_embeddings"),
    (r"\.attn\.out\.", ".attn.proj."),
    (r"\.mlp\.fc\.", ".mlp.fc1."),
    (r"\.mlp\.proj\.", ".mlp.fc2."),
    (r"\.modulation\.", ".adaLN_modulation.1."),
    (r"^norm_modulation\.", "adaln_before_head.adaLN_modulation.1."),
    (r"^head\.", "lm_head."),
)
_DROPPED = ("attn_mask",)  # the causal mask, should a file have kept it


def published_name(name: str) -> str:
    """The published name of a parameter of ours."""
    return renamed(name, _NAMES)


def to_published(model: RAR, tensors: Mapping[str, Tensor] | None = None) -> State:
    """Tensors by our names (None: the weights) under published names and in published shapes."""
    tensors = model.state_dict() if tensors is None else tensors
    state = {published_name(name): tensors[name] for name in model.state_dict()}
    state["cls_token"] = state["cls_token"][None]
    for name, (_, unread) in TABLES.items():
        state[name] = F.pad(state[name], (0, 0, 0, unread))[None]
    return state


def load_published(model: RAR, state: Mapping[str, Tensor]) -> None:
    """Copy published weights into a model; raises UserError naming the first key that does not fit."""
    given = {name: tensor for name, tensor in state.items() if name not in _DROPPED}
    check_shapes(to_published(model), given)
    own = model.state_dict()
    for name, tensor in own.items():
        theirs = given[published_name(name)]
        if name in ("cls_token", *(ours for ours, _ in TABLES.values())):
            theirs = theirs[0, : len(tensor)]
        tensor.copy_(theirs)


def build_generator(config: Mapping[str, Any]) -> RAR:
    """The model of a published configuration (with the keys model.vq_model and model.generator), with fresh weights."""
    config = resolved(config)
    generator = config["model"]["generator"]
    side = math.isqrt(generator["image_seq_len"])
    return RAR(
        tokens=tokens_of(config, [side, side] if side**2 == generator["image_seq_len"] else None),
        num_classes=generator["condition_num_classes"],
        width=generator["hidden_size"],
        depth=generator["num_hidden_layers"],
        heads=generator["num_attention_heads"],
        mlp_width=generator["intermediate_size"],
        dropout=generator["dropout"],
        attention_dropout=generator["attn_drop"],
        label_dropout=generator.get("class_label_dropout", 0.1),
        anneal_start=generator.get("randomness_anneal_start", 125000),
        anneal_end=generator.get("randomness_anneal_end", 187500),
        sampling=sampling_of(generator),
        activation_checkpointing=generator.get("use_checkpoint", False),
    )


def sampling_of(generator: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of RARSampling. A scale of 0 switches guidance off there."""
    scale = generator.get("guidance_scale", 16.0)
    return {
        "temperature": generator.get("randomize_temperature", 1.0),
        "guidance": scale if scale != 0 else 1.0,
        "guidance_schedule": "power_cosine",
        "guidance_power": generator.get("guidance_scale_pow", 2.75),
    }


def infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The published configuration, read off names and shapes of published weights.

    Not to be seen there, hence as in the published models: 16 heads, dropout, the grid of a square image, and the
    sampling settings for such a width. Raises UserError for weights of something else.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if "target_aware_pos_embed" not in shapes or "blocks.0.mlp.fc1.weight" not in shapes:
        some = ", ".join(sorted(shapes)[:3])
        raise UserError(f"checkpoint is no RAR generator: its names are {some}, …; check the file")
    v, width = shapes["lm_head.weight"]
    generator = {
        "hidden_size": width,
        "num_hidden_layers": count(shapes, r"blocks\.(\d+)\."),
        "num_attention_heads": HEADS,
        "intermediate_size": shapes["blocks.0.mlp.fc1.weight"][0],
        "dropout": 0.1,
        "attn_drop": 0.1,
        "image_seq_len": shapes["pos_embed"][1] - 2 - TABLES["pos_embed"][1],
        "condition_num_classes": shapes["embeddings.weight"][0] - v - 2,
        **(_PUBLISHED[width][1] if width in _PUBLISHED else {}),
    }
    return {"model": {"vq_model": {"codebook_size": v, "token_size": 256}, "generator": generator}}


def convert(checkpoint: str | Path, config: str | Path | None = None) -> RAR:
    """A published checkpoint as a model of ours, in evaluation mode, with its origin and licence in `metadata`.

    checkpoint, config: as in smalti.published.maskgit.convert. Raises UserError with one line.
    """
    checkpoint = Path(checkpoint).expanduser()
    file = weights_file(checkpoint)
    state = read_weights(file)
    found = Path(config) if config is not None else config_beside(file)
    settings = infer(state) if found is None else read_config(found)
    try:
        model = build_generator(settings)
    except (KeyError, TypeError, ValueError) as error:
        missing = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{found or file} does not describe a RAR generator: {missing}; check config=") from error
    load_published(model, state)
    model.metadata = {"source": f"bytedance/1d-tokenizer, converted from {checkpoint.name}", "licence": "Apache-2.0"}
    width = model.arguments["width"]
    if width in _PUBLISHED and model.spec.length == 256:
        name, _, fid, score = _PUBLISHED[width]
        model.metadata |= {
            "title": f"{name} (published weights)",
            "training_data": f"{IMAGENET}, ten crops",
            "results": {"gFID, 50,000 images, as published (not measured here)": fid, "IS, as published": score},
        }
    return model.eval()
