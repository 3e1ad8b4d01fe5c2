"""FlexTok's released generators (EPFL-VILAB's flextok_ar, on apple/ml-l3m) as models of ours.

    convert("…/FlexAR-1B-C2I")       a folder of the hub: config.yaml and model.safetensors

What differs: names; the matrices of SwiGLU's first layer, and keys and values of cross-attention, are one each here.
What stands for no text is there what a frozen Flan-T5 makes of an empty one, which no file holds: give it to the model
by `set_null_text`. Published guidance has class 0 instead of none from the second token on (null_class="first").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.errors import UserError
from smalti.generators.flextok_ar import FlexTokAR
from smalti.layers.mlp import FeedForward, llama_hidden
from smalti.published.files import config_beside, read_config, read_weights, weights_file
from smalti.published.names import check_shapes
from smalti.tokenizers.spec import TokenSpec

State = dict[str, Tensor]

# Of the tokenizers that these generators were released for.
IMAGE_SIZE, CODE_DIM = 256, 6
_IMAGE, _TEXT = "models.ar_image_model", "models.text_encoder"
_NAMES = {  # ours, published
    "token_embedding.weight": f"{_IMAGE}.preprocessor.embedding.weight",
    "class_embedding.weight": f"{_IMAGE}.preprocessor.cls_embedding.weight",
    "positions": f"{_IMAGE}.preprocessor.positional_embedding",
    "text.fc.weight": f"{_TEXT}.mlp.fc1.weight",
    "text.proj.weight": f"{_TEXT}.mlp.fc2.weight",
    "norm.weight": f"{_IMAGE}.trunk.post_trunk_norm.weight",
    "head.weight": f"{_IMAGE}.head.linear.weight",
    "head.bias": f"{_IMAGE}.head.linear.bias",
}
_START = f"{_IMAGE}.preprocessor.sos_token_embed"
_KINDS = {"absolute": "learned", "sincos1d": "sincos", "sincos2d": "sincos"}


def to_published(model: FlexTokAR, tensors: Mapping[str, Tensor]) -> State:
    """Tensors by our names (a state dict, or gradients) under published ones, as views; without what stands for no
    text, which is not published."""
    return {theirs: part for name, tensor in tensors.items() for theirs, part in _places(model, name, tensor)}


def _places(model: FlexTokAR, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name in _NAMES:
        yield _NAMES[name], tensor
    elif name == "start":
        yield _START, tensor[None, None]
    elif name.startswith("blocks."):
        _, layer, part = name.split(".", 2)
        stem = f"{_IMAGE}.trunk.blocks.{layer}"
        text = model.text_dim is not None
        attention = "self_attn" if text else "attn"
        part = part.replace("attn.out.", "attn.proj.").replace("cross.out.", "cross.proj.")
        if part.startswith("attn."):
            yield f"{stem}.{attention}.{part.removeprefix('attn.')}", tensor
        elif part == "cross.kv.weight":
            for which, half in zip(("Wk", "Wv"), tensor.chunk(2), strict=True):
                yield f"{stem}.cross_attn.{which}.weight", half
        elif part.startswith("cross."):
            yield f"{stem}.cross_attn.{part.removeprefix('cross.').replace('q.', 'Wq.', 1)}", tensor
        elif part.startswith("mlp.fc.") and isinstance(model.blocks[int(layer)].mlp, FeedForward):
            for which, half in zip(("fc1", "fc3"), tensor.chunk(2), strict=True):
                yield f"{stem}.mlp.{which}.{part.removeprefix('mlp.fc.')}", half
        elif part.startswith("norm_3.") and not text:
            yield f"{stem}.norm_2.weight", tensor
        else:
            yield f"{stem}.{part.replace('mlp.fc.', 'mlp.fc1.').replace('mlp.proj.', 'mlp.fc2.')}", tensor


@torch.no_grad()
def load_published(model: FlexTokAR, state: Mapping[str, Tensor]) -> None:
    """Copy published weights into a model; raises UserError naming the first key that does not fit."""
    places = to_published(model, model.state_dict())
    given = dict(state)
    if "positions" not in model.state_dict():  # computed here, stored there
        table = given.pop(_NAMES["positions"], model.positions)
        if table.shape != model.positions.shape or not torch.allclose(table, model.positions, atol=1e-5):
            raise UserError(f"checkpoint does not fit its config: {_NAMES['positions']} holds other positions")
    check_shapes(places, given)
    for name, place in places.items():
        place.copy_(given[name])


def build_generator(
    config: Mapping[str, Any], *, text_dim: int | None = None, sampling: Mapping[str, Any] | None = None
) -> FlexTokAR:
    """The model of a published configuration, with fresh weights.

    text_dim: channels of text features, of which only the weights tell; None for a class-conditional model.
    sampling: fields of `FlexTokARSampling`.
    """
    meta = _meta_model(config)
    pre, trunk, head = meta["preprocessor"], meta["trunk"], meta["head"]
    attention = trunk.get("self_attn_target" if text_dim else "attn_target")
    if attention is None:
        raise UserError("config: its trunk has no self-attention that fits; text needs a TransformerDecoder")
    kind = _kind(trunk["ffn_target"])
    norms = [trunk.get("norm_layer"), *(t.get("qk_norm") for t in (attention, trunk.get("cross_attn_target") or {}))]
    for norm in norms:
        if norm is not None and (_kind(norm) != "LPLayerNorm" or norm.get("elementwise_bias", True)):
            raise UserError(f"config: norm {_kind(norm)} is not known; known: LPLayerNorm with elementwise_bias=false")
    if not attention.get("is_causal"):
        raise UserError("config: self-attention with is_causal=false does not generate")
    if pre["pos_embed_type"] not in _KINDS or kind not in ("SwiGLUFFN", "MLP"):
        raise UserError(f"config: pos_embed_type={pre['pos_embed_type']} or feed-forward {kind} is not known")
    width, grid, ratio = trunk["embed_dim"], list(pre["token_grid_size"]), trunk["ffn_target"].get("mlp_ratio", 4.0)
    flat = grid[1] == 1
    if kind == "SwiGLUFFN":
        hidden = llama_hidden(width, ratio, trunk["ffn_target"].get("multiple_of", 256))
    else:
        hidden = int(ratio * width)
    return FlexTokAR(
        tokens=TokenSpec(
            kind="discrete",
            length=math.prod(grid),
            dim=CODE_DIM,
            image_size=IMAGE_SIZE,
            codebook_size=pre["codebook_size"],
            grid=None if flat else (grid[0], grid[1]),
            prefix_decodable=flat,
        ).to_dict(),
        width=width,
        depth=trunk["num_blocks"],
        heads=attention["num_heads"],
        hidden=hidden,
        num_classes=None if text_dim else pre["num_classes"],
        text_dim=text_dim,
        label_dropout=0.0 if text_dim else pre["cond_dropout_prob"],
        null_length=0 if text_dim else None,
        positions=_KINDS[pre["pos_embed_type"]],
        gated_mlp=kind == "SwiGLUFFN",
        bias=bool(trunk["use_bias"]),
        head_bias=bool(head.get("use_bias", True)),
        qk_norm=attention.get("qk_norm") is not None,
        final_norm=bool(trunk["post_trunk_norm"]),
        sampling=None if sampling is None else dict(sampling),
    )


def sampling_from_published(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `FlexTokARSampling` from the arguments of the published `generate`; cfg_factor null is no guidance."""
    greedy = not arguments.get("sample", True)
    return {
        "temperature": 0.0 if greedy else arguments.get("temperature", 1.0),
        "top_k": arguments.get("top_k") or None,
        "top_p": arguments.get("top_p") or 1.0,
        "guidance": 1.0 if arguments.get("cfg_factor") is None else arguments["cfg_factor"],
    }


