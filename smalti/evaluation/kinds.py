"""What an evaluation measures, a tokenizer or samples, and which keys are of the other kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smalti.errors import UserError
from smalti.exports import class_of
from smalti.generators.base import Generator

# Keys of configs/evaluate.yaml that have no effect on another kind, with their defaults.
OF_TOKENIZERS: dict[str, Any] = {"image": None, "lengths": None, "baselines": None, "lpips_weights": None}
OF_GENERATORS: dict[str, Any] = {"labels": None, "text_encoder": None, "size": None, "precision": "32-true"}
OF_SAMPLES: dict[str, Any] = {
    **dict.fromkeys(("tokenizer_path", "samples", "samples_path", "length", "bounds")),
    **{"decoding": {}, "reference": "train", "classifier": "auto"},
}


def of_samples(cfg: Mapping[str, Any]) -> bool:
    """Whether samples are measured, not reconstructions. Raises UserError for keys of another kind."""
    tokenizers, generators = dict.fromkeys(OF_TOKENIZERS, "tokenizers"), dict.fromkeys(OF_GENERATORS, "generators")
    tokenizer = False
    if cfg["model_path"] is None:
        what, unused = "samples are measured", {**tokenizers, **generators, "sampling": "generators"}
    elif issubclass(class_of(cfg["model_path"]), Generator):
        what, unused = f"model_path={cfg['model_path']} is a generator", tokenizers
    else:
        tokenizer = True
        what = f"model_path={cfg['model_path']} is a tokenizer"
        unused = {**generators, **dict.fromkeys(OF_SAMPLES, "samples of a generator")}
    defaults = {**OF_TOKENIZERS, **OF_GENERATORS, **OF_SAMPLES, "sampling": {}}
    for key, kind in unused.items():
        if cfg[key] != defaults[key]:
            raise UserError(f"{key}={cfg[key]} is for {kind}, but {what}; leave {key} out")
    return not tokenizer
