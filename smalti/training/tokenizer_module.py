"""One tokenizer in training: draws, forward, objective, backward, update.

Micro-batches come in the published order: the tokenizer's turn and, in the last one of a step, its update; then the
discriminator's turn, where there is one, on the same reconstructions, and its update; then the moving average.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smalti.objectives.base import Objective
from smalti.objectives.codes import ProxyCodeObjective
from smalti.tokenizers.base import Tokenizer, TokenizerOutput
from smalti.tokenizers.quantizers.base import Draws, Quantizer
from smalti.training.ema import EMAConfig
from smalti.training.module import StepOutput, TrainingModule
from smalti.training.optim import OptimConfig, build_optimizer, discriminator_learning_rate

_EMA = EMAConfig()


class TokenizerModule(TrainingModule):
    """A tokenizer, its objective and its moving average; arguments as of `TrainingModule`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        objective: Objective,
        optimizer: OptimConfig,
        *,
        max_steps: int,
        ema: EMAConfig | None = _EMA,
        accumulate: int = 1,
        seed: int = 0,
        nan_limit: int = 20,
        compile: bool = False,
    ) -> None:
        super().__init__(
            tokenizer,
            optimizer,
            max_steps=max_steps,
            ema=ema,
            accumulate=accumulate,
            seed=seed,
            nan_limit=nan_limit,
            compile=compile,
        )
        self.tokenizer = tokenizer
        self.objective = objective
        discriminator: nn.Module | None = getattr(objective, "discriminator", None)
        self._discriminator_parameters = (
            [] if discriminator is None else [p for p in discriminator.parameters() if p.requires_grad]
        )

    @property
    def trained(self) -> Tokenizer:
        return self.tokenizer

    @property
    def averaged(self) -> Tokenizer:
        return cast(Tokenizer, super().averaged)

    def draw(self, batch_size: int, generator: torch.Generator, step: int) -> Draws:
        return self.tokenizer.draw(batch_size, generator)

    def mutable(self) -> list[Tensor]:
        """Buffers, and the codebooks of quantizers that update them."""
        tensors = [*self.tokenizer.buffers(), *self.objective.buffers()]
        for module in self.tokenizer.modules():
            if isinstance(module, Quantizer):
                tensors += [parameter.data for parameter in module.parameters()]
        return tensors

    def frozen_names(self) -> list[str]:
        """Networks of the objective that are not trained: a teacher, perceptual features."""
        trained = {id(parameter) for parameter in self._discriminator_parameters}
        return [f"objective.{name}" for name, p in self.objective.named_parameters() if id(p) not in trained]

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        optimizers = super().configure_optimizers()
        if self._discriminator_parameters:
            optimizers.append(build_optimizer(self.objective, self.optim, self.optim.discriminator_lr))
        return optimizers

    def setup(self, stage: str) -> None:
        # Lightning's wrapper reduces gradients in the tokenizer's backward only; the discriminator's are reduced here.
        # (DistributedDataParallel with one forward and two backwards would need find_unused_parameters.)
        ignored = [f"objective.{name}" for name, _ in self.objective.named_parameters()]
        ignored += [f"objective.{name}" for name, _ in self.objective.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, ignored)

    def on_train_start(self) -> None:
        super().on_train_start()
        attach: Any = getattr(self.averaged, "attach_teacher", None)
        if isinstance(self.objective, ProxyCodeObjective) and attach is not None:
            # A model that predicts a teacher's codes shows the pictures that the teacher makes of them.
            attach(self.objective.teacher(self.device))
        if self.trainer.world_size > 1:
            for tensor in [*self._discriminator_parameters, *self.objective.buffers()]:
                dist.broadcast(tensor.data, 0)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, StepOutput]:
        images: Tensor = batch["image"]
        images = images if images.is_floating_point() else images.float() / 255
        step, micro, last = self.begin()
        output = self.tokenizer(images, self.draws(len(images), step, micro))
        norms: dict[str, Tensor] = {}
        rates: dict[str, float] = {}
        discriminator: dict[str, Tensor] = {}
        with torch.autocast(self.device.type, enabled=False):
            output = _in_float32(output)
            terms = self.objective(output, images, step, last_layer=getattr(self.tokenizer, "last_layer", None))
            loss = self.backward_of(terms, last)
            if last:
                norms["grad_norm"], rates["lr"] = self.update(step)
            if self.objective.discriminator_acts(step):
                discriminator = self._discriminator_turn(output, images, step)
                if last:
                    norms["discriminator_grad_norm"], rates["discriminator_lr"] = self._update_discriminator(step)
            self.end(step, last)
        return self.result(
            step,
            last,
            loss=loss,
            terms=terms,
            discriminator=discriminator,
            statistics={**output.quantized.statistics, **self.objective.statistics()},
            norms=norms,
            rates=rates,
            samples=len(images),
            indices=output.quantized.indices,
        )

    def _discriminator_turn(self, output: TokenizerOutput, images: Tensor, step: int) -> dict[str, Tensor]:
        terms = self.objective.discriminator_turn(output, images, step)
        loss = torch.stack(list(terms.values())).sum()
        self.guard.see(loss)
        (loss / self.accumulate).backward()
        return terms

    def _update_discriminator(self, step: int) -> tuple[Tensor, float]:
        self._average_discriminator_gradients()
        optimizer = self.all_optimizers()[1].optimizer  # the raw one: only the tokenizer's updates count as steps
        lr = discriminator_learning_rate(self.optim, step, self.max_steps, self.objective.discriminator_start)
        return self.guarded_update(optimizer, lr), lr

    def _average_discriminator_gradients(self) -> None:
        if self.trainer.world_size == 1:
            return
        gradients = [p.grad for p in self._discriminator_parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.trainer.world_size
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])


def _in_float32(output: TokenizerOutput) -> TokenizerOutput:
    """Losses are computed in float32 whatever autocast says."""
    return replace(
        output,
        reconstruction=None if output.reconstruction is None else output.reconstruction.float(),
        logits=None if output.logits is None else output.logits.float(),
    )
