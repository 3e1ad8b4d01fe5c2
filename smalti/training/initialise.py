"""Start a training from an export: of the same sizes, at another resolution, with another number of tokens, or from
stage 1 and its teacher into stage 2.

What must agree (widths, depths, patches, codebook, layout) is compared first, so that nothing is loaded by halves.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.errors import UserError
from smalti.layers.positions import resize_grid
from smalti.registry import describe
from smalti.settings import read_settings
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.flextok import DecoderTrunk, EncoderTrunk, FlexTok
from smalti.tokenizers.maskgit_vqgan import MaskGITVQGAN
from smalti.tokenizers.titok import TiTok

# Arguments that a new training may choose anew (and any regularizer, which has no weights); every other one must be
# that of the export.
_FREE = {"image_size", "num_latent_tokens", "init", "freeze_encoder", "dropout"}
_FREE |= {f"quantizer.{name}" for name in ("commitment_weight", "codebook_weight", "ema_decay", "restart_after")}
_FREE |= {f"quantizer.{name}" for name in ("entropy_weight", "entropy_temperature", "entropy_eps", "init")}
_FREE |= {f"quantizer.{name}" for name in ("drop_probability", "corrupt_probability", "corrupt_share")}
_FREE |= {"scaling_factor", "quantizer.scaling_factor", "sample_posterior"}
_FREE |= {"null_dropout", "activation_checkpointing", "vae.image_size", "vae.sample_posterior"}
_FREE_SECTIONS = {"regularizer", "noise", "sampling", "repa"}
_GRIDS = ("encoder.positional_embedding", "decoder.positional_embedding")
_LATENTS = (
    "latent_tokens",
    "encoder.latent_token_positional_embedding",
    "decoder.latent_token_positional_embedding",
)
_FLEXTOK_LATENTS = {"encoder.registers.tokens": 0, "decoder.token_positions.tables": 1}  # and the axis that counts them


@torch.no_grad()
def initialise(tokenizer: Tokenizer, path: str | Path, teacher_path: str | Path | None = None) -> list[str]:
    """Load the export in `path` into `tokenizer`; returns what had to be changed, in sentences.

    Position tables of another resolution are resized bicubically, the class position kept. Of another number of latent
    tokens the first ones are loaded, further ones stay as they were constructed. A stage-2 TiTok takes a stage-1 export
    and, from `teacher_path`, the MaskGIT-VQGAN whose codes that predicts. Raises UserError for anything else.
    """
    source = Tokenizer.from_pretrained(path)
    if type(source) is not type(tokenizer):
        raise UserError(
            f"init_path={path} holds a {type(source).__name__}, but this run trains a {type(tokenizer).__name__}; "
            "give an export of the same method"
        )
    if isinstance(tokenizer, TiTok) and isinstance(source, TiTok) and (source.head, tokenizer.head) == _TO_STAGE_2:
        if teacher_path is None:
            raise UserError(
                f"init_path={path} is a stage-1 model, whose decoder gives codes: stage 2 also needs "
                "teacher_path=DIR, the MaskGIT-VQGAN that those codes belong to"
            )
        teacher = Tokenizer.from_pretrained(teacher_path)
        if not isinstance(teacher, MaskGITVQGAN):
            raise UserError(f"teacher_path={teacher_path} holds a {type(teacher).__name__}, not a MaskGITVQGAN")
        return hand_over(tokenizer, source, teacher, init_path=path, teacher_path=teacher_path)
    _compare(tokenizer, source, f"init_path={path}")
    return _copy(tokenizer, source)


@torch.no_grad()
def hand_over(
    tokenizer: TiTok,
    stage1: TiTok,
    teacher: MaskGITVQGAN,
    *,
    init_path: str | Path = "stage 1",
    teacher_path: str | Path = "the teacher",
) -> list[str]:
    """Make a stage-2 TiTok from a stage-1 one and from the MaskGIT-VQGAN that it was trained on.

    Encoder, latent tokens, quantizer and transformer decoder come from stage 1; `proxy_embedding` is the teacher's
    codebook, `pixel_decoder` its decoder. The teacher's encoder is not needed any more.
    """
    _compare(tokenizer, stage1, f"init_path={init_path}", free={"head", "pixel_decoder"})
    if teacher.spec.codebook_size != tokenizer.decoder.proxy_codebook_size:
        raise UserError(
            f"tokenizer.proxy_codebook_size={tokenizer.decoder.proxy_codebook_size} but teacher_path={teacher_path} "
            f"has {teacher.spec.codebook_size} codes; give the model that stage 1 was trained on"
        )
    wanted = {"shortcut": "input", **tokenizer.arguments["pixel_decoder"]}
    theirs = {**{key: teacher.arguments[key] for key in wanted if key != "dim"}, "dim": teacher.spec.dim}
    for key in sorted(wanted):
        mine, its = describe(wanted[key]), describe(theirs[key])
        if mine != its:
            raise UserError(
                f"tokenizer.pixel_decoder.{key}={mine} but teacher_path={teacher_path} has {its}; "
                f"set tokenizer.pixel_decoder.{key}={its}"
            )
    notes = _copy(tokenizer, stage1)
    tokenizer.pixel_decoder.load_state_dict(teacher.decoder.state_dict())
    tokenizer.proxy_embedding.data.copy_(teacher.quantizer.lookup(torch.arange(len(tokenizer.proxy_embedding))))
    return notes


_TO_STAGE_2 = ("codes", "soft_codes")


def _compare(tokenizer: Tokenizer, source: Tokenizer, where: str, free: set[str] | None = None) -> None:
    mine, theirs = _flat(_described(tokenizer)), _flat(_described(source))
    for key in sorted(mine.keys() | theirs.keys()):
        if key in _FREE or key.split(".")[0] in {*_FREE_SECTIONS, *(free or ())}:
            continue
        ours, its = mine.get(key), theirs.get(key)
        if key == "pixel_decoder.shortcut":
            ours, its = ours or "input", its or "input"
        if ours != its:
            raise UserError(f"tokenizer.{key}={ours} but {where} has {its}; set tokenizer.{key}={its}")


def _described(tokenizer: Tokenizer) -> dict[str, Any]:
    """The arguments of a tokenizer; of FlexTok's trunks also those that were not given."""
    said: dict[str, Any] = describe(tokenizer)
    if isinstance(tokenizer, FlexTok):
        for name, trunk in (("encoder", EncoderTrunk), ("decoder", DecoderTrunk)):
            said[name] = asdict(read_settings(trunk, name, said[name]))
    return said


