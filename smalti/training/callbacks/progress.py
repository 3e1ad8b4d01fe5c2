"""How a run is going: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any, TextIO

import lightning.pytorch as pl
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from smalti.training.callbacks.metrics_csv import MetricsCsv
from smalti.training.module import StepOutput

WINDOW = 50  # micro-batches over which speed is averaged


class ProgressBar(pl.Callback):
    """Steps, images/s, the share of time spent waiting for data, loss terms of the newest row, time left.

    In a terminal a bar, redrawn four times a second at most; elsewhere (a file, a cluster's log) one line a row of
    metrics.csv, at most one every `line_s` seconds, and every validation. Speed leaves validation and saving out, time
    left counts them. Stands behind all other callbacks.
    """

    def __init__(self, metrics: MetricsCsv, *, line_s: float = 10.0, stream: TextIO | None = None) -> None:
        self.metrics, self.line_s = metrics, line_s
        self.stream = stream or sys.stderr
        self._bar: Progress | None = None
        self._times: deque[tuple[int, float, float]] = deque(maxlen=WINDOW)  # images, seconds waiting, seconds busy
        self._shown: dict[str, float] = {}
        self._shown_at = self._began = self._mark = self._started = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = self._mark = time.perf_counter()
        self._first_step = trainer.global_step
        if trainer.is_global_zero and self.stream.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[say]}"),
            )
            self._bar = Progress(*columns)
            self._bar.add_task("training", total=trainer.max_steps, completed=trainer.global_step, say="")
            self._live = Live(self._bar, console=Console(file=self.stream), auto_refresh=False)
            self._live.start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        output: StepOutput = outputs["output"]
        self._times.append((output.samples, self._started - self._mark, output.finished - self._started))
        self._mark = now = time.perf_counter()
        if not output.ended or not trainer.is_global_zero:
            return
        if self._bar is not None:
            if now - self._shown_at > 0.25 or output.step == trainer.max_steps:
                self._shown_at = now
                speed = self._speed(output.step, trainer.max_steps)
                self._bar.update(self._bar.task_ids[0], completed=output.step, say=speed)
                self._live.update(Group(self._bar, Text(_numbers(self.metrics.last))), refresh=True)
            return
        row = self.metrics.last
        measured = any(name.startswith("validation/") for name in row)
        if (
            row
            and row is not self._shown
            and (measured or now - self._shown_at > self.line_s or output.step == trainer.max_steps)
        ):
            self._shown, self._shown_at = row, now
            speed = self._speed(output.step, trainer.max_steps)
            print(f"step {output.step:,}/{trainer.max_steps:,}  {speed}  {_numbers(row)}", file=self.stream, flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._live.stop()
            self._bar = None

    def _speed(self, step: int, total: int) -> str:
        images, waited, busy = (sum(column) for column in zip(*self._times, strict=True))
        seconds = max(waited + busy, 1e-9)
        left = (time.perf_counter() - self._began) / (step - self._first_step) * (total - step)
        return f"{images / seconds:,.4g} images/s  data {waited / seconds:.0%}  {_clock(left)} left"


def _numbers(row: dict[str, float]) -> str:
    """The loss and its terms, then what was validated (PSNR by number of tokens in one), then skipped steps, if any."""
    shown = {name.removeprefix("loss/"): value for name, value in row.items() if name.split("/")[0] == "loss"}
    for name, value in row.items():
        kind, _, figure = name.partition("/")
        if kind == "validation":
            shown[f"validation {figure}" if figure in shown else figure] = value
    by_length = {name.removeprefix("psnr@"): shown.pop(name) for name in list(shown) if name.startswith("psnr@")}
    if row.get("skipped"):
        shown["skipped"] = row["skipped"]
    words = [f"{name} {value:.4g}" for name, value in shown.items()]
    if by_length:
        words.append(f"psnr@{'/'.join(by_length)} {'/'.join(f'{value:.1f}' for value in by_length.values())}")
    return "  ".join(words)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
