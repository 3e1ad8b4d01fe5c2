"""The smallest run that has every part: a tokenizer of some hundred weights, a GAN, a loader that starts anywhere.

Imported by the tests beside it, and run as a script where a test must kill a process:
`python tiny_training.py FOLDER [key=value …]`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from smalti.data.module import leave_signals_to_the_run
from smalti.objectives.adversarial import frozen
from smalti.objectives.base import Objective
from smalti.tokenizers.base import Tokenizer, TokenizerOutput
from smalti.tokenizers.quantizers.base import Draws, Quantized
from smalti.tokenizers.spec import Tokens, TokenSpec
from smalti.training.draws import generator

SIDE, WIDTH = 8, 6


class TinyTokenizer(Tokenizer):
    """Patches of 4 through a linear map, noise, dropout, a running mean: everything that a resume could lose."""

    def __init__(self, *, dropout: float = 0.1, noise: float = 0.1) -> None:
        super().__init__()
        self.spec = TokenSpec("continuous", length=4, dim=WIDTH, image_size=SIDE)
        self.noise = noise
        self.encoder = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.norm = nn.GroupNorm(1, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.ConvTranspose2d(WIDTH, 3, 4, stride=4)
        self.register_buffer("running_mean", torch.zeros(WIDTH))

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.weight

    def encode(self, images: Tensor) -> Tokens:
        return Tokens.full(self.encoder(images).flatten(2).mT)

    def decode(self, tokens: Tokens, *, seed: int = 0) -> Tensor:
        return self.decoder(self.norm(tokens.latents.mT.unflatten(2, (2, 2)))).clamp(0, 1)

    def forward(self, images: Tensor, draws: Draws | None = None) -> TokenizerOutput:
        latents = self.encoder(images)
        if draws:
            latents = latents + draws["noise"]
        with torch.no_grad():
            self.running_mean.lerp_(latents.mean((0, 2, 3)).float(), 0.1)
        reconstruction = self.decoder(self.norm(self.dropout(latents)))
        losses = {"size": latents.square().mean()}
        return TokenizerOutput(
            Quantized(latents.flatten(2).mT, None, losses, {"spread": latents.std()}), reconstruction
        )

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        return {"noise": self.noise * torch.randn(batch_size, WIDTH, 2, 2, generator=generator)} if self.noise else {}


class TinyObjective(Objective):
    """Squares, and from `start` on a discriminator with a running mean; `poison` images of 255 give NaN."""

    def __init__(self, start: int | None = None) -> None:
        super().__init__()
        if start is not None:
            self.discriminator = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.GELU(), nn.Conv2d(4, 1, 1))
        self.discriminator_start = start or 0
        self.register_buffer("real_mean", torch.zeros(()))

    def forward(
        self, output: TokenizerOutput, images: Tensor, step: int, last_layer: Tensor | None = None
    ) -> dict[str, Tensor]:
        poison = torch.where(images.mean() > 0.999, torch.nan, 1.0)
        terms = {"reconstruction": (output.reconstruction - images).square().mean() * poison}
        terms["size"] = 0.01 * output.quantized.losses["size"]
        if self.discriminator_acts(step):
            with frozen(self.discriminator):
                terms["adversarial"] = -0.1 * self.discriminator(output.reconstruction).mean()
        return terms

    def discriminator_acts(self, step: int) -> bool:
        return hasattr(self, "discriminator") and step >= self.discriminator_start

    def discriminator_turn(self, output: TokenizerOutput, images: Tensor, step: int) -> dict[str, Tensor]:
        real, fake = self.discriminator(images).mean(), self.discriminator(output.reconstruction.detach()).mean()
        self.real_mean.lerp_(real.detach(), 0.1)
        return {"discriminator": (1 - real).relu() + (1 + fake).relu()}

    def statistics(self) -> dict[str, Tensor]:
        return {"real_mean": self.real_mean.clone()}


class TinyImages(Dataset[dict[str, Any]]):
    """Sample i of the run is a function of i; samples in `poisoned` are all white."""

    def __init__(self, length: int, poisoned: tuple[int, ...] = ()) -> None:
        self.length, self.poisoned = length, poisoned

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.randint(0, 255, (3, SIDE, SIDE), generator=generator("tiny", index), dtype=torch.uint8)
        if index in self.poisoned:
            image.fill_(255)
        return {"image": image, "label": index % 4 - 1, "key": f"{index:06d}"}


class FromStart:
    """Batch sampler: micro-batches `start`, `start` + 1, … of this process; its length is the whole run's."""

    def __init__(self, total: int, size: int, start: int, rank: int = 0, world: int = 1) -> None:
        self.total, self.size, self.start, self.rank, self.world = total, size, start, rank, world

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start, self.total):
            first = (batch * self.world + self.rank) * self.size
            yield list(range(first, first + self.size))


