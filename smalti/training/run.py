"""One training run: from a checked config to a finished run folder, with an export in it."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf

from smalti import runs
from smalti.data.module import DataModule
from smalti.training import generator_run, tokenizer_run
from smalti.training.callbacks.checkpointing import Checkpointing
from smalti.training.callbacks.metrics_csv import MetricsCsv
from smalti.training.callbacks.progress import ProgressBar
from smalti.training.callbacks.signals import Signals
from smalti.training.checkpoint import newest_good
from smalti.training.loggers import build_loggers, close
from smalti.training.loop import build_trainer, fit
from smalti.training.prepared import Prepared


def train(config: DictConfig) -> dict[str, float]:
    """Build what the config names, train to `trainer.max_steps`, export the averaged weights; the last metrics.

    Nothing is written before all of it is built. Raises UserError, Diverged or Stopped.
    """
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    trainer_settings = settings["trainer"]
    devices = device_count(trainer_settings["devices"])
    world_size = runs.processes() if runs.processes() > 1 else devices * trainer_settings["num_nodes"]
    share = {"accumulate": trainer_settings["accumulate"], "world_size": world_size}

    prepare = tokenizer_run.prepare if config.generator is None else generator_run.prepare
    prepared = prepare(config, settings, share)
    module, data = prepared.module, prepared.data
    folder = Path(config.run)
    if runs.rank() == 0:
        runs.create(config)
        for name, model in prepared.beside.items():
            model.save_pretrained(folder / name)
    metrics = MetricsCsv(folder / "metrics.csv", settings["logger"]["every"])
    trainer = build_trainer(
        max_steps=trainer_settings["max_steps"],
        folder=folder,
        precision=trainer_settings["precision"],
        devices=devices,
        num_nodes=trainer_settings["num_nodes"],
        loggers=build_loggers(settings["logger"], folder, settings),
        callbacks=_callbacks(settings, folder, prepared, metrics),
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
        pictures = "" if prepared.shows is None else f"{prepared.shows}: {newest_picture(folder)}\n"
        print(f"{pictures}export: {folder / 'export'}", flush=True)
    return results


def device_count(devices: int | str) -> int:
    """Processes on this machine: `auto` is as many as torchrun started, else one for every GPU, or one on the CPU."""
    if devices != "auto":
        return int(devices)
    return int(os.environ.get("LOCAL_WORLD_SIZE", max(1, torch.cuda.device_count())))


def card(settings: dict[str, Any], data: DataModule, results: dict[str, float], folder: Path) -> dict[str, Any]:
    """What an export says of its making; the keys are those of `smalti.exports.METADATA`."""
    experiment, scale, steps = settings["experiment"], settings["scale"], settings["trainer"]["max_steps"]
    picture = newest_picture(folder)
    return {
        "title": f"{experiment} ({scale}) after {steps} steps",
        "source": f"python train.py experiment={experiment} scale={scale}, run {'/'.join(folder.parts[-2:])}",
        "training_data": data.describe(),
        "preprocessing": data.preprocessing(),
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


def _callbacks(settings: dict[str, Any], folder: Path, prepared: Prepared, metrics: MetricsCsv) -> list[pl.Callback]:
    """In the order in which they act at a step's end."""
    checkpointing = Checkpointing(
        folder / "checkpoints", settings["checkpoint"]["every"], settings["checkpoint"]["keep"]
    )
    return [*prepared.measuring(), metrics, checkpointing, Signals(checkpointing), ProgressBar(metrics)]
