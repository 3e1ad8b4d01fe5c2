"""Published One-D-Piece checkpoints (turingmotors/One-D-Piece, arXiv:2501.10064) as models of ours.

    convert("…/One-D-Piece-S-256")      a hub folder: config.json and pytorch_model.bin (or model.safetensors)
    convert("pytorch_model.bin")        a state dict alone: the sizes are read off its keys and shapes
    convert("…/checkpoint-50000")       a folder of the published training script; its EMA weights are taken

One-D-Piece is TiTok in the legacy latent layout, with the latents' tail dropped in training: names and shapes are
TiTok's (smalti/published/titok.py), stage 1 predicts the codes of a MaskGIT-VQGAN, stage 2 makes pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smalti.errors import UserError
from smalti.published import titok
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.regularizers import TailDrop
from smalti.tokenizers.titok import TiTok

# rFID on the 50,000 ImageNet validation images with all 256 tokens, as the published README states it.
_RFID = {"s": 1.48, "b": 1.11, "l": 1.08}


def build_tokenizer(config: Mapping[str, Any], size_overrides: Mapping[str, Any] | None = None) -> TiTok:
    """The model of a published configuration, with fresh weights; size_overrides as in smalti.published.titok."""
    model = titok.build_tokenizer(config, size_overrides, TailDrop(per="batch"))
    if not isinstance(model, TiTok) or model.encoder.layout != "legacy":
        raise UserError("the configuration is not One-D-Piece's (a TiTok with is_legacy); use source=titok")
    return model


def convert(
    checkpoint: str | Path,
    config: str | Path | None = None,
    size_overrides: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """A published checkpoint as a model of ours, in evaluation mode, with its origin and licence in `metadata`.

    checkpoint, config, size_overrides: as in smalti.published.titok.convert. Raises UserError with one line.
    """
    model = titok.convert(checkpoint, config, size_overrides, TailDrop(per="batch"))
    if not isinstance(model, TiTok) or model.encoder.layout != "legacy":
        raise UserError(
            f"checkpoint={checkpoint} is not a One-D-Piece model (a TiTok in the legacy layout); use source=titok"
        )
    model.metadata = _metadata(model, Path(checkpoint).expanduser())
    return model


def _metadata(model: TiTok, checkpoint: Path) -> dict[str, Any]:
    """What is known of a published checkpoint by its name; a name that the sizes contradict is not believed."""
    metadata: dict[str, Any] = {
        "source": f"turingmotors/One-D-Piece, converted from {checkpoint.name}",
        "licence": "Apache-2.0",
    }
    found = re.search(r"one-d-piece[-_]([sbl])[-_]?256", "/".join(checkpoint.resolve().parts[-2:]).lower())
    size = next(
        (name[0] for name, size in titok.HARD_CODED["vit"].items() if size["width"] == model.latent_tokens.shape[1]),
        None,
    )
    if found and found[1] == size and model.spec.length == 256:
        metadata["title"] = f"One-D-Piece-{size.upper()}-256 (published weights)"
        metadata["training_data"] = titok.IMAGENET
        metadata["preprocessing"] = "RGB in [0, 1], shorter side to 256, centre crop 256 × 256"
        if model.head == "soft_codes":
            metadata["results"] = {
                "rFID of all 256 tokens, ImageNet validation, as published (not measured here)": _RFID[size]
            }
    return metadata
