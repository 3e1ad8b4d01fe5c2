"""Published TiTok, TA-TiTok and MaskGIT-VQGAN checkpoints (bytedance/1d-tokenizer) as models of ours.

    convert("tokenizer_titok_l32.bin")            a state dict alone: the sizes are read off its keys and shapes
    convert("…/tokenizer_titok_l32_imagenet")     a hub folder: config.json and model.safetensors
    convert("…/checkpoint-50000")                 a folder of the published training script; its EMA weights are taken

What differs: names (`our_name`, `published_name`); 1×1 convolutions over tokens, which are Linear layers here; the
quirks that published weights depend on, which are options here (latent_layout="legacy", shortcut="published").
`clustering_vq` acts in training only: its usage buffer is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from smalti.errors import UserError
from smalti.published.files import config_beside, read_config, read_weights, weights_file
from smalti.published.names import count
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.maskgit_vqgan import MaskGITVQGAN
from smalti.tokenizers.quantizers.base import Quantizer
from smalti.tokenizers.quantizers.kl import GaussianQuantizer
from smalti.tokenizers.quantizers.vq import VectorQuantizer
from smalti.tokenizers.regularizers import Regularizer
from smalti.tokenizers.titok import TiTok

State = dict[str, Tensor]

# What the published code has in its source, not in its configuration.
HARD_CODED: dict[str, Any] = {
    "vit": {
        "small": {"width": 512, "num_layers": 8, "num_heads": 8},
        "base": {"width": 768, "num_layers": 12, "num_heads": 12},
        "large": {"width": 1024, "num_layers": 24, "num_heads": 16},
    },
    "proxy_codebook": 1024,
    "pixel_vqgan": {"channel_mult": [1, 1, 2, 2, 4], "hidden_channels": 128, "num_res_blocks": 2, "z_channels": 256},
}
VQGAN_IMAGE_SIZE = 256  # of the one published MaskGIT-VQGAN; its weights do not tell
IMAGENET = "ImageNet-1k, training split, 256 × 256"

_NAMES = (  # published, ours; parts of names, in this order
    ("pixel_quantize.embedding.weight", "proxy_embedding"),
    ("quantize.embedding.weight", "quantizer.embedding"),
    (".attn.in_proj_", ".attn.qkv."),
    (".attn.out_proj.", ".attn.out."),
    (".mlp.c_fc.", ".mlp.fc."),
    (".mlp.c_proj.", ".mlp.proj."),
    ("decoder.text_guidance_proj.", "decoder.text_proj."),
    ("decoder.text_guidance_positional_embedding", "decoder.text_positional_embedding"),
)
_DROPPED = ("quantize.embed_prob",)
_CONVOLUTIONS = re.compile(r"(encoder\.conv_out|decoder\.ffn\.\d+)\.weight")  # (out, in, 1, 1) there, (out, in) here


def our_name(name: str) -> str:
    """Our name of a published parameter."""
    for theirs, ours in _NAMES:
        name = name.replace(theirs, ours)
    return name


def published_name(name: str) -> str:
    """The published name of a parameter of ours; the inverse of `our_name`."""
    for theirs, ours in _NAMES:
        name = name.replace(ours, theirs)
    return name


def to_published(model: Tokenizer) -> State:
    """The weights of a model of ours under published names and in published shapes."""
    state = {published_name(name): tensor for name, tensor in _weights(model).items()}
    if isinstance(model, TiTok):
        for name in filter(_CONVOLUTIONS.fullmatch, list(state)):
            state[name] = state[name][:, :, None, None]
    return state


def load_published(model: Tokenizer, state: Mapping[str, Tensor]) -> None:
    """Copy published weights into a model; raises UserError naming the first key that does not fit."""
    if isinstance(model, TiTok):
        _check_layout(model, state)
    expected = {name: tuple(tensor.shape) for name, tensor in to_published(model).items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in _DROPPED}
    for name in sorted(expected.keys() | given.keys()):
        ours, theirs = expected.get(name), given.get(name)
        if ours != theirs:
            raise UserError(
                f"checkpoint does not fit its config: {name} is {theirs or 'missing'} in the file and "
                f"{ours or 'missing'} in the model; give the config that belongs to this checkpoint"
            )
    own = model.state_dict()
    values = {our_name(name): state[name].reshape(own[our_name(name)].shape) for name in given}
    model.load_state_dict({**own, **values})  # own: the scale of a VAE's latents, which no published file has


def _weights(model: Tokenizer) -> State:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("quantizer.scale.")}


def build_tokenizer(
    config: Mapping[str, Any],
    size_overrides: Mapping[str, Any] | None = None,
    regularizer: Regularizer | None = None,
) -> Tokenizer:
    """The model of a published configuration, with fresh weights.

    config: with the keys model.vq_model and dataset.preprocessing.crop_size (TiTok, TA-TiTok), or vqgan and quantizer
    (MaskGIT-VQGAN). size_overrides: replaces parts of HARD_CODED. regularizer: of a TiTok whose prefixes decode.
    """
    sizes = {**HARD_CODED, **(size_overrides or {})}
    if "vqgan" in config:
        vqgan, quantizer = config["vqgan"], config["quantizer"]
        # beta stands at the codebook term there, not at the commitment term
        codebook = VectorQuantizer(
            codebook_size=quantizer["num_embeddings"],
            dim=quantizer["embedding_dim"],
            commitment_weight=1.0,
            codebook_weight=quantizer.get("commitment_cost", 0.25),
        )
        return MaskGITVQGAN(
            image_size=vqgan["resolution"], quantizer=codebook, shortcut="published", **_vqgan_sizes(vqgan)
        )
    model = config["model"]["vq_model"]
    legacy = model.get("is_legacy", True)
    stage2 = model.get("finetune_decoder", legacy)
    if stage2 and not legacy:
        raise UserError("model.vq_model.finetune_decoder=true needs proxy codes, but is_legacy=false makes pixels")
    with_text = "text_context_length" in model or "text_embed_dim" in model
    pixel_vqgan = sizes["pixel_vqgan"]
    return TiTok(
        image_size=config["dataset"]["preprocessing"]["crop_size"],
        num_latent_tokens=model["num_latent_tokens"],
        quantizer=_quantizer(model, legacy),
        encoder=_tower(sizes, model["vit_enc_model_size"], model["vit_enc_patch_size"]),
        decoder=_tower(sizes, model["vit_dec_model_size"], model["vit_dec_patch_size"]),
        latent_layout="legacy" if legacy else "corrected",
        head="soft_codes" if stage2 else "codes" if legacy else "pixels",
        proxy_codebook_size=sizes["proxy_codebook"] if legacy else None,
        pixel_decoder={"dim": pixel_vqgan["z_channels"], "shortcut": "published", **_vqgan_sizes(pixel_vqgan)}
        if stage2
        else None,
        text={"width": model.get("text_embed_dim", 768), "length": model.get("text_context_length", 77)}
        if with_text
        else None,
        freeze_encoder=bool(stage2),
        regularizer=regularizer,
    )


def infer(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(published configuration, size overrides) read off the names and shapes of published weights.

    Not to be seen there, hence as in all published models: 64 channels a head; l2-normalised codes exactly in the
    legacy layout; commitment cost 0.25. Raises UserError for weights of something else.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if "latent_tokens" in shapes and "encoder.patch_embed.weight" in shapes and "decoder.mask_token" in shapes:
        return _infer_titok(shapes)
    if "encoder.conv_in.weight" in shapes and "encoder.down.0.block.0.conv1.weight" in shapes:
        return _infer_vqgan(shapes)
    some = ", ".join(sorted(shapes)[:3])
    raise UserError(f"checkpoint is neither a TiTok nor a MaskGIT-VQGAN: its names are {some}, …; check the file")


def convert(
    checkpoint: str | Path,
    config: str | Path | None = None,
    size_overrides: Mapping[str, Any] | None = None,
    regularizer: Regularizer | None = None,
) -> Tokenizer:
    """A published checkpoint as a model of ours, in evaluation mode, with its origin and licence in `metadata`.

    checkpoint: a .safetensors, .bin, .pt or .pth file (tensors only, nothing pickled is run), a hub folder, or a folder
    of the published training. config: the published .json or .yaml; None: the one beside the file, or else read off
    the weights. Raises UserError with one line.
    """
    checkpoint = Path(checkpoint).expanduser()
    file = weights_file(checkpoint)
    state = read_weights(file)
    found = Path(config) if config is not None else config_beside(file)
    if found is None:
        settings, inferred = infer(state)
        size_overrides = {**inferred, **(size_overrides or {})}
    else:
        settings = read_config(found)
        if "vqgan" not in settings and "vq_model" not in (settings.get("model") or {}):
            raise UserError(
                f"config={found} has no model.vq_model: it is not a published TiTok configuration; check the file"
            )
    if settings.get("model", {}).get("type") == "one_d_piece" and regularizer is None:
        raise UserError(f"{found} describes a One-D-Piece model, whose prefixes decode; use source=onedpiece")
    try:
        model = build_tokenizer(settings, size_overrides, regularizer)
    except (KeyError, TypeError, ValueError) as error:
        where = found or file
        missing = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{where} does not describe a TiTok or MaskGIT-VQGAN: {missing}; check config=") from error
    load_published(model, state)
    model.metadata = _metadata(model, checkpoint)
    return model.eval()


def _quantizer(model: Mapping[str, Any], legacy: bool) -> Quantizer:
    mode = model.get("quantize_mode", "vq")
    if mode == "vae":
        return GaussianQuantizer(dim=model["token_size"], scaling_factor=None)  # to be measured: no weights tell it
    if mode != "vq":
        raise UserError(f"model.vq_model.quantize_mode={mode} is not known; use vq or vae")
    return VectorQuantizer(
        codebook_size=model["codebook_size"],
        dim=model["token_size"],
        distance="cosine" if model.get("use_l2_norm", legacy) else "euclidean",
        commitment_weight=model.get("commitment_cost", 0.25),
    )


def _tower(sizes: Mapping[str, Any], name: str, patch_size: int) -> dict[str, int]:
    if name not in sizes["vit"]:
        raise UserError(f"vit model size {name!r} is not published; known: {', '.join(sizes['vit'])}")
    size = sizes["vit"][name]
    return {
        "width": size["width"],
        "depth": size["num_layers"],
        "heads": size["num_heads"],
        "patch_size": patch_size,
    }


def _vqgan_sizes(vqgan: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "channels": vqgan["hidden_channels"],
        "channel_mult": list(vqgan["channel_mult"]),
        "num_res_blocks": vqgan["num_res_blocks"],
    }


def _check_layout(model: TiTok, state: Mapping[str, Tensor]) -> None:
    legacy = model.head != "pixels"
    keys = {True: "decoder.ffn.2.weight", False: "decoder.conv_out.weight"}
    if keys[legacy] not in state and keys[not legacy] in state:
        raise UserError(
            f"model.vq_model.is_legacy={str(legacy).lower()} but the checkpoint has {keys[not legacy]}, which only the "
            f"other layout has; set is_legacy: {str(not legacy).lower()} in its config"
        )


def _infer_titok(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Any], dict[str, Any]]:
    vit = dict(HARD_CODED["vit"])
    config: dict[str, Any] = {"num_latent_tokens": shapes["latent_tokens"][0]}
    for side, tower in (("enc", "encoder"), ("dec", "decoder")):
        width = shapes[f"{tower}.positional_embedding"][1]
        depth = count(shapes, rf"{tower}\.transformer\.(\d+)\.")
        named = [name for name, size in vit.items() if (size["width"], size["num_layers"]) == (width, depth)]
        if not named:
            named = [f"{width}x{depth}"]
            vit[named[0]] = {"width": width, "num_layers": depth, "num_heads": max(width // 64, 1)}
        config[f"vit_{side}_model_size"] = named[0]
    legacy = "decoder.ffn.2.weight" in shapes
    overrides: dict[str, Any] = {"vit": vit}
    patch = shapes["encoder.patch_embed.weight"][-1]
    size = patch * _side(shapes["encoder.positional_embedding"][0] - 1)
    config["vit_enc_patch_size"] = patch
    config["vit_dec_patch_size"] = size // _side(shapes["decoder.positional_embedding"][0] - 1)
    config["is_legacy"] = legacy
    config["finetune_decoder"] = "pixel_decoder.conv_in.weight" in shapes
    if legacy:
        overrides["proxy_codebook"] = shapes["decoder.ffn.2.weight"][0]
    if config["finetune_decoder"]:
        overrides["pixel_vqgan"] = _infer_decoder(shapes, "pixel_decoder.")
    config["token_size"] = shapes["decoder.decoder_embed.weight"][1]
    config["quantize_mode"] = "vq" if "quantize.embedding.weight" in shapes else "vae"
    if config["quantize_mode"] == "vq":
        config["codebook_size"] = shapes["quantize.embedding.weight"][0]
    if "decoder.text_guidance_proj.weight" in shapes:
        config["text_embed_dim"] = shapes["decoder.text_guidance_proj.weight"][1]
        config["text_context_length"] = shapes["decoder.text_guidance_positional_embedding"][0]
    return {"model": {"vq_model": config}, "dataset": {"preprocessing": {"crop_size": size}}}, overrides


def _infer_vqgan(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Any], dict[str, Any]]:
    codes, dim = shapes["quantize.embedding.weight"]
    vqgan = {**_infer_decoder(shapes, "decoder."), "resolution": VQGAN_IMAGE_SIZE}
    vqgan["hidden_channels"] = channels = shapes["encoder.conv_in.weight"][0]
    widths = [
        shapes[f"encoder.down.{level}.block.0.conv1.weight"][0]
        for level in range(count(shapes, r"encoder\.down\.(\d+)\."))
    ]
    vqgan["channel_mult"] = [width // channels for width in widths]
    return {"vqgan": vqgan, "quantizer": {"num_embeddings": codes, "embedding_dim": dim}}, {}


def _infer_decoder(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Any]:
    levels = count(shapes, rf"{re.escape(prefix)}up\.(\d+)\.")
    widths = [shapes[f"{prefix}up.{level}.block.0.conv1.weight"][0] for level in range(levels)]
    # Channels times a factor: the decoder shows their product only. Any split gives the same decoder.
    channels = min(widths)
    return {
        "channel_mult": [width // channels for width in widths],
        "hidden_channels": channels,
        "num_res_blocks": count(shapes, rf"{re.escape(prefix)}mid\.(\d+)\."),
        "z_channels": shapes[f"{prefix}conv_in.weight"][1],
    }


def _side(positions: int) -> int:
    return round(positions**0.5)


# rFID on the 50,000 ImageNet validation images as the published READMEs state it.
_RFID = {
    "titok_l32": 2.21, "titok_b64": 1.70, "titok_s128": 1.71,
    "titok_bl64_vq8k": 2.06, "titok_bl128_vq8k": 1.49, "titok_sl256_vq8k": 1.03,
    "titok_ll32_vae_c16": 1.61, "titok_bl64_vae_c16": 1.25, "titok_bl128_vae_c16": 0.84,
    "tatitok_bl32_vq": 3.95, "tatitok_bl64_vq": 2.43, "tatitok_bl128_vq": 1.53,
    "tatitok_bl32_vae": 1.53, "tatitok_bl64_vae": 1.47, "tatitok_sl128_vae": 0.90,
    "maskgit-vqgan": 2.28,
}  # fmt: skip


def _metadata(model: Tokenizer, checkpoint: Path) -> dict[str, Any]:
    """What is known of a published checkpoint by its name; a name that the sizes contradict is not believed."""
    text = "/".join(checkpoint.resolve().parts[-2:]).lower()
    kind = "maskgit-vqgan" if isinstance(model, MaskGITVQGAN) else "titok_"
    names = [name for name in sorted(_RFID, key=len, reverse=True) if name in text and kind in name]
    tokens = re.search(r"\d+", names[0].split("_")[1]) if names and "_" in names[0] else None
    if tokens and int(tokens[0]) != model.spec.length:
        names = []
    metadata: dict[str, Any] = {
        "source": f"bytedance/1d-tokenizer, converted from {checkpoint.name}",
        "licence": "Apache-2.0",
    }
    if names:
        with_text = names[0].startswith("tatitok")
        metadata["title"] = f"{names[0]} (published weights)"
        metadata["training_data"] = "DataComp, filtered by aspect and size" if with_text else IMAGENET
        metadata["preprocessing"] = "RGB in [0, 1], shorter side to 256 (bicubic, antialiased), centre crop 256 × 256"
        metadata["results"] = {"rFID, ImageNet validation, as published (not measured here)": _RFID[names[0]]}
    return metadata
