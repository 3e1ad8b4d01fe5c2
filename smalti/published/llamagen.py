"""LlamaGen's checkpoints (FoundationVision/LlamaGen, arXiv:2406.06525) as models of ours: its GPTs here, its VQ-GANs in
llamagen_vq.py, told apart by their keys.

    convert("c2i_B_256.pt")        a released file: sizes are read off keys and shapes, the image size off the name
    convert("t2i_XL_stage1_256.pt")
    convert("…/0300000.pt")        a checkpoint of the published training script, whose arguments it holds
    convert("…/0300000")           a folder of its FSDP script: consolidated.pth

What differs: names; w1 and w3 of SwiGLU are one matrix here. Published weights depend on rotary rows of zeros for the
condition (condition_rope="zero") and on a random caption that stands for none (null_text="fixed").
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.errors import UserError
from smalti.generators.gpt import GPT
from smalti.layers.mlp import llama_hidden
from smalti.model import Model
from smalti.published import llamagen_vq
from smalti.published.files import config_beside, read_config, read_content, tensors_of, weights_file
from smalti.published.names import check_shapes, count
from smalti.tokenizers.spec import TokenSpec

State = dict[str, Tensor]

# Published sizes by name: layers, heads, width; the last three were not released.
SIZES: dict[str, dict[str, int]] = {
    name: {"n_layer": depth, "n_head": heads, "dim": width}
    for name, depth, heads, width in (
        ("GPT-B", 12, 12, 768),
        ("GPT-L", 24, 16, 1024),
        ("GPT-XL", 36, 20, 1280),
        ("GPT-XXL", 48, 24, 1536),
        ("GPT-3B", 24, 32, 3200),
        ("GPT-1B", 22, 32, 2048),
        ("GPT-XXXL", 48, 40, 2560),
        ("GPT-7B", 32, 32, 4096),
    )
}
DEFAULTS: dict[str, Any] = {  # of the published ModelArgs
    "n_kv_head": None, "multiple_of": 256, "ffn_dim_multiplier": None, "rope_base": 10000, "norm_eps": 1e-5,
    "token_dropout_p": 0.1, "attn_dropout_p": 0.0, "resid_dropout_p": 0.1, "ffn_dropout_p": 0.1, "drop_path_rate": 0.0,
    "num_classes": 1000, "caption_dim": 2048, "class_dropout_prob": 0.1, "model_type": "c2i", "vocab_size": 16384,
    "cls_token_num": 1, "block_size": 256,
}  # fmt: skip
_ROOTS = ("model", "module", "state_dict")  # under which a file may hold its weights
CODE_DIM = 8  # channels of a code in all published tokenizers
TEXT_ENCODER = "google/flan-t5-xl"  # of all published models by text, run in bfloat16

_NAMES = (  # published, ours; parts of names, in this order
    ("cls_embedding.embedding_table.", "condition.embedding."),
    ("cls_embedding.cap_proj.fc1.", "condition.mlp.fc."),
    ("cls_embedding.cap_proj.fc2.", "condition.mlp.proj."),
    ("cls_embedding.uncond_embedding", "condition.null"),
    ("tok_embeddings.", "token_embedding."),
    ("layers.", "blocks."),
    (".attention.wqkv.", ".attn.qkv."),
    (".attention.wo.", ".attn.out."),
    (".attention_norm.", ".norm_1."),
    (".ffn_norm.", ".norm_2."),
    (".feed_forward.w2.", ".mlp.proj."),
    ("output.", "head."),
)
_FUSED = (".mlp.fc.weight", (".feed_forward.w1.weight", ".feed_forward.w3.weight"))
_DROPPED = re.compile(r"freqs_cis|causal_mask|layers\.\d+\.attention\.kv_cache\..*")


def published_name(name: str) -> str:
    """The published name of a parameter of ours that is one there, too."""
    for theirs, ours in _NAMES:
        name = name.replace(ours, theirs)
    return name


def to_published(state: Mapping[str, Tensor]) -> State:
    """Tensors by our names (a state dict, or gradients) under published ones."""
    found: State = {}
    ours, theirs = _FUSED
    for name, tensor in state.items():
        if name.endswith(ours) and name.startswith("blocks."):
            stem = published_name(name.removesuffix(ours))
            found.update({stem + part: half for part, half in zip(theirs, tensor.chunk(2), strict=True)})
        else:
            found[published_name(name)] = tensor
    return found


def load_published(model: GPT, state: Mapping[str, Tensor]) -> None:
    """Copy published weights into a model; raises UserError naming the first key that does not fit."""
    places = to_published(model.state_dict())  # views of the model's own tensors
    given = {name: tensor for name, tensor in state.items() if not _DROPPED.fullmatch(name)}
    check_shapes(places, given)
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(given[name])


def build_generator(
    config: Mapping[str, Any],
    *,
    hidden: int | None = None,
    downsample: int = 16,
    sampling: Mapping[str, Any] | None = None,
) -> GPT:
    """The model of a published configuration (keys of its `ModelArgs`), with fresh weights.

    hidden: of SwiGLU, instead of what the configuration says. downsample: pixels to a side of a token, which the model
    itself does not know. sampling: fields of `GPTSampling`.
    """
    config = {**DEFAULTS, **config}
    text = config["model_type"] == "t2i"
    if config["attn_dropout_p"]:
        raise UserError(f"config: attn_dropout_p={config['attn_dropout_p']} is not known; all recipes have 0")
    if not text and config["cls_token_num"] != 1:
        raise UserError(f"config: cls_token_num={config['cls_token_num']} of a class-conditional model; use 1")
    side = math.isqrt(config["block_size"])
    if side * side != config["block_size"]:
        raise UserError(f"config: block_size={config['block_size']} is no square grid of tokens")
    return GPT(
        tokens=TokenSpec(
            kind="discrete",
            length=config["block_size"],
            dim=CODE_DIM,
            image_size=side * downsample,
            codebook_size=config["vocab_size"],
            grid=(side, side),
        ).to_dict(),
        width=config["dim"],
        depth=config["n_layer"],
        heads=config["n_head"],
        kv_heads=config["n_kv_head"],
        hidden=hidden
        or llama_hidden(config["dim"], multiple=config["multiple_of"], factor=config["ffn_dim_multiplier"]),
        num_classes=None if text else config["num_classes"],
        text_dim=config["caption_dim"] if text else None,
        text_length=config["cls_token_num"] if text else 120,
        label_dropout=config["class_dropout_prob"],
        null_text="fixed",
        rope_base=config["rope_base"],
        condition_rope="zero",
        norm_eps=config["norm_eps"],
        token_dropout=config["token_dropout_p"],
        residual_dropout=config["resid_dropout_p"],
        mlp_dropout=config["ffn_dropout_p"],
        drop_path=config["drop_path_rate"],
        sampling=None if sampling is None else dict(sampling),
    )


def sampling_from_published(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `GPTSampling` from the arguments of the published `generate`.

    There guidance is on above 1 only, its interval counts from the second token on, and a temperature is at least 1e-5.
    """
    greedy = not arguments.get("sample_logits", True)
    scale, interval = arguments.get("cfg_scale", 1.0), arguments.get("cfg_interval", -1)
    return {
        "temperature": 0.0 if greedy else max(arguments.get("temperature", 1.0), 1e-5),
        "top_k": arguments.get("top_k", 0) or None,
        "top_p": min(arguments.get("top_p", 1.0), 1.0),
        "guidance": max(scale, 1.0),
        "guidance_until": None if interval < 0 else interval + 2,
    }