def tiny_loader(
    total: int,
    size: int,
    start: int,
    *,
    rank: int = 0,
    world: int = 1,
    poisoned: tuple[int, ...] = (),
    workers: int = 0,
) -> DataLoader[Any]:
    images, batches = TinyImages(total * size * world, poisoned), FromStart(total, size, start, rank, world)
    return DataLoader(images, batch_sampler=batches, num_workers=workers, worker_init_fn=leave_signals_to_the_run)


def tiny_titok(kind: str, gan: int | None) -> tuple[Tokenizer, Objective]:
    """The real method, tiny: "pixels" (one stage, VQ), "kl" (VAE), "codes" (stage 1), "soft_codes" (stage 2)."""
    from smalti.objectives.adversarial import Adversarial, PatchDiscriminator
    from smalti.objectives.codes import ProxyCodeObjective
    from smalti.objectives.pixels import PixelObjective
    from smalti.tokenizers.maskgit_vqgan import MaskGITVQGAN
    from smalti.tokenizers.quantizers.kl import GaussianQuantizer
    from smalti.tokenizers.quantizers.vq import VectorQuantizer
    from smalti.tokenizers.titok import TiTok

    tower = {"width": 16, "depth": 1, "heads": 2, "patch_size": 4}
    codes = VectorQuantizer(codebook_size=16, dim=8, distance="cosine")
    sizes = {"channels": 32, "channel_mult": [1, 1, 1], "num_res_blocks": 1}
    options: dict[str, Any] = {}
    if kind != "kl" and kind != "pixels":
        options = {"head": kind, "proxy_codebook_size": 12, "freeze_encoder": kind == "soft_codes"}
    if kind == "soft_codes":
        options["pixel_decoder"] = {"dim": 8, **sizes}
    tokenizer = TiTok(
        image_size=SIDE,
        num_latent_tokens=4,
        quantizer=GaussianQuantizer(dim=8) if kind == "kl" else codes,
        encoder=tower,
        decoder=tower,
        init="fan_in",
        **options,
    )
    if kind == "codes":
        teacher = MaskGITVQGAN(image_size=SIDE, quantizer=VectorQuantizer(codebook_size=12, dim=8), **sizes)
        return tokenizer, ProxyCodeObjective(teacher=teacher)
    discriminator = PatchDiscriminator(hidden_channels=32, num_stages=1)
    adversarial = None if gan is None else Adversarial(discriminator=discriminator, start=gan)
    return tokenizer, PixelObjective(adversarial=adversarial, quantizer_weight=1e-3)


