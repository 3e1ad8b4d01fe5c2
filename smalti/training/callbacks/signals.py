"""SIGINT, SIGTERM and SIGUSR1 end a run gracefully: the step is finished, a checkpoint written, exit code 75."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

import lightning.pytorch as pl

from smalti.errors import Stopped
from smalti.training.callbacks.checkpointing import Checkpointing
from smalti.training.module import StepOutput, TrainingModule

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Signals(pl.Callback):
    """Raises Stopped at the end of the step in which a signal came to any process of the run.

    A handler only leaves a note; further signals, also during the save, change nothing. Stands behind Checkpointing.
    """

    def __init__(self, checkpointing: Checkpointing) -> None:
        self.checkpointing = checkpointing
        self._received: signal.Signals | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        guard = pl_module.guard

        def note(number: int, frame: FrameType | None) -> None:
            if self._received is None and trainer.is_global_zero:
                print(f"{signal.Signals(number).name}: finishing the step, then writing a checkpoint", file=sys.stderr)
            self._received = signal.Signals(number)
            guard.stop_requested = True

        # In place of Lightning's handlers, which reduce over processes inside the handler and exit with code 0.
        # Lightning puts back those it found when it tears down.
        for number in SIGNALS:
            signal.signal(number, note)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        output: StepOutput = outputs["output"]
        # At the last step the run is done anyway.
        if output.ended and pl_module.guard.stopping and output.step < pl_module.max_steps:
            path = self.checkpointing.save(trainer)
            name = self._received.name if self._received else "a signal to another process"
            raise Stopped(f"stopped by {name} at step {output.step}; {path} is written: run the same command to go on")
