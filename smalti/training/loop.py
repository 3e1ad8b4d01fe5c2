"""Lightning's Trainer as every run here uses it, and the one call that trains."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from smalti.errors import Stopped, UserError
from smalti.training.checkpoint import VerifiedCheckpoints
from smalti.training.module import TrainingModule

PRECISIONS = ("32-true", "bf16-mixed")


def build_trainer(
    *,
    max_steps: int,
    folder: Path,
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Logger] = (),
    precision: str = "32-true",
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str | Strategy = "auto",
    deterministic: bool | None = None,
) -> pl.Trainer:
    """A Trainer whose only rhythm is the optimizer step: no epochs, validation loop, bar or checkpoints of its own.

    callbacks: in the order in which they act at a step's end: what measures (Validation, Pictures), MetricsCsv,
    Checkpointing, Signals, ProgressBar. deterministic: refuse operations that give other bits each time; by default on
    CPUs, where it costs nothing, so that a resumed run ends with the bits of an uninterrupted one.
    """
    if precision not in PRECISIONS:
        raise UserError(f"trainer.precision={precision} is not supported; use one of {', '.join(PRECISIONS)}")
    _silence()
    if strategy in ("auto", "ddp") and (devices * num_nodes > 1 or "TORCHELASTIC_RUN_ID" in os.environ):
        strategy = _ddp()
    trainer = pl.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]
        logger=list(loggers) or False,
        callbacks=list(callbacks),
        plugins=[VerifiedCheckpoints()],
        default_root_dir=folder,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    on_cpu = trainer.strategy.root_device.type == "cpu"
    if on_cpu if deterministic is None else deterministic:
        torch.use_deterministic_algorithms(True)
        deterministic_mode: Any = torch.utils.deterministic
        deterministic_mode.fill_uninitialized_memory = False  # it would write every buffer twice
    if not on_cpu:
        torch.set_float32_matmul_precision("high")  # TF32, as published
    # Lightning broadcasts a flag and waits for it before every batch, in case a process got SIGTERM; Guard does that
    # with the reduction of each step.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def fit(
    trainer: pl.Trainer,
    module: TrainingModule,
    train_loader: Callable[[int], Iterable[Any]],
    checkpoint: Path | None = None,
) -> None:
    """Train to `max_steps`, going on from `checkpoint` when there is one.

    train_loader: makes the loader of the whole run, started at a micro-batch; its `len` is the whole run's. It is made
    after the checkpoint is read: what was read decides where it starts, also when a damaged file was replaced.
    Raises Stopped (a signal), Diverged, UserError.
    """
    try:
        trainer.fit(module, datamodule=_FromStep(train_loader, module), ckpt_path=checkpoint)
    except (Stopped, UserError):
        if trainer.local_rank > 0 and isinstance(_environment_of(trainer), LightningEnvironment):
            # Lightning started this process, and would kill the first one, whose exit code counts, for a code ≠ 0 here.
            sys.exit(0)
        raise


def _environment_of(trainer: pl.Trainer) -> Any:
    return getattr(trainer.strategy, "cluster_environment", None)


def _ddp() -> DDPStrategy:
    """Buffers are not broadcast in every forward: quantizers reduce what they keep, the rest is the same everywhere."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, name: False}
    return DDPStrategy(**options)


class _FromStep(pl.LightningDataModule):
    def __init__(self, loader: Callable[[int], Iterable[Any]], module: TrainingModule) -> None:
        super().__init__()
        self._loader, self._module = loader, module

    def train_dataloader(self) -> Iterable[Any]:
        return self._loader(self._module.step * self._module.accumulate)


def _silence() -> None:
    """Advice of Lightning's that does not apply: loaders, loggers and modes are what they are on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*resuming from a checkpoint that ended before the epoch ended.*",
        ".*in eval mode at the start of training.*",
        ".*GPU available but not used.*",
        ".*litlogger.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
    ):
        warnings.filterwarnings("ignore", message=message)
