"""Figures and pictures of the averaged model on a fixed number of validation images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from smalti.evaluation.lengths import bytes_of, decode_prefixes
from smalti.evaluation.metrics import Mean, ReconstructionMetrics, psnr
from smalti.training.draws import seed_of
from smalti.training.module import StepOutput, TrainingModule
from smalti.training.tokenizer_module import TokenizerModule

Batches = Callable[[], Iterable[dict[str, Any]]]
STRIP_ROWS = 4  # images in the strip: a decoder that samples makes each of them once for every length


class Validation(pl.Callback):
    """PSNR, SSIM, codebook usage and perplexity of `ema.model` every `every` steps and at the last one.

    Decoders that sample get the noise that evaluate.py gives them (with the same seed and batches), each time anew.

    batches: gives this process's part of the validation images anew on each call (those of rank r: r, r + processes,
    …); the number of images stands in the row beside the figures that depend on it.
    lengths: numbers of tokens at which `psnr@…` is measured too, on the first `length_images` of them.
    """

    def __init__(self, batches: Batches, every: int, *, lengths: Sequence[int] = (), length_images: int = 64) -> None:
        self.batches, self.every, self.lengths, self.length_images = batches, every, lengths, length_images

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TokenizerModule)
        if due(outputs["output"], self.every, pl_module):
            with evaluating(pl_module.averaged):
                figures = self.measure(trainer, pl_module)
            pl_module.figures |= {f"validation/{name}": value for name, value in figures.items()}

    @torch.inference_mode()
    def measure(self, trainer: pl.Trainer, module: TokenizerModule) -> dict[str, float]:
        tokenizer = module.averaged
        metrics = ReconstructionMetrics(tokenizer.spec.codebook_size, depth=tokenizer.spec.depth)
        by_length = {k: Mean() for k in self.lengths}
        left = len(range(trainer.global_rank, self.length_images, trainer.world_size)) if self.lengths else 0
        for number, batch in enumerate(self.batches()):
            seed = seed_of("evaluate", module.seed, number * trainer.world_size + trainer.global_rank)
            images = batch["image"].to(module.device, non_blocking=True).float() / 255
            with trainer.precision_plugin.forward_context():
                tokens = tokenizer.encode(images)
                whole = tokenizer.decode(tokens, seed=seed)
            metrics.update(images, whole, tokens.indices)
            count = min(left, len(images))
            left -= count
            if not count:
                continue
            with trainer.precision_plugin.forward_context():
                shorter = [k for k in self.lengths if k < tokenizer.spec.length]
                for k, decoded in decode_prefixes(tokenizer, tokens[:count], shorter, seed=seed):
                    by_length[k].update(psnr(images[:count], decoded))
            if tokenizer.spec.length in by_length:
                by_length[tokenizer.spec.length].update(psnr(images[:count], whole[:count]))
        metrics.all_reduce()
        for mean in by_length.values():
            mean.all_reduce()
        prefixes = {f"psnr@{k}": mean.compute() for k, mean in by_length.items()}
        return {"images": metrics.count, **metrics.compute(), **prefixes}


class Pictures(pl.Callback):
    """`step-….png`: validation images over their reconstructions by `ema.model`, also for the trainer's loggers; and
    `strip-….png`: the first of them at each of `lengths` tokens.

    images: uint8 (b, 3, h, w), the same ones each time.
    """

    def __init__(self, images: Tensor, folder: Path, every: int, lengths: Sequence[int] = ()) -> None:
        self.images, self.folder, self.every, self.lengths = images, folder, every, lengths

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TokenizerModule)
        if trainer.is_global_zero and due(outputs["output"], self.every, pl_module):
            with evaluating(pl_module.averaged):
                self.draw(trainer, pl_module, outputs["output"].step)

    @torch.inference_mode()
    def draw(self, trainer: pl.Trainer, module: TokenizerModule, step: int) -> None:
        from smalti.evaluation.pictures import reconstructions, save_png, strip, tokens_in_words

        images, tokenizer = self.images.to(module.device).float() / 255, module.averaged
        seed = seed_of("evaluate", module.seed, 0)
        with trainer.precision_plugin.forward_context():
            tokens = tokenizer.encode(images)
            decoded = tokenizer.decode(tokens, seed=seed)
        picture = reconstructions(images, decoded.float(), title=f"step {step:,}")
        log_picture(trainer, "reconstructions", save_png(picture, self.folder / f"step-{step:09d}.png"), step)
        if not self.lengths:
            return
        columns = [("original", images[:STRIP_ROWS])]
        with trainer.precision_plugin.forward_context():
            for k, part in decode_prefixes(tokenizer, tokens[:STRIP_ROWS], self.lengths, seed=seed):
                columns.append((tokens_in_words(k, bytes_of(tokenizer.spec, k)), part.float()))
        picture = strip(columns, title=f"step {step:,}")
        log_picture(trainer, "strip", save_png(picture, self.folder / f"strip-{step:09d}.png"), step)


def log_picture(trainer: pl.Trainer, name: str, path: Path, step: int) -> None:
    """Hand a PNG to the loggers that show pictures."""
    for logger in trainer.loggers:
        if isinstance(logger, pl.loggers.WandbLogger):
            logger.log_image(name, [str(path)], step=step)
        elif isinstance(logger, pl.loggers.TensorBoardLogger):
            from PIL import Image
            from torchvision.transforms.functional import pil_to_tensor

            logger.experiment.add_image(name, pil_to_tensor(Image.open(path)), step)


def due(output: StepOutput, every: int, module: TrainingModule) -> bool:
    """Whether this micro-batch ends a step at which something is measured: every `every`-th, and the last one."""
    return output.ended and (output.step % every == 0 or output.step == module.max_steps)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode for a while: without a moving average it is the one in training."""
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)
