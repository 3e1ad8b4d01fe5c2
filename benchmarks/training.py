"""What Lightning, data and logging cost on top of the bare training step.

    python benchmarks/training.py [--pairs 8] [--threads 2] [--size s128|tiny]

A whole run (shards read and decoded by one worker, TokenizerModule, guard, EMA, metrics.csv, progress) of TiTok-S-128
at 256 px with batch 4, or of the tiny default with batch 32. After each of its steps the bare step of an equal model
runs in the same process: forward, losses, backward, clipping, AdamW, moving average, on a fixed batch in memory. The
ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# tokenizers.py beside this file must not stand for Hugging Face's package, which Lightning's libraries import.
sys.path.remove(str(Path(__file__).resolve().parent))

import lightning.pytorch as pl
import torch

from smalti.data.module import DataModule
from smalti.objectives.pixels import PixelObjective
from smalti.tokenizers.quantizers.vq import VectorQuantizer
from smalti.tokenizers.titok import TiTok
from smalti.training.callbacks.checkpointing import Checkpointing
from smalti.training.callbacks.metrics_csv import MetricsCsv
from smalti.training.callbacks.progress import ProgressBar
from smalti.training.callbacks.signals import Signals
from smalti.training.loop import build_trainer, fit
from smalti.training.optim import OptimConfig
from smalti.training.tokenizer_module import TokenizerModule

SIZES: dict[str, dict[str, Any]] = {
    "s128": {"image_size": 256, "tokens": 128, "batch": 4, "tower": (512, 8, 8, 16)},
    "tiny": {"image_size": 64, "tokens": 32, "batch": 32, "tower": (128, 3, 4, 8)},
}


def model(size: dict[str, Any]) -> TiTok:
    tower = dict(zip(("width", "depth", "heads", "patch_size"), size["tower"], strict=True))
    return TiTok(
        image_size=size["image_size"],
        num_latent_tokens=size["tokens"],
        quantizer=VectorQuantizer(codebook_size=4096, dim=12, distance="cosine"),
        encoder=tower,
        decoder=tower,
    )


class BareStep:
    """The same computation without a framework around it."""

    def __init__(self, size: dict[str, Any]) -> None:
        self.model, self.objective = model(size), PixelObjective()
        self.parameters = list(self.model.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.images = torch.rand(size["batch"], 3, size["image_size"], size["image_size"])

    def __call__(self) -> None:
        terms = self.objective(self.model(self.images), self.images, 0)
        torch.stack(list(terms.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 0.001)


class Interleave(pl.Callback):
    """Runs the bare step after each step of the run, outside of the run's clock."""

    def __init__(self, bare: BareStep) -> None:
        self.bare, self.seconds, self.bare_seconds = bare, list[float](), list[float]()
        self._mark: float | None = None

    def on_train_batch_end(self, *arguments: Any) -> None:
        end = time.perf_counter()
        if self._mark is not None:
            self.seconds.append(end - self._mark)
        self.bare()
        self._mark = time.perf_counter()
        self.bare_seconds.append(self._mark - end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8, help="measured pairs, after two that are not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="s128")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size, steps = SIZES[options.size], options.pairs + 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = DataModule(image_size=size["image_size"], batch_size=size["batch"], size=400, cache=name)
        data.check()
        metrics = MetricsCsv(folder / "metrics.csv", 50)
        checkpointing = Checkpointing(folder / "checkpoints", 10**9)
        checkpointing.save = lambda trainer: folder  # type: ignore[method-assign, assignment]  # not what is measured
        pair = Interleave(BareStep(size))
        callbacks = [metrics, checkpointing, Signals(checkpointing), ProgressBar(metrics), pair]
        trainer = build_trainer(max_steps=steps, folder=folder, callbacks=callbacks, accelerator="cpu")
        module = TokenizerModule(model(size), PixelObjective(), OptimConfig(), max_steps=steps)
        fit(trainer, module, lambda start: data.train_loader(start, total=steps))
    ours, bare = statistics.median(pair.seconds[2:]), statistics.median(pair.bare_seconds[3:])
    print(
        f"{options.size}, fp32, torch {torch.__version__}, {options.threads} threads, medians of {options.pairs} pairs"
    )
    print(f"step of a run: {ours:.3f} s, bare {bare:.3f} s, ratio {ours / bare:.3f} (at most 1.10)")


if __name__ == "__main__":
    main()
