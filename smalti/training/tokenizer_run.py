"""A run that trains a tokenizer: its objective, and what is measured of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig

from smalti import runs
from smalti.data.module import DataModule
from smalti.errors import UserError
from smalti.evaluation.lengths import chosen_lengths
from smalti.instantiate import instantiate
from smalti.objectives.base import Objective
from smalti.objectives.codes import ProxyCodeObjective
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.spec import TokenSpec
from smalti.tokenizers.titok import TiTok
from smalti.training.callbacks.validation import Pictures, Validation
from smalti.training.draws import seed_of
from smalti.training.ema import EMAConfig
from smalti.training.initialise import initialise
from smalti.training.optim import OptimConfig
from smalti.training.prepared import Prepared
from smalti.training.tokenizer_module import TokenizerModule

PICTURED = 8  # validation images in a picture


def prepare(config: DictConfig, settings: dict[str, Any], share: dict[str, int]) -> Prepared:
    """The run that a config asks for; raises UserError for what cannot work."""
    tokenizer, objective = build_models(config)
    data: DataModule = instantiate(config.data, "data")
    data.check(**share)
    data.need_images()
    validation, trainer = settings["validation"], settings["trainer"]
    lengths = validated_lengths(validation["lengths"], tokenizer.spec)
    module = TokenizerModule(
        tokenizer,
        objective,
        OptimConfig(**settings["optimizer"]),
        max_steps=trainer["max_steps"],
        ema=None if settings["ema"] is None else EMAConfig(**settings["ema"]),
        accumulate=share["accumulate"],
        seed=config.seed,
        nan_limit=trainer["nan_limit"],
        compile=trainer["compile"],
    )
    every = validation["every"]

    def batches() -> Iterable[dict[str, Any]]:
        return data.validation_loader(images=validation["images"], rank=runs.rank(), **share)

    def measuring() -> list[pl.Callback]:
        pictured = next(iter(data.validation_loader(images=PICTURED)))["image"]
        return [
            Validation(batches, every, lengths=lengths, length_images=validation["length_images"]),
            Pictures(pictured, Path(config.run) / "images", every, lengths),
        ]

    return Prepared(module, data, measuring, "reconstructions")


def build_models(config: DictConfig) -> tuple[Tokenizer, Objective]:
    """The tokenizer, started from `init_path` (and, in stage 2, the teacher) where given, and the objective.

    Fresh weights depend on the seed and on the module's own config alone.
    """
    torch.manual_seed(seed_of("tokenizer", config.seed))
    tokenizer: Tokenizer = instantiate(config.tokenizer, "tokenizer")
    if config.init_path is not None:
        for note in initialise(tokenizer, config.init_path, teacher_path=config.teacher_path):
            print(f"init_path={config.init_path}: {note}", flush=True)
    torch.manual_seed(seed_of("objective", config.seed))
    objective: Objective = instantiate(config.objective, "objective")
    for note in objective.meet(tokenizer):
        print(note, flush=True)
    if isinstance(objective, ProxyCodeObjective) and isinstance(tokenizer, TiTok):
        teacher, side = objective.teacher(torch.device("cpu")).spec, tokenizer.decoder.grid
        if (teacher.codebook_size, teacher.grid) != (tokenizer.decoder.proxy_codebook_size, (side, side)):
            raise UserError(
                f"teacher_path={config.teacher_path} gives {teacher.length} tokens of {teacher.codebook_size} codes "
                f"(grid {teacher.grid}), but this model predicts {side} × {side} of "
                f"{tokenizer.decoder.proxy_codebook_size}; give the teacher of this recipe and image size"
            )
    return tokenizer, objective


def validated_lengths(given: int | str | list[int] | None, spec: TokenSpec) -> list[int]:
    """Numbers of tokens at which a run is validated: `auto` is 1, 2, 4, … where prefixes can be decoded, else none."""
    if given is None or (given == "auto" and not spec.prefix_decodable):
        return []
    return chosen_lengths(given, spec, "validation.lengths", every="auto")
