"""When checkpoints are written, and what happens when one cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from smalti.errors import Diverged, UserError
from smalti.training.checkpoint import VerifiedCheckpoints, checkpoint_path, list_checkpoints, prune
from smalti.training.module import StepOutput, TrainingModule


class Checkpointing(pl.Callback):
    """A checkpoint at every `every`-th step and at the last one; the newest `keep` (at least 2) stay.

    Also ends a run that diverged. Stands behind every callback that measures or logs: a checkpoint says that its step
    is done.
    """

    def __init__(self, folder: Path, every: int, keep: int = 2) -> None:
        if keep < 2:
            raise UserError(f"checkpoint.keep={keep}: at least 2 are kept, so that one is left when another is damaged")
        self.folder, self.every, self.keep = folder, every, keep
        self._saved = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        output: StepOutput = outputs["output"]
        if not output.ended:
            return
        guard = pl_module.guard
        if guard.diverged:
            raise Diverged(
                f"training diverged: the loss or gradient of {guard.streak} steps in a row was not finite "
                f"(trainer.nan_limit={guard.limit}), the last of them step {output.step}; checkpoints: "
                f"{self._last_good()}; try a lower optimizer.lr or a smaller optimizer.clip"
            )
        # In a row of skipped steps the weights are those of the checkpoint before, or the reason for the skipping.
        if output.step == pl_module.max_steps or (output.step % self.every == 0 and not guard.streak):
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> Path:
        """Write the checkpoint of this step, unless it is there. On all processes, which all raise when it fails."""
        path = checkpoint_path(self.folder, trainer.global_step)
        if self._saved == trainer.global_step:
            return path
        trainer.save_checkpoint(path)
        disk = trainer.strategy.checkpoint_io
        failure = disk.failure if isinstance(disk, VerifiedCheckpoints) else None
        if trainer.world_size > 1:
            failure = trainer.strategy.broadcast(failure)
        if failure is not None:
            raise UserError(f"checkpoint {failure}; {self._last_good()}; make room and run the same command again")
        self._saved = trainer.global_step
        if trainer.is_global_zero:
            prune(self.folder, self.keep)
        return path

    def _last_good(self) -> str:
        newest = list_checkpoints(self.folder)[:1]
        return f"the last good one is {newest[0]}" if newest else "there is no earlier one"