def _copy(tokenizer: Tokenizer, source: Tokenizer) -> list[str]:
    """Copy what `source` has, resized where that is allowed. Parameters that only `tokenizer` has keep their values."""
    notes = []
    own, given = tokenizer.state_dict(), source.state_dict()
    values: dict[str, Tensor] = {}
    for name, tensor in given.items():
        if name not in own:
            continue  # state of a codebook rule that this run does not use
        if isinstance(tokenizer, TiTok) and name in _GRIDS:
            grid = round((len(own[name]) - 1) ** 0.5)
            tensor = resize_grid(tensor, grid, leading=1)
        if isinstance(tokenizer, TiTok) and name in _LATENTS:
            kept = min(len(tensor), len(own[name]))
            tensor = own[name].clone()
            tensor[:kept] = given[name][:kept]
        if isinstance(tokenizer, FlexTok) and name in _FLEXTOK_LATENTS:
            axis = _FLEXTOK_LATENTS[name]
            kept = min(tensor.shape[axis], own[name].shape[axis])
            tensor = own[name].clone()
            tensor.narrow(axis, 0, kept).copy_(given[name].narrow(axis, 0, kept))
        if name.startswith("decoder.projection.") and tensor.shape != own[name].shape:
            continue  # features are projected to another representation
        if tensor.shape != own[name].shape:
            raise UserError(
                f"image_size={tokenizer.spec.image_size}: {name} is {tuple(own[name].shape)} there and "
                f"{tuple(tensor.shape)} in the export, and is not resized; use image_size={source.spec.image_size}"
            )
        values[name] = tensor
    tokenizer.load_state_dict(values, strict=False)
    before, now = source.spec, tokenizer.spec
    if before.image_size != now.image_size:
        how = "position tables resized bicubically, class position kept"
        if not isinstance(tokenizer, TiTok):
            how = "the same weights serve both"
        notes.append(f"image_size {before.image_size} -> {now.image_size}: {how}")
    if isinstance(tokenizer, (TiTok, FlexTok)) and before.length != now.length:
        change = f"num_latent_tokens {before.length} -> {now.length}: "
        if now.length < before.length:
            change += f"the first {now.length} latent tokens and their positions are kept"
        else:
            change += f"the last {now.length - before.length} latent tokens and their positions are fresh"
        if isinstance(tokenizer, TiTok) and tokenizer.encoder.layout == "legacy":
            change += "; latent_layout=legacy mixes all positions by their number, so that latents begin anew"
        notes.append(change)
    return notes


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in _flat(item, f"{key}.{name}" if key else name).items()}
    return {key: value}
