"""Figures and pictures of the averaged model on a fixed number of validation images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from smalti.evaluation.metrics import ReconstructionMetrics
from smalti.training.tokenizer_module import StepOutput, TokenizerModule

Batches = Callable[[], Iterable[dict[str, Any]]]


class Validation(pl.Callback):
    """PSNR, SSIM, codebook usage and perplexity of `ema.model` every `every` steps and at the last one.

    batches: gives this process's part of the validation images anew on each call; the number of images stands in
    the row beside the figures that depend on it.
    """

    def __init__(self, batches: Batches, every: int) -> None:
        self.batches, self.every = batches, every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TokenizerModule)
        if _due(outputs["output"], self.every, pl_module):
            figures = self.measure(trainer, pl_module)
            pl_module.figures |= {f"validation/{name}": value for name, value in figures.items()}

    @torch.inference_mode()
    def measure(self, trainer: pl.Trainer, module: TokenizerModule) -> dict[str, float]:
        metrics = ReconstructionMetrics(module.tokenizer.spec.codebook_size)
        for batch in self.batches():
            images = batch["image"].to(module.device, non_blocking=True).float() / 255
            with trainer.precision_plugin.forward_context():
                reconstructions, indices = module.reconstruct(images)
            metrics.update(images, reconstructions, indices)
        metrics.all_reduce()
        return {"images": metrics.count, **metrics.compute()}


class Pictures(pl.Callback):
    """`step-….png`: validation images over their reconstructions by `ema.model`, also for the trainer's loggers.

    images: uint8 (b, 3, h, w), the same ones each time.
    """

    def __init__(self, images: Tensor, folder: Path, every: int) -> None:
        self.images, self.folder, self.every = images, folder, every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TokenizerModule)
        if trainer.is_global_zero and _due(outputs["output"], self.every, pl_module):
            self.draw(trainer, pl_module, outputs["output"].step)

    @torch.inference_mode()
    def draw(self, trainer: pl.Trainer, module: TokenizerModule, step: int) -> None:
        from smalti.evaluation.pictures import reconstructions, save_png

        images = self.images.to(module.device).float() / 255
        with trainer.precision_plugin.forward_context():
            decoded, _ = module.reconstruct(images)
        picture = reconstructions(images, decoded.float(), title=f"step {step:,}")
        path = save_png(picture, self.folder / f"step-{step:09d}.png")
        log_picture(trainer, path, step)


def log_picture(trainer: pl.Trainer, path: Path, step: int) -> None:
    """Hand a PNG to the loggers that show pictures."""
    for logger in trainer.loggers:
        if isinstance(logger, pl.loggers.WandbLogger):
            logger.log_image("reconstructions", [str(path)], step=step)
        elif isinstance(logger, pl.loggers.TensorBoardLogger):
            from PIL import Image
            from torchvision.transforms.functional import pil_to_tensor

            logger.experiment.add_image("reconstructions", pil_to_tensor(Image.open(path)), step)


def _due(output: StepOutput, every: int, module: TokenizerModule) -> bool:
    return output.ended and (output.step % every == 0 or output.step == module.max_steps)
