"""One training run: from a checked config to a finished run folder, with an export in it."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf

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
from smalti.training.callbacks.checkpointing import Checkpointing
from smalti.training.callbacks.metrics_csv import MetricsCsv
from smalti.training.callbacks.progress import ProgressBar
from smalti.training.callbacks.signals import Signals
from smalti.training.callbacks.validation import Pictures, Validation
from smalti.training.checkpoint import newest_good
from smalti.training.draws import seed_of
from smalti.training.ema import EMAConfig
from smalti.training.initialise import initialise
from smalti.training.loggers import build_loggers, close
from smalti.training.loop import build_trainer, fit
from smalti.training.optim import OptimConfig
from smalti.training.tokenizer_module import TokenizerModule

PICTURED = 8  # validation images in a picture


def train(config: DictConfig) -> dict[str, float]:
    """Build what the config names, train to `trainer.max_steps`, export the averaged weights; the last metrics.

    Nothing is written before all of it is built. Raises UserError, Diverged or Stopped.
    """
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    trainer_settings = settings["trainer"]
    devices = device_count(trainer_settings["devices"])
    world_size = runs.processes() if runs.processes() > 1 else devices * trainer_settings["num_nodes"]
    share = {"accumulate": trainer_settings["accumulate"], "world_size": world_size}

    tokenizer, objective = build_models(config)
    data: DataModule = instantiate(config.data, "data")
    data.check(**share)
    lengths = validated_lengths(settings["validation"]["lengths"], tokenizer.spec)

    folder = Path(config.run)
    if runs.rank() == 0:
        runs.create(config)
    module = TokenizerModule(
        tokenizer,
        objective,
        OptimConfig(**settings["optimizer"]),
        max_steps=trainer_settings["max_steps"],
        ema=EMAConfig(**settings["ema"]),
        accumulate=share["accumulate"],
        seed=config.seed,
        nan_limit=trainer_settings["nan_limit"],
        compile=trainer_settings["compile"],
    )
    metrics = MetricsCsv(folder / "metrics.csv", settings["logger"]["every"])
    trainer = build_trainer(
        max_steps=trainer_settings["max_steps"],
        folder=folder,
        precision=trainer_settings["precision"],
        devices=devices,
        num_nodes=trainer_settings["num_nodes"],
        loggers=build_loggers(settings["logger"], folder, settings),
        callbacks=_callbacks(settings, folder, data, share, metrics, lengths),
    )

    def train_loader(start: int) -> Iterable[Any]:
        total = trainer_settings["max_steps"] * share["accumulate"]
        return data.train_loader(start, total=total, rank=trainer.global_rank, **share)

    try:
        fit(trainer, module, train_loader, newest_good(folder / "checkpoints"))
    finally:
        close(trainer.loggers)
    results = last_figures(folder / "metrics.csv") if trainer.is_global_zero else {}
    if trainer.is_global_zero:
        module.averaged.save_pretrained(folder / "export", metadata=card(settings, data, results, folder))
        print(f"reconstructions: {newest_picture(folder)}\nexport: {folder / 'export'}", flush=True)
    return results


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


def device_count(devices: int | str) -> int:
    """Processes on this machine: `auto` is one for every GPU, or one on the CPU."""
    return max(1, torch.cuda.device_count()) if devices == "auto" else int(devices)


def card(settings: dict[str, Any], data: DataModule, results: dict[str, float], folder: Path) -> dict[str, Any]:
    """What an export says of its making; the keys are those of `smalti.exports.METADATA`."""
    experiment, scale, steps = settings["experiment"], settings["scale"], settings["trainer"]["max_steps"]
    picture = newest_picture(folder)
    crop = "ADM centre crop" if data.crop == "adm" else "shorter side resized (bicubic, antialiased), centre crop"
    return {
        "title": f"{experiment} ({scale}) after {steps} steps",
        "source": f"python train.py experiment={experiment} scale={scale}, run {'/'.join(folder.parts[-2:])}",
        "training_data": data.describe(),
        "preprocessing": f"RGB in [0, 1], {crop}, {data.image_size} px",
        "results": results,
        "picture": None if picture is None else str(picture),
    }


def last_figures(path: Path) -> dict[str, float]:
    """Losses and validation figures of the last row: a run killed after its last step has no others."""
    with path.open() as file:
        last = list(csv.DictReader(file))[-1]
    return {name: float(value) for name, value in last.items() if value and name.startswith(("loss", "validation/"))}


def newest_picture(folder: Path) -> Path | None:
    """The last picture of a run, None before the first."""
    return max((folder / "images").glob("step-*.png"), default=None)


def _callbacks(
    settings: dict[str, Any],
    folder: Path,
    data: DataModule,
    share: dict[str, int],
    metrics: MetricsCsv,
    lengths: list[int],
) -> list[pl.Callback]:
    """In the order in which they act at a step's end."""
    every, images = settings["validation"]["every"], settings["validation"]["images"]

    def validation_batches() -> Iterable[dict[str, Any]]:
        return data.validation_loader(images=images, rank=runs.rank(), **share)

    pictured = next(iter(data.validation_loader(images=PICTURED)))["image"]
    checkpointing = Checkpointing(
        folder / "checkpoints", settings["checkpoint"]["every"], settings["checkpoint"]["keep"]
    )
    return [
        Validation(validation_batches, every, lengths=lengths, length_images=settings["validation"]["length_images"]),
        Pictures(pictured, folder / "images", every, lengths),
        metrics,
        checkpointing,
        Signals(checkpointing),
        ProgressBar(metrics),
    ]