class SignalAt(pl.Callback):
    """SIGTERM to this process when a step begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)


def tiny_run(
    folder: Path,
    *,
    max_steps: int = 20,
    accumulate: int = 1,
    size: int = 4,
    gan: int | None = None,
    lr: float = 1e-2,
    clip: float | None = 1.0,
    checkpoint_every: int = 4,
    log_every: int = 3,
    devices: int = 1,
    precision: str = "32-true",
    dropout: float = 0.1,
    noise: float = 0.1,
    nan_limit: int = 3,
    poisoned: tuple[int, ...] = (),
    compile: bool = False,
    loggers: Any = (),
    extra: Any = (),
    sleep_s: float = 0.0,
    stop_at: int | None = None,
    titok: str | None = None,
    generator: bool | str = False,
    ema: bool = True,
    workers: int = 0,
    stream: Any = None,
    checkpoint: Path | None = None,
) -> Any:
    """Train in `folder`, going on from `checkpoint` or its newest one; gives the module.

    generator: train a ToyGenerator on the tokens of a frozen TiTok instead of a tokenizer; "mar": MAR on those of its
    VAE. Each process leaves the module's state in rank-<number>.pt.
    """
    from toy_generator import ToyGenerator

    from smalti.generators.base import Generator
    from smalti.generators.mar import MAR
    from smalti.training.callbacks.checkpointing import Checkpointing
    from smalti.training.callbacks.generation import Samples, ValidationLoss
    from smalti.training.callbacks.metrics_csv import MetricsCsv
    from smalti.training.callbacks.progress import ProgressBar
    from smalti.training.callbacks.signals import Signals
    from smalti.training.callbacks.validation import Validation
    from smalti.training.checkpoint import newest_good
    from smalti.training.ema import EMAConfig
    from smalti.training.generator_module import GeneratorModule
    from smalti.training.loop import build_trainer, fit
    from smalti.training.module import TrainingModule
    from smalti.training.optim import OptimConfig
    from smalti.training.tokenizer_module import TokenizerModule

    torch.manual_seed(0)
    optimizer = OptimConfig(lr=lr, discriminator_lr=lr / 2, warmup_steps=3, weight_decay=0.05, clip=clip)
    options: dict[str, Any] = {"accumulate": accumulate, "seed": 7, "nan_limit": nan_limit, "compile": compile}
    options |= {"max_steps": max_steps, "ema": EMAConfig(0.9) if ema else None}
    measuring: list[pl.Callback] = []
    module: TrainingModule
    if generator:
        tokenizer = tiny_titok("kl" if generator == "mar" else "pixels", None)[0]
        common: dict[str, Any] = {"tokens": tokenizer.spec.to_dict(), "num_classes": 3, "dropout": dropout}
        common["label_dropout"] = 0.3 if noise else 0.0
        made: Generator
        if generator == "mar":
            sampling = {"iterations": 2, "steps": 3, "max_timestep": 950, "guidance": 2.0}
            sizes = {"width": 16, "depth": 1, "heads": 2, "buffer": 2, "head_width": 16, "head_depth": 1}
            made = MAR(**common, **sizes, attention_dropout=dropout, sampling=sampling)
        else:
            made = ToyGenerator(**common)
        module = GeneratorModule(made, optimizer, tokenizer=tokenizer, **options)
        measuring = [ValidationLoss(lambda: tiny_loader(2, 4, 0), every=5), Samples(4, folder / "images", every=10)]
    else:
        kind = tiny_titok(titok, gan) if titok else (TinyTokenizer(dropout=dropout, noise=noise), TinyObjective(gan))
        module = TokenizerModule(*kind, optimizer, **options)
        measuring = [Validation(lambda: tiny_loader(2, 4, 0), every=5)]
    folder.mkdir(parents=True, exist_ok=True)
    checkpointing = Checkpointing(folder / "checkpoints", checkpoint_every)
    metrics = MetricsCsv(folder / "metrics.csv", log_every)
    callbacks: list[pl.Callback] = [*extra, *measuring, metrics, checkpointing]
    callbacks += [Signals(checkpointing), ProgressBar(metrics, stream=stream)]
    if stop_at is not None:
        callbacks.insert(0, SignalAt(stop_at))
    trainer = build_trainer(
        max_steps=max_steps, folder=folder, callbacks=callbacks, loggers=loggers, precision=precision,
        accelerator="cpu", devices=devices,
    )  # fmt: skip

    def loader(start: int) -> DataLoader[Any]:
        if sleep_s:
            time.sleep(sleep_s)
        return tiny_loader(
            max_steps * accumulate,
            size,
            start,
            rank=trainer.global_rank,
            world=trainer.world_size,
            poisoned=poisoned,
            workers=workers,
        )

    fit(trainer, module, loader, checkpoint or newest_good(folder / "checkpoints"))
    torch.save(module.state_dict(), folder / f"rank-{trainer.global_rank}.pt")
    return module


def _value(text: str) -> Any:
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def tiny_process(environment: dict[str, str], folder: str, options: dict[str, Any]) -> None:
    """What a process started by a test runs; leaves with the exit code that a command would."""
    from smalti.errors import run_command

    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as in a process of one's own
    if options.pop("own_group", False):
        os.setsid()
    torch.set_num_threads(1)
    slow_save_s = options.pop("slow_save_s", 0.0)
    if slow_save_s:
        from smalti.training import checkpoint

        save = checkpoint.save
        checkpoint.save = lambda *given: (Path(folder, "saving").touch(), time.sleep(slow_save_s), save(*given))[-1]
    run_command(lambda: tiny_run(Path(folder), **options) and None)


if __name__ == "__main__":
    tiny_process(
        {}, sys.argv[1], {key: _value(value) for key, _, value in (word.partition("=") for word in sys.argv[2:])}
    )