def convert(checkpoint: str | Path, config: str | Path | None = None) -> Model:
    """A published file or folder as a model of ours, in evaluation mode, with origin and licence in `metadata`.

    config: a .json or .yaml with the keys of the published ModelArgs, where the file does not tell. Raises UserError.
    """
    path = Path(checkpoint).expanduser()
    file = path / "consolidated.pth" if (path / "consolidated.pth").is_file() else weights_file(path)
    content = read_content(file)
    found = Path(config) if config is not None else config_beside(file)
    given = {} if found is None else read_config(found)
    if llamagen_vq.is_vq(next((content[root] for root in _ROOTS if isinstance(content.get(root), dict)), content)):
        return llamagen_vq.convert(tensors_of(content, file, ("ema", *_ROOTS)), path, given)
    state = tensors_of(content, file, _ROOTS)  # of GPTs the live weights were released, not the averaged ones
    state = {name.removeprefix("module.").removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
    trained = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
    inferred, hidden, downsample = infer(state, path, {**trained, **given})
    sampling, metadata = _known(inferred, downsample, path)
    try:
        model = build_generator(inferred, hidden=hidden, downsample=downsample, sampling=sampling)
    except (TypeError, ValueError) as error:
        raise UserError(f"checkpoint={path} does not fit its config ({error}); check config=") from error
    load_published(model, state)
    model.metadata = metadata
    return model.eval()


def infer(state: Mapping[str, Tensor], path: Path, given: Mapping[str, Any]) -> tuple[dict[str, Any], int, int]:
    """(published configuration, hidden width of SwiGLU, pixels to a side of a token) of a GPT's weights.

    given: the published configuration or training arguments, as far as they are known; they win.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    try:
        vocabulary, width = shapes["tok_embeddings.weight"]
        hidden = shapes["layers.0.feed_forward.w1.weight"][0]
        qkv = shapes["layers.0.attention.wqkv.weight"][0]
    except KeyError as error:
        raise UserError(f"checkpoint={path} is neither a GPT nor a VQ-GAN of LlamaGen: it has no {error}") from error
    depth = count(shapes, r"layers\.(\d+)\.")
    known = SIZES.get(given.get("gpt_model", ""), {})
    heads = given.get("n_head", known.get("n_head")) or next(
        (size["n_head"] for size in SIZES.values() if (size["dim"], size["n_layer"]) == (width, depth)), None
    )
    if heads is None:
        raise UserError(
            f"checkpoint={path} has {depth} layers of width {width}, which is no published size: its number of heads "
            "cannot be told; give config=FILE with n_head"
        )
    kv_heads = (qkv - width) // 2 * heads // width
    config: dict[str, Any] = {
        "dim": width, "n_layer": depth, "n_head": heads, "n_kv_head": None if kv_heads == heads else kv_heads,
        "vocab_size": vocabulary,
    }  # fmt: skip
    if "cls_embedding.uncond_embedding" in shapes:
        length, channels = shapes["cls_embedding.uncond_embedding"]
        config |= {"model_type": "t2i", "cls_token_num": length, "caption_dim": channels}
    else:
        rows = shapes["cls_embedding.embedding_table.weight"][0]
        dropped = given.get("class_dropout_prob", DEFAULTS["class_dropout_prob"]) > 0
        config |= {"model_type": "c2i", "cls_token_num": 1, "num_classes": rows - dropped}
    downsample = int(given.get("downsample_size", 16))
    config["block_size"] = _block_size(path, given, shapes, config["cls_token_num"], downsample)
    keys = (
        "norm_eps", "rope_base", "token_dropout_p", "attn_dropout_p", "resid_dropout_p", "ffn_dropout_p",
        "drop_path_rate", "class_dropout_prob",
    )  # fmt: skip
    if "dropout_p" in given:  # the published script's one argument for both, which drop path replaces
        both = 0.0 if given.get("drop_path_rate") else given["dropout_p"]
        config |= {"resid_dropout_p": both, "ffn_dropout_p": both}
    return config | {key: given[key] for key in keys if key in given}, hidden, downsample


def _block_size(
    path: Path, given: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], leading: int, downsample: int
) -> int:
    """Image tokens: of the configuration, of a stray rotary table, or of the image size in the file's name."""
    if "block_size" in given:
        return int(given["block_size"])
    if "freqs_cis" in shapes:
        return shapes["freqs_cis"][0] - leading
    named = re.search(r"_(256|384|512)\b", path.stem)
    if "image_size" not in given and named is None:
        raise UserError(
            f"checkpoint={path} does not tell its image size; give config=FILE with block_size (tokens of an image), "
            "or keep the published name, such as c2i_B_256.pt"
        )
    return (int(given.get("image_size") or named[1]) // downsample) ** 2  # type: ignore[index]


# (size, image size): guidance of the published sample, and its gFID against the ADM statistics of ImageNet 256 × 256
# (README): temperature 1, all tokens, 384-pixel samples made smaller.
_FID = {
    ("B", 256): (2.0, 5.46), ("B", 384): (2.0, 6.09), ("L", 256): (1.75, 3.80), ("L", 384): (2.0, 3.07),
    ("XL", 384): (1.75, 2.62), ("XXL", 384): (1.75, 2.34), ("3B", 384): (1.65, 2.18),
}  # fmt: skip


def _known(config: Mapping[str, Any], downsample: int, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(sampling, metadata) of a checkpoint by its name; a name that the sizes contradict is not believed."""
    metadata: dict[str, Any] = {"source": f"FoundationVision/LlamaGen, converted from {path.name}", "licence": "MIT"}
    text = config["model_type"] == "t2i"
    if text and config["caption_dim"] == DEFAULTS["caption_dim"]:  # the published features
        metadata["text_encoder"] = {
            "path": TEXT_ENCODER, "fingerprint": None, "dim": config["caption_dim"], "length": config["cls_token_num"]
        }  # fmt: skip
    sampling: dict[str, Any] = {"guidance": 7.5, "top_k": 1000} if text else {"guidance": 4.0}  # of the demos
    found = re.search(r"(c2i|t2i)_(B|L|XL|XXL|3B)_(?:stage\d_)?(256|384|512)", path.name)
    if found is None:
        return sampling, metadata
    pixels = math.isqrt(config["block_size"]) * downsample
    if (config["model_type"], config["dim"], pixels) == (found[1], SIZES[f"GPT-{found[2]}"]["dim"], int(found[3])):
        metadata["title"] = f"LlamaGen {found[0]} (published weights)"
        images = "captioned images: LAION-COCO, then the authors' own" if text else "ImageNet-1k, training split"
        metadata["training_data"] = images
        if not text and (published := _FID.get((found[2], pixels))):
            scale, fid = published
            sampling = {"guidance": scale}
            key = f"gFID, ImageNet 256 × 256, guidance {scale}, as published (not measured here)"
            metadata["results"] = {key: fid}
    return sampling, metadata
