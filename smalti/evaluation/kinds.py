"""What an evaluation measures, a tokenizer or samples, and which keys are of the other kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smalti.errors import UserError
from smalti.exports import class_of
from smalti.generators.base import Generator

# Keys of configs/evaluate.yaml that have no effect on the other kind, with their defaults.
OF_TOKENIZERS: dict[str, Any] = {"image": None, "lengths": None, "baselines": None, "lpips_weights": None}
OF_GENERATORS: dict[str, Any] = dict.fromkeys(
    ("tokenizer_path", "samples", "samples_path", "labels", "length", "size", "bounds")
) | {"decoding": {}, "precision": "32-true", "reference": "train", "classifier": "auto"}


def of_samples(cfg: Mapping[str, Any]) -> bool:
    """Whether samples are measured, not reconstructions. Raises UserError for keys of the other kind."""
    if cfg["model_path"] is None:
        kind = "samples"
    else:
        kind = "generator" if issubclass(class_of(cfg["model_path"]), Generator) else "tokenizer"
    unused = OF_GENERATORS if kind == "tokenizer" else OF_TOKENIZERS
    for key, default in unused.items():
        if cfg[key] != default:
            measured = "samples are measured" if kind == "samples" else f"model_path={cfg['model_path']} is a {kind}"
            other = "generator" if kind == "tokenizer" else "tokenizer"
            raise UserError(f"{key}={cfg[key]} is for {other}s, but {measured}; leave {key} out")
    return kind != "tokenizer"
