"""TensorBoard and Weights & Biases beside metrics.csv, as the config's `logger` group asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from smalti.errors import UserError
from smalti.runs import rank


def build_loggers(settings: dict[str, Any], folder: Path, config: dict[str, Any]) -> list[Logger]:
    """The loggers of a run; their files lie in its folder.

    settings: {tensorboard: bool, wandb: null or {project, mode: "online" | "offline"}}. A resumed run goes on in the
    same Weights & Biases run, whose id stands in `wandb_id`; `step` is the axis of all its figures.
    """
    loggers: list[Logger] = []
    if settings["tensorboard"]:
        try:
            loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
        except ModuleNotFoundError as error:
            raise UserError("logger=tensorboard needs the package tensorboard: pip install tensorboard") from error
    if settings["wandb"] is not None:
        project, mode = settings["wandb"]["project"], settings["wandb"]["mode"]
        if mode not in ("online", "offline"):
            raise UserError(f"logger.wandb.mode={mode} is not known; use online or offline")
        remembered = folder / "wandb_id"
        logger = WandbLogger(
            name="/".join(folder.parts[-2:]),
            project=project,
            save_dir=folder,
            offline=mode == "offline",
            id=remembered.read_text().strip() if remembered.is_file() else None,
            resume="allow",
            config=config,
        )
        if rank() == 0:
            remembered.write_text(f"{logger.experiment.id}\n")
        loggers.append(logger)
    return loggers


def close(loggers: list[Logger]) -> None:
    """End what must be ended before another run starts in this process (a sweep)."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and rank() == 0:
            logger.experiment.finish()
