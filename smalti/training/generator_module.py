"""One generator in training: tokens (of a frozen tokenizer, or made beforehand), draws, forward, backward, update."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from smalti.errors import UserError
from smalti.generators.base import Condition, Generator
from smalti.registry import describe
from smalti.text import TextEncoder
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.quantizers.base import Draws
from smalti.tokenizers.quantizers.kl import GaussianQuantizer
from smalti.tokenizers.spec import Tokens
from smalti.tokenizers.tokenbridge import BridgedTokenizer
from smalti.training.draws import generator as generator_of
from smalti.training.ema import EMAConfig
from smalti.training.module import StepOutput, TrainingModule
from smalti.training.optim import OptimConfig


class GeneratorModule(TrainingModule):
    """A generator and, where `ema` says so, its moving average; further arguments as of `TrainingModule`.

    tokenizer: frozen; encodes images in the loop, and validation decodes with it. text_encoder: frozen; makes features
    of captions in the loop. latent_scale: what samples of `moments` are multiplied by, as the tokenizer that gave them
    does.

    A batch has `image` (b, 3, h, w), uint8 or float in [0, 1], or what the tokenizer makes of it: `indices` (b, n) or
    (b, n, q), `moments` (b, n, 2·d) of a posterior, not scaled, or `latents` (b, n, d), scaled (a bridged tokenizer
    makes codes of both); and any of `label` (b,) (-1: none), `features` (b, l, c) with `mask` (b, l) or `caption`, b
    texts, and `weight` (b,), how much each sample counts, for generators whose forward takes it.
    """

    def __init__(
        self,
        generator: Generator,
        optimizer: OptimConfig,
        *,
        tokenizer: Tokenizer | None = None,
        text_encoder: TextEncoder | None = None,
        latent_scale: float = 1.0,
        max_steps: int,
        ema: EMAConfig | None = None,
        accumulate: int = 1,
        seed: int = 0,
        nan_limit: int = 20,
        compile: bool = False,
    ) -> None:
        super().__init__(
            generator,
            optimizer,
            max_steps=max_steps,
            ema=ema,
            accumulate=accumulate,
            seed=seed,
            nan_limit=nan_limit,
            compile=compile,
        )
        self.generator, self.latent_scale = generator, latent_scale
        self.tokenizer = None if tokenizer is None else tokenizer.eval().requires_grad_(False)
        self.text_encoder = text_encoder

    @property
    def trained(self) -> Generator:
        return self.generator

    @property
    def averaged(self) -> Generator:
        return cast(Generator, super().averaged)

    def draw(self, batch_size: int, generator: torch.Generator, step: int) -> Draws:
        return self.generator.draw(batch_size, generator, step=step)

    def mutable(self) -> list[Tensor]:
        return list(self.generator.buffers())

    def frozen_names(self) -> list[str]:
        frozen = {"tokenizer": self.tokenizer, "text_encoder": self.text_encoder}
        return [f"{part}.{name}" for part, module in frozen.items() if module for name in module.state_dict()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also how to build the generator: its tokens and classes come from the tokenizer and the data."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["generator"] = {
            "model": describe(self.generator),
            "tokenizer": self.generator.metadata.get("tokenizer"),
            "text_encoder": self.generator.metadata.get("text_encoder"),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        for part in ("tokenizer", "text_encoder"):
            before, now = checkpoint["generator"].get(part), self.generator.metadata.get(part)
            if before and now and before["fingerprint"] != now["fingerprint"]:
                raise UserError(
                    f"the run was begun with {part.replace('_', ' ')} {before['fingerprint'][:16]} ({before['path']}), "
                    f"but this one is {now['fingerprint'][:16]} ({now['path']}); give the former, or start a new run: "
                    "resume=never"
                )

    def train(self, mode: bool = True) -> GeneratorModule:
        """Tokenizer and text encoder stay in evaluation mode."""
        super().train(mode)
        for frozen in (self.tokenizer, self.text_encoder):
            if frozen is not None:
                frozen.eval()
        return self

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, StepOutput]:
        step, micro, last = self.begin()
        tokens = self.tokens_of(batch, generator_of("posterior", self.seed, step, self.global_rank, micro))
        weight = {"weight": batch["weight"]} if "weight" in batch else {}
        output = self.generator(tokens, self.condition_of(batch), self.draws(len(tokens), step, micro), **weight)
        counted = {name: value.float().mean() for name, value in weight.items()}
        norms: dict[str, Tensor] = {}
        rates: dict[str, float] = {}
        with torch.autocast(self.device.type, enabled=False):
            loss = self.backward_of(output.terms, last)
            if last:
                norms["grad_norm"], rates["lr"] = self.update(step)
            self.end(step, last)
        return self.result(
            step,
            last,
            loss=loss,
            terms=output.terms,
            statistics=output.statistics | counted,
            norms=norms,
            rates=rates,
            samples=len(tokens),
            indices=tokens.indices,
        )

    @torch.no_grad()
    def tokens_of(self, batch: dict[str, Any], posterior: torch.Generator | None = None) -> Tokens:
        """A batch's tokens, or its images by the tokenizer, in float32: the tokens that `encode.py` writes.

        posterior: on the CPU, draws the noise of tokens that have a distribution, the same for images and for their
        moments in token shards; without, they are its means.
        """
        bridged = self.tokenizer if isinstance(self.tokenizer, BridgedTokenizer) else None
        if "latents" in batch:
            tokens = Tokens.full(batch["latents"])
            return tokens if bridged is None else bridged.quantised(tokens)
        if "indices" in batch:
            return Tokens.full(None, batch["indices"].long())
        if "moments" in batch:
            moments, noise = batch["moments"], _noise(batch["moments"], posterior)
            if bridged is not None:
                return bridged.sample(moments, noise)
            return Tokens.full(GaussianQuantizer.sample(moments, noise) * self.latent_scale)
        if self.tokenizer is None:
            raise ValueError("a batch of images needs a tokenizer")
        images: Tensor = batch["image"]
        images = images if images.is_floating_point() else images.float() / 255
        with torch.autocast(self.device.type, enabled=False):
            if self.tokenizer.has_posterior:
                moments = self.tokenizer.moments_of(images).clone()  # see below
                return self.tokenizer.sample(moments, _noise(moments, posterior))
            made = self.tokenizer.encode(images)
        # Cloned: tensors that were made in inference mode cannot take part in a backward.
        return Tokens.full(made.values.clone()) if made.indices is None else Tokens.full(None, made.indices.clone())

    def condition_of(self, batch: dict[str, Any]) -> Condition:
        """What a batch's pictures are to show: labels or text features, whichever the generator takes."""
        if self.generator.text_dim is None:
            return Condition(None if self.generator.num_classes is None else batch.get("label"))
        if "features" not in batch and self.text_encoder is not None:
            return self.text_encoder.encode(batch["caption"])
        return Condition(features=batch.get("features"), mask=batch.get("mask"))


def _noise(moments: Tensor, posterior: torch.Generator | None) -> Tensor | None:
    """Standard normal (b, n, d) for moments (b, n, 2·d)."""
    if posterior is None:
        return None
    shape = (*moments.shape[:-1], moments.shape[-1] // 2)
    return torch.randn(shape, generator=posterior).to(moments.device, non_blocking=True)