def convert(checkpoint: str | Path, config: str | Path | None = None) -> FlexTokAR:
    """A published folder or file as a model of ours, in evaluation mode, with its origin in `metadata`.

    config: the published config.yaml; None: the one beside the weights. Raises UserError with one line.
    """
    path = Path(checkpoint).expanduser()
    file = weights_file(path)
    found = Path(config) if config is not None else config_beside(file)
    if found is None:
        raise UserError(f"checkpoint={path} has no config.yaml beside it; give config=FILE")
    state = read_weights(file)
    text = state.get(f"{_TEXT}.mlp.fc1.weight")
    settings = {"guidance": 1.5} if text is None else {"guidance": 3.0}
    try:
        model = build_generator(read_config(found), text_dim=None if text is None else text.shape[1], sampling=settings)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"config={found} is not that of a FlexTok generator ({error}); check the file") from error
    # The frozen text encoder, where the file holds it, is the caller's: features come in.
    known = {name: t for name, t in state.items() if not name.startswith(_TEXT) or name.startswith(f"{_TEXT}.mlp.")}
    load_published(model, known)
    model.metadata = {
        "title": f"{path.stem} (published weights)",
        "source": f"FlexTok's generators (EPFL-VILAB, search-over-tokens), converted from {path.name}",
        "training_data": "ImageNet-1k" if text is None else "captioned images (DFN)",
    }
    return model.eval()


def _meta_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section with preprocessor, trunk and head, wherever a configuration keeps it."""
    if all(isinstance(config.get(name), Mapping) for name in ("preprocessor", "trunk", "head")):
        return config
    for value in config.values():
        if isinstance(value, Mapping):
            try:
                return _meta_model(value)
            except KeyError:
                continue
    raise KeyError("no section with preprocessor, trunk and head")


def _kind(section: Mapping[str, Any]) -> str:
    return str(section.get("_target_", "")).rpartition(".")[2]
