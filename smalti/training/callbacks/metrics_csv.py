"""metrics.csv and the other loggers: one row every so many steps, the same to the last bit after a resume."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from smalti.training.module import StepOutput, TrainingModule


class MetricsCsv(pl.Callback):
    """Appends to `path` the means since the row before, at every `every`-th step and whenever something was validated.

    Columns: step, loss and its terms (`loss/…`), statistics, gradient norms, learning rates, skipped steps, what other
    callbacks measured (`validation/…`). No timings: the file is a function of the run's config. The trainer's loggers
    get the same rows. Until a row is due, figures stay on the device.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self.last: dict[str, float] = {}  # the newest row, for the progress bar
        self._pending: dict[str, list[Tensor]] = {}
        self._settled: dict[str, list[float]] = {}  # means over processes of steps since the row before
        self._table = Table(path)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._table.cut_back(trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        output: StepOutput = outputs["output"]
        for name, value in _figures(output).items():
            self._pending.setdefault(name, []).append(value)
        if not output.ended:
            return
        if output.step % self.every and output.step != pl_module.max_steps and not pl_module.figures:
            return
        self._settle(trainer)
        row: dict[str, float] = {"step": output.step}
        row |= {name: _mean(values) for name, values in self._settled.items()}
        row |= output.rates
        row["skipped"] = int(pl_module.guard.skipped)
        row |= pl_module.figures
        self._settled, self.last = {}, row
        pl_module.figures = {}
        if trainer.is_global_zero:
            self._table.append(row)
        for logger in trainer.loggers:
            logger.log_metrics({name: value for name, value in row.items() if name != "step"}, step=output.step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._settle(trainer)
        checkpoint["metrics_since_last_row"] = self._settled
        if trainer.is_global_zero:
            self._table.sync()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._settled = checkpoint["metrics_since_last_row"]
        self.last = self._table.newest(checkpoint["global_step"])  # of a run that has no step left to do

    def _settle(self, trainer: pl.Trainer) -> None:
        """Bring pending figures to the host: one transfer, one reduction."""
        names = [name for name, values in self._pending.items() for _ in values]
        if not names:
            return
        values = torch.stack([value for values in self._pending.values() for value in values]).double()
        if trainer.world_size > 1:
            dist.all_reduce(values)
            values /= trainer.world_size
        for name, value in zip(names, values.tolist(), strict=True):
            self._settled.setdefault(name, []).append(value)
        self._pending = {}


class Table:
    """A CSV file that only grows, whose header grows with its columns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] = []

    def cut_back(self, step: int) -> None:
        """Forget rows after `step` and a row that was being written when the process died."""
        kept = self._rows(step)
        self._columns = list(kept[0]) if kept else []
        if kept:
            self._rewrite(kept)
        else:
            self.path.unlink(missing_ok=True)

    def newest(self, step: int) -> dict[str, float]:
        """The last row up to `step`, without empty fields; empty when there is none."""
        rows = self._rows(step)
        return {name: float(value) for name, value in rows[-1].items() if value} if rows else {}

    def append(self, row: Mapping[str, float]) -> None:
        new = [name for name in row if name not in self._columns]
        if new:
            rows = self._rows() if self._columns else []
            self._columns += new
            self._rewrite([*rows, row])
        else:
            with self.path.open("a", newline="") as file:
                self._writer(file).writerow(row)

    def sync(self) -> None:
        """Have the rows on disk before the checkpoint that follows them."""
        if self.path.exists():
            with self.path.open("a") as file:
                os.fsync(file.fileno())

    def _rows(self, step: float = math.inf) -> list[dict[str, str]]:
        """Whole rows up to `step`."""
        text = self.path.read_text() if self.path.exists() else ""
        rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        return [row for row in rows if int(row["step"]) <= step]

    def _writer(self, file: Any) -> csv.DictWriter[str]:
        return csv.DictWriter(file, self._columns, restval="", lineterminator="\n")

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        partial = self.path.with_name(self.path.name + ".tmp")
        with partial.open("w", newline="") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)


def _figures(output: StepOutput) -> dict[str, Tensor]:
    terms = {"loss": output.loss}
    terms |= {f"loss/{name}": value for name, value in {**output.terms, **output.discriminator}.items()}
    terms |= {f"statistics/{name}": value for name, value in output.statistics.items()}
    return {name: value.reshape(()) for name, value in {**terms, **output.norms}.items()}


def _mean(values: list[float]) -> float:
    """Over the finite ones: skipped steps have their own column."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan
