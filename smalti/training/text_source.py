"""Where a generator by text has its texts from: a frozen encoder in the loop, or features in token shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from smalti.data.module import DataModule
from smalti.errors import UserError
from smalti.text import LENGTH, TextEncoder


@dataclass(frozen=True)
class TextSource:
    """dim: channels of a feature. length: of a text at most. origin: of the encoder, for exports. encoder: what makes
    features of captions in the loop; None: token shards have them."""

    dim: int
    length: int
    origin: dict[str, Any]
    encoder: TextEncoder | None


def open_texts(config: DictConfig, data: DataModule) -> TextSource | None:
    """The texts that the generator's config asks for; None for one that takes no text.

    generator.text_dim: null is none, "auto" the channels that there are, a number is held against them; so is
    generator.text_length. Raises UserError for texts that are not there or do not fit.
    """
    settings, name = config.generator, config.text_encoder
    if (asked := settings.get("text_dim")) is None:
        return None
    length = settings.get("text_length")
    texts = _of_images(name, length or LENGTH) if data.tokens is None else _of_shards(data, name)
    where = f"text_encoder={name}" if data.tokens is None else f"data.path={data.path}"
    if asked not in ("auto", texts.dim):
        raise UserError(
            f"generator.text_dim={asked}, but {where} has features of {texts.dim} channels; use {texts.dim}, or auto"
        )
    if length not in (None, texts.length):
        raise UserError(
            f"generator.text_length={length}, but {where} has features of up to {texts.length} tokens; use "
            f"{texts.length}, or encode with text_length={length}"
        )
    data.read_text(texts.length, texts.dim)
    return texts


def _of_images(name: str | None, length: int) -> TextSource:
    if name is None:
        raise UserError(
            "text_encoder is required: this generator learns from captions; give the frozen text encoder that makes "
            "features of them, such as text_encoder=google/flan-t5-xl, or data.path=DIR of token shards that have them"
        )
    encoder = TextEncoder(name, length=length)
    return TextSource(encoder.dim, length, encoder.describe(), encoder)


def _of_shards(data: DataModule, name: str | None) -> TextSource:
    """Also where an encoder is named: it must be theirs, and is not needed any more."""
    theirs = (data.tokens or {}).get("text")
    if theirs is None:
        raise UserError(
            f"data.path={data.path} has no text features, which this generator learns from; encode the images with "
            "text_encoder=NAME, or set generator.text_dim=null"
        )
    origin = dict(theirs)
    if name is not None:
        own = TextEncoder(name, length=theirs["length"]).describe()
        if own["fingerprint"] != theirs["fingerprint"]:
            raise UserError(
                f"data.path={data.path} has features of text encoder {theirs['fingerprint'][:16]} ({theirs['path']}), "
                f"but text_encoder={name} is {own['fingerprint'][:16]}; give the former, or leave it out"
            )
        origin["path"] = own["path"]
    return TextSource(theirs["dim"], theirs["length"], origin, None)
