"""Published MaskGIT generators of TiTok (bytedance/1d-tokenizer: `ImageBert`, `UViTBert`) as models of ours.

    convert("generator_titok_l32.bin")            a state dict alone: the sizes are read off its keys and shapes
    convert("…/generator_titok_l32_imagenet")     a hub folder: config.json and model.safetensors
    convert("…/checkpoint-50000")                 a folder of the published training script; its EMA weights are taken

What differs: names; queries, keys and values of ImageBert, which are one matrix here; guidance scales, which are ours
minus 1 there unless they follow the power-cosine schedule. The published sampling script anneals the softmax
temperature whatever the configuration says, and so does a converted model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from smalti.errors import UserError
from smalti.generators.maskgit import MaskGIT
from smalti.published.files import config_beside, read_config, read_weights, weights_file
from smalti.published.names import check_shapes, count, renamed
from smalti.published.titok import IMAGENET

State = dict[str, Tensor]

# gFID on 50,000 images as the published README states it, by body, tokens and width.
_GFID = {("bert", 32, 768): 2.77, ("bert", 64, 768): 2.48, ("uvit", 128, 1024): 1.97}
_TITLES = {32: "generator_titok_l32", 64: "generator_titok_b64", 128: "generator_titok_s128"}
# The published settings of sampling, which a state dict alone does not tell.
_SAMPLING = {
    32: {"num_steps": 8, "randomize_temperature": 9.5, "guidance_scale": 4.5, "guidance_decay": "linear"},
    64: {"num_steps": 8, "randomize_temperature": 11.0, "guidance_scale": 3.0, "guidance_decay": "linear"},
    128: {"num_steps": 64, "randomize_temperature": 2.8, "guidance_scale": 6.9, "guidance_decay": "power-cosine"},
}
HEADS = 16  # of all published models; weights do not tell

_BERT = (  # ours, published; parts of names
    (r"^body\.embedding\.", "model.embeddings.word_embeddings."),
    (r"^body\.position_embedding$", "model.embeddings.position_embeddings.weight"),
    (r"^body\.type_embedding$", "model.embeddings.token_type_embeddings.weight"),
    (r"^body\.norm\.", "model.embeddings.LayerNorm."),
    (r"^body\.blocks\.", "model.encoder.layer."),
    (r"\.attn\.out\.", ".attention.output.dense."),
    (r"\.norm1\.", ".attention.output.LayerNorm."),
    (r"\.mlp\.fc\.", ".intermediate.dense."),
    (r"\.mlp\.proj\.", ".output.dense."),
    (r"\.norm2\.", ".output.LayerNorm."),
    (r"^head\.", "model.lm_head."),
)
_UVIT = (
    (r"^body\.embedding\.", "embeddings."),
    (r"^body\.position_embedding$", "pos_embed"),
    (r"^body\.", ""),
    (r"\.attn\.out\.", ".attn.proj."),
    (r"\.mlp\.fc\.", ".mlp.fc1."),
    (r"\.mlp\.proj\.", ".mlp.fc2."),
    (r"\.skip\.", ".skip_linear."),
    (r"^head\.", "lm_head."),
)
_DROPPED = ("model.embeddings.position_ids",)  # a buffer that older versions of transformers wrote


def published_names(model: MaskGIT) -> dict[str, tuple[str, ...]]:
    """{our name: published name}; or three names, whose tensors are stacked in one of ours."""
    bert = model.arguments["body"] == "bert"
    names = {}
    for ours in model.state_dict():
        theirs = renamed(ours, _BERT if bert else _UVIT)
        parts = ("query", "key", "value") if bert and ".attn.qkv." in theirs else ("",)
        names[ours] = tuple(
            theirs.replace(".attn.qkv.", f".attention.self.{part}.") if part else theirs for part in parts
        )
    return names


def to_published(model: MaskGIT, tensors: Mapping[str, Tensor] | None = None) -> State:
    """Tensors by our names (None: the weights) under published names and in published shapes."""
    tensors = model.state_dict() if tensors is None else tensors
    state: State = {}
    for ours, theirs in published_names(model).items():
        state |= dict(zip(theirs, tensors[ours].chunk(len(theirs)), strict=True))
    if "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"][None]
    return state


def load_published(model: MaskGIT, state: Mapping[str, Tensor]) -> None:
    """Copy published weights into a model; raises UserError naming the first key that does not fit."""
    state = {name: tensor for name, tensor in state.items() if name not in _DROPPED}
    check_shapes(to_published(model), state)
    own = to_published(model)  # views of our weights
    for name, tensor in state.items():
        own[name].copy_(tensor)


def build_generator(config: Mapping[str, Any]) -> MaskGIT:
    """The model of a published configuration, with fresh weights.

    config: with the keys model.vq_model and model.generator; losses, dataset.preprocessing.crop_size where they differ
    from the published 0.1, 0.1 and 256.
    """
    config = resolved(config)
    generator, losses = config["model"]["generator"], config.get("losses", {})
    bodies = {"ViT": "bert", "UViT": "uvit"}
    if generator["model_type"] not in bodies:
        raise UserError(f"model.generator.model_type={generator['model_type']} is not known; known: ViT, UViT")
    body = bodies[generator["model_type"]]
    dropout = {"dropout": generator["dropout"], "attention_dropout": generator["attn_drop"]}
    return MaskGIT(
        tokens=tokens_of(config),
        num_classes=generator["condition_num_classes"],
        body=body,
        width=generator["hidden_size"],
        depth=generator["num_hidden_layers"],
        heads=generator["num_attention_heads"],
        mlp_width=generator["intermediate_size"],
        label_dropout=generator.get("class_label_dropout", 0.1),
        label_smoothing=losses.get("label_smoothing", 0.1),
        unmasked_weight=losses.get("loss_weight_unmasked_token", 0.1),
        sampling=sampling_of(generator),
        **(dropout if body == "bert" else {}),  # the published U-ViT is built without
    )


def sampling_of(generator: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of MaskGITSampling; what the configuration does not say is as the published function has it."""
    decay, scale = generator.get("guidance_decay", "constant"), generator.get("guidance_scale", 3.0)
    return {
        "steps": generator.get("num_steps", 8),
        "temperature": generator.get("randomize_temperature", 4.5),
        "softmax_annealing": generator.get("softmax_temperature_annealing", True),
        "guidance": scale if decay == "power-cosine" else scale + 1,
        "guidance_schedule": decay.replace("-", "_"),
        "guidance_power": generator.get("guidance_scale_pow", 3.0),
    }


