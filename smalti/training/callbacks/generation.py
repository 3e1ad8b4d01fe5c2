"""What is measured and shown of a generator in training: its loss on validation images, and samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from smalti.evaluation.metrics import Mean
from smalti.generators.base import Condition
from smalti.training.callbacks.validation import due, evaluating, log_picture
from smalti.training.draws import generator, seed_of
from smalti.training.generator_module import GeneratorModule


class ValidationLoss(pl.Callback):
    """The averaged generator's loss, its terms and statistics, every `every` steps and at the last one.

    Dropout is off; the draws of a batch are the same each time; samples that weigh 0 do not count. batches: gives this
    process's part of the validation images (or their tokens) anew on each call.
    """

    def __init__(self, batches: Callable[[], Iterable[dict[str, Any]]], every: int) -> None:
        self.batches, self.every = batches, every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, GeneratorModule)
        if due(outputs["output"], self.every, pl_module):
            with evaluating(pl_module.averaged):
                figures = self.measure(trainer, pl_module)
            pl_module.figures |= {f"validation/{name}": value for name, value in figures.items()}

    @torch.no_grad()
    def measure(self, trainer: pl.Trainer, module: GeneratorModule) -> dict[str, float]:
        means: dict[str, Mean] = {}
        for number, batch in enumerate(self.batches()):
            batch = trainer.strategy.batch_to_device(batch, module.device)
            key = ("validate", module.seed, number * trainer.world_size + trainer.global_rank)
            with trainer.precision_plugin.forward_context():
                tokens = module.tokens_of(batch, generator("posterior", *key))
                made = module.averaged.draw(len(tokens), generator(*key), step=module.step)
                draws = {name: value.to(module.device) for name, value in made.items()}
                weight = {"weight": batch["weight"]} if "weight" in batch else {}
                output = module.averaged(tokens, module.condition_of(batch), draws, **weight)
            counted = int(batch["weight"].sum()) if weight else len(tokens)
            for name, value in {"loss": output.loss, **output.terms, **output.statistics}.items():
                means.setdefault(name, Mean()).update(value.float().reshape(1).expand(counted))
        for mean in means.values():
            mean.all_reduce()
        images = int(means["loss"].sums["count"])
        return {"images": images, **{name: mean.compute() for name, mean in means.items()}}


class Samples(pl.Callback):
    """`step-….png`: `count` samples of the averaged generator, from the same seeds and labels or texts each time.

    The module's tokenizer decodes them. Labels run through all classes evenly; texts are those of `batches`, which
    gives the first validation images anew on each call, and captions.txt beside the pictures has them, one a line.
    """

    def __init__(
        self, count: int, folder: Path, every: int, batches: Callable[[], Iterable[dict[str, Any]]] = tuple
    ) -> None:
        self.count, self.folder, self.every, self.batches = count, folder, every, batches

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, GeneratorModule)
        if trainer.is_global_zero and due(outputs["output"], self.every, pl_module):
            with evaluating(pl_module.averaged):
                self.draw(trainer, pl_module, outputs["output"].step)

    @torch.inference_mode()
    def draw(self, trainer: pl.Trainer, module: GeneratorModule, step: int) -> None:
        from smalti.evaluation.pictures import grid, save_png

        assert module.tokenizer is not None
        images: list[Tensor] = []
        for number, (condition, rows) in enumerate(self.conditions(trainer, module)):
            seeds = torch.arange(rows) + sum(map(len, images))
            with trainer.precision_plugin.forward_context():
                tokens = module.averaged.generate(condition, seeds=seeds)
            images.append(module.tokenizer.decode(tokens, seed=seed_of("evaluate", module.seed, number)).float())
        picture = grid([torch.cat(images)], title=f"step {step:,}")
        log_picture(trainer, "samples", save_png(picture, self.folder / f"step-{step:09d}.png"), step)

    def conditions(self, trainer: pl.Trainer, module: GeneratorModule) -> Iterator[tuple[Condition, int]]:
        """What the samples are to show, and how many of them."""
        if module.averaged.text_dim is None:
            labels = spread_labels(self.count, module.averaged.num_classes)
            yield Condition(labels).to(module.device), self.count
            return
        batches = list(self.batches())
        captions = chain.from_iterable(batch["caption"] for batch in batches if "caption" in batch)
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{' '.join(caption.split())}\n" for caption in captions)
        (self.folder / "captions.txt").write_text(lines, encoding="utf-8")
        for batch in batches:
            batch = trainer.strategy.batch_to_device(batch, module.device)
            yield module.condition_of(batch), len(batch["key"])


def spread_labels(count: int, num_classes: int | None) -> Tensor | None:
    """(count,) labels: all classes in turn, or evenly spaced ones where there are more than `count`."""
    if num_classes is None:
        return None
    numbers = torch.arange(count)
    return numbers * num_classes // count if num_classes > count else numbers % num_classes
