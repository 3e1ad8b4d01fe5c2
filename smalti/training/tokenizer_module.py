"""One tokenizer in training: draws, forward, objective, backward, update. Everything else is a callback.

One path for every case: accumulation, a discriminator or none, one process or many. A step is one optimizer update of
the tokenizer; it takes `accumulate` micro-batches, in the published order: the tokenizer's turn and, in the last one,
its update; then the discriminator's turn on the same reconstructions and its update; then the moving average.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smalti.errors import UserError
from smalti.objectives.base import Objective
from smalti.objectives.codes import ProxyCodeObjective
from smalti.tokenizers.base import Tokenizer, TokenizerOutput
from smalti.tokenizers.quantizers.base import Draws, Quantizer
from smalti.training.draws import generator, seed_of
from smalti.training.ema import EMA, EMAConfig
from smalti.training.guard import Guard
from smalti.training.optim import (
    OptimConfig,
    build_optimizer,
    discriminator_learning_rate,
    learning_rate,
    set_learning_rate,
)


@dataclass(frozen=True)
class StepOutput:
    """What one micro-batch gave, detached and on its device: nothing here makes the host wait.

    ended: whether it ended a step. step: updates made, this one included. loss: sum of `terms`, which are those of the
    tokenizer's turn by name, not divided by `accumulate`. discriminator: those of its turn, empty when it took none.
    statistics: of the quantizer and the objective. norms, rates: gradient norms before clipping and learning rates of
    the update, in the last micro-batch only. indices: (b, n) or (b, n, q), None for continuous tokens. samples: images
    of all processes. finished: `time.perf_counter()` when the host was done with it.
    """

    ended: bool
    step: int
    loss: Tensor
    terms: dict[str, Tensor]
    discriminator: dict[str, Tensor]
    statistics: dict[str, Tensor]
    norms: dict[str, Tensor]
    rates: dict[str, float]
    indices: Tensor | None
    samples: int
    finished: float


class TokenizerModule(pl.LightningModule):
    """A tokenizer, its objective and its moving average under Lightning's Trainer, by manual optimisation.

    Weights to start from are loaded into `tokenizer` before: `ema.model` begins as its copy.
    accumulate: micro-batches a step. seed: of all draws. nan_limit: non-finite steps in a row that end the run.
    compile: compile the tokenizer's forward; names in checkpoints do not change.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        objective: Objective,
        optimizer: OptimConfig,
        *,
        max_steps: int,
        ema: EMAConfig | None = None,
        accumulate: int = 1,
        seed: int = 0,
        nan_limit: int = 20,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.tokenizer = tokenizer
        self.objective = objective
        self.ema = EMA(tokenizer, ema or EMAConfig())
        self.guard = Guard(nan_limit)
        self.optim, self.max_steps, self.accumulate, self.seed = optimizer, max_steps, accumulate, seed
        self.figures: dict[str, float] = {}  # what callbacks measured at this step, for the next row of metrics.csv
        self._micro = 0
        discriminator: nn.Module | None = getattr(objective, "discriminator", None)
        self._discriminator_parameters = (
            [] if discriminator is None else [p for p in discriminator.parameters() if p.requires_grad]
        )
        if compile:
            tokenizer.compile()  # in place: unlike torch.compile(module) it wraps nothing, so no key changes

    @property
    def step(self) -> int:
        """Optimizer updates made so far; Lightning counts those of the first optimizer only."""
        return self.trainer.global_step

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        optimizers: list[torch.optim.Optimizer] = [build_optimizer(self.tokenizer, self.optim, self.optim.lr)]
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
        self._micro = 0
        attach: Any = getattr(self.ema.model, "attach_teacher", None)
        if isinstance(self.objective, ProxyCodeObjective) and attach is not None:
            # A model that predicts a teacher's codes shows the pictures that the teacher makes of them.
            attach(self.objective.teacher(self.device))
        self.guard.watch(_mutable(self.tokenizer, self.objective))
        if self.trainer.world_size > 1:
            for tensor in [*self._discriminator_parameters, *self.objective.buffers()]:
                dist.broadcast(tensor.data, 0)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, StepOutput]:
        images: Tensor = batch["image"]
        images = images if images.is_floating_point() else images.float() / 255
        step, micro = self.step, self._micro
        last = micro == self.accumulate - 1
        if micro == 0:
            self.guard.begin()
        _seed_layers(seed_of("layers", self.seed, step, self.global_rank, micro), self.device)
        output = self.tokenizer(images, self.draws(len(images), step, micro))
        norms: dict[str, Tensor] = {}
        rates: dict[str, float] = {}
        discriminator: dict[str, Tensor] = {}
        with torch.autocast(self.device.type, enabled=False):
            output = _in_float32(output)
            loss, terms = self._tokenizer_turn(output, images, step, last)
            if last:
                norms["grad_norm"], rates["lr"] = self._update_tokenizer(step)
            if self.objective.discriminator_acts(step):
                discriminator = self._discriminator_turn(output, images, step)
                if last:
                    norms["discriminator_grad_norm"], rates["discriminator_lr"] = self._update_discriminator(step)
            if last:
                self.guard.end()
                self.ema.update(step + 1)
        self._micro = 0 if last else micro + 1
        result = StepOutput(
            ended=last,
            step=step + last,
            loss=loss.detach(),
            terms=_detached(terms),
            discriminator=_detached(discriminator),
            statistics=_detached({**output.quantized.statistics, **self.objective.statistics()}),
            norms=norms,
            rates=rates,
            indices=output.quantized.indices,
            samples=len(images) * self.trainer.world_size,
            finished=time.perf_counter(),
        )
        return {"output": result}

    @property
    def averaged(self) -> Tokenizer:
        """The model that validation shows and exports hold."""
        return cast(Tokenizer, self.ema.model)

    def draws(self, batch_size: int, step: int, micro: int) -> Draws:
        """The random numbers of a micro-batch: from a generator made anew for (seed, step, rank, micro-batch).

        `lengths` stay on the CPU: they decide shapes, and reading them from a GPU would make the host wait.
        """
        made = self.tokenizer.draw(batch_size, generator("step", self.seed, step, self.global_rank, micro))
        return {
            name: value if name == "lengths" else value.to(self.device, non_blocking=True)
            for name, value in made.items()
        }

    def _tokenizer_turn(
        self, output: TokenizerOutput, images: Tensor, step: int, last: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.objective(output, images, step, last_layer=getattr(self.tokenizer, "last_layer", None))
        loss = torch.stack(list(terms.values())).sum()
        self.guard.see(loss)
        wrapper = self.trainer.strategy.model
        if isinstance(wrapper, DistributedDataParallel):
            wrapper.require_backward_grad_sync = last  # in all other micro-batches gradients stay on their process
        self.manual_backward(loss / self.accumulate)
        return loss, terms

    def _update_tokenizer(self, step: int) -> tuple[Tensor, float]:
        optimizer = self._optimizers()[0]
        norm = self._clip(optimizer.param_groups)
        self.guard.see(norm)
        _skip_where(self.guard.agree(), optimizer.optimizer)
        lr = learning_rate(self.optim, step, self.max_steps)
        set_learning_rate(optimizer.optimizer, lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm, lr

    def _discriminator_turn(self, output: TokenizerOutput, images: Tensor, step: int) -> dict[str, Tensor]:
        terms = self.objective.discriminator_turn(output, images, step)
        loss = torch.stack(list(terms.values())).sum()
        self.guard.see(loss)
        (loss / self.accumulate).backward()
        return terms

    def _update_discriminator(self, step: int) -> tuple[Tensor, float]:
        optimizer = self._optimizers()[1].optimizer  # the raw one: only the tokenizer's updates count as steps
        self._average_discriminator_gradients()
        norm = self._clip(optimizer.param_groups)
        self.guard.see(norm)
        _skip_where(self.guard.agree(), optimizer)
        lr = discriminator_learning_rate(self.optim, step, self.max_steps, self.objective.discriminator_start)
        set_learning_rate(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm, lr

    def _optimizers(self) -> list[LightningOptimizer]:
        found: Any = self.optimizers()
        return found if isinstance(found, list) else [found]

    def _clip(self, groups: list[dict[str, Any]]) -> Tensor:
        """The norm of all gradients before clipping; Lightning refuses to clip under manual optimisation."""
        parameters = [parameter for group in groups for parameter in group["params"]]
        limit = float("inf") if self.optim.clip is None else self.optim.clip
        return nn.utils.clip_grad_norm_(parameters, limit)

    def _average_discriminator_gradients(self) -> None:
        if self.trainer.world_size == 1:
            return
        gradients = [p.grad for p in self._discriminator_parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.trainer.world_size
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Frozen networks of the objective (a teacher, perceptual features) are rebuilt from the config, not saved."""
        for name in self._frozen_names():
            checkpoint["state_dict"].pop(name, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own, saved = self.state_dict(), checkpoint["state_dict"]
        saved.update({name: own[name] for name in self._frozen_names()})
        for name in sorted(own.keys() | saved.keys()):
            mine, theirs = (tuple(state[name].shape) if name in state else None for state in (own, saved))
            if mine != theirs:
                words = " and ".join(
                    f"{shape or 'nothing'} in the {where}" for shape, where in ((theirs, "checkpoint"), (mine, "model"))
                )
                raise UserError(
                    f"the checkpoint is of another model: {name} is {words}; use the run's own config, or resume=never"
                )
        # Lightning counts micro-batches; after a change of accumulation or processes they follow from the step.
        done = checkpoint["global_step"] * self.accumulate
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts.update(ready=done, started=done, processed=done, completed=done - 1)
        progress["is_last_batch"] = False  # a finished run may be given more steps

    def _frozen_names(self) -> list[str]:
        trained = {id(parameter) for parameter in self._discriminator_parameters}
        return [f"objective.{name}" for name, p in self.objective.named_parameters() if id(p) not in trained]


def _seed_layers(seed: int, device: torch.device) -> None:
    """Seed what dropout inside layers draws from.

    Not torch.manual_seed, which seeds every kind of device there could be: 100 times slower, and for each that is not
    in use yet it keeps a stack trace a call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _skip_where(bad: Tensor, optimizer: Any) -> None:
    """Where `bad` is 1, the next `step()` of a fused optimizer changes nothing, not even its count of steps."""
    optimizer.found_inf = bad


def _mutable(tokenizer: nn.Module, objective: nn.Module) -> list[Tensor]:
    """What a forward may change beside gradients: buffers, and the codebooks of quantizers that update them."""
    tensors = [*tokenizer.buffers(), *objective.buffers()]
    for module in tokenizer.modules():
        if isinstance(module, Quantizer):
            tensors += [parameter.data for parameter in module.parameters()]
    return tensors


def _in_float32(output: TokenizerOutput) -> TokenizerOutput:
    """Losses are computed in float32 whatever autocast says."""
    return replace(
        output,
        reconstruction=None if output.reconstruction is None else output.reconstruction.float(),
        logits=None if output.logits is None else output.logits.float(),
    )


def _detached(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in terms.items()}