def tokens_of(config: Mapping[str, Any], grid: list[int] | None = None) -> dict[str, Any]:
    """The TokenSpec of the tokens that a published generator models."""
    model = config["model"]
    return {
        "kind": "discrete",
        "length": model["generator"]["image_seq_len"],
        "codebook_size": model["vq_model"]["codebook_size"],
        "dim": model["vq_model"].get("token_size", 12),
        "image_size": config.get("dataset", {}).get("preprocessing", {}).get("crop_size", 256),
        "grid": grid,
    }


def resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, with references within it replaced by what they refer to."""
    values = OmegaConf.to_container(OmegaConf.create(dict(config)), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The published configuration, read off names and shapes of published weights.

    Not to be seen there, hence as in the published models: 16 heads, dropout, and the sampling settings for so many
    tokens. Raises UserError for weights of something else.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if "model.embeddings.word_embeddings.weight" in shapes and "model.lm_head.weight" in shapes:
        kind, prefix = "ViT", "model."
        rows = shapes["model.embeddings.word_embeddings.weight"][0]
        length = shapes["model.embeddings.position_embeddings.weight"][0] - 1
        depth = count(shapes, r"model\.encoder\.layer\.(\d+)\.")
        mlp_width = shapes["model.encoder.layer.0.intermediate.dense.weight"][0]
    elif "mid_block.attn.qkv.weight" in shapes and "pos_embed" in shapes:
        kind, prefix = "UViT", ""
        rows, length = shapes["embeddings.weight"][0], shapes["pos_embed"][1] - 1
        depth = 2 * count(shapes, r"in_blocks\.(\d+)\.")
        mlp_width = shapes["mid_block.mlp.fc1.weight"][0]
    else:
        some = ", ".join(sorted(shapes)[:3])
        raise UserError(f"checkpoint is no MaskGIT generator of TiTok: its names are {some}, …; check the file")
    v, width = shapes[f"{prefix}lm_head.weight"]
    generator = {
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": HEADS,
        "intermediate_size": mlp_width,
        "dropout": 0.1,
        "attn_drop": 0.1,
        "image_seq_len": length,
        "condition_num_classes": rows - v - 2,
        **_SAMPLING.get(length, {}),
    }
    return {"model": {"vq_model": {"codebook_size": v}, "generator": generator}}


def convert(checkpoint: str | Path, config: str | Path | None = None) -> MaskGIT:
    """A published checkpoint as a model of ours, in evaluation mode, with its origin and licence in `metadata`.

    checkpoint: a .safetensors, .bin, .pt or .pth file (tensors only, nothing pickled is run), a hub folder, or a folder
    of the published training. config: the published .json or .yaml; None: the one beside the file, or else read off
    the weights. Raises UserError with one line.
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
        raise UserError(f"{found or file} does not describe a MaskGIT generator: {missing}; check config=") from error
    load_published(model, state)
    body, n, width = model.arguments["body"], model.spec.length, model.arguments["width"]
    model.metadata = {"source": f"bytedance/1d-tokenizer, converted from {checkpoint.name}", "licence": "Apache-2.0"}
    if (body, n, width) in _GFID:
        model.metadata |= {
            "title": f"{_TITLES[n]} (published weights)",
            "training_data": IMAGENET,
            "results": {"gFID, 50,000 images, as published (not measured here)": _GFID[body, n, width]},
        }
    return model.eval()
