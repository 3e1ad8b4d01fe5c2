"""What training a tokenizer and training a generator have in common, under Lightning's Trainer.

One path for every case: accumulation, guarded and clipped updates, a moving average, one process or many. A step is one
optimizer update of the model; it takes `accumulate` micro-batches, each of which is `begin`, forward, `backward`, in
the last one also `update`, and `end`. Everything else is a callback.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smalti.errors import UserError
from smalti.model import Model
from smalti.tokenizers.quantizers.base import Draws
from smalti.training.draws import generator, seed_of
from smalti.training.ema import EMA, EMAConfig
from smalti.training.guard import Guard
from smalti.training.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate


@dataclass(frozen=True)
class StepOutput:
    """What one micro-batch gave, detached and on its device: nothing here makes the host wait.

    ended: whether it ended a step. step: updates made, this one included. loss: sum of `terms`, which are those of the
    model's turn by name, not divided by `accumulate`. discriminator: those of its turn, empty when it took none.
    statistics: of the model and the objective. norms, rates: gradient norms before clipping and learning rates of
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


class TrainingModule(pl.LightningModule):
    """A model and its moving average, by manual optimisation.

    Weights to start from are loaded into `model` before: `ema.model` begins as its copy. ema: None for no average.
    accumulate: micro-batches a step. seed: of all draws. nan_limit: non-finite steps in a row that end the run.
    compile: compile the model's forward; names in checkpoints do not change.
    """

    def __init__(
        self,
        model: Model,
        optimizer: OptimConfig,
        *,
        max_steps: int,
        ema: EMAConfig | None,
        accumulate: int,
        seed: int,
        nan_limit: int,
        compile: bool,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.ema = None if ema is None else EMA(model, ema)
        self.guard = Guard(nan_limit)
        self.optim, self.max_steps, self.accumulate, self.seed = optimizer, max_steps, accumulate, seed
        self.figures: dict[str, float] = {}  # what callbacks measured at this step, for the next row of metrics.csv
        self._micro = 0
        if compile:
            model.compile()  # in place: unlike torch.compile(module) it wraps nothing, so no key changes

    @property
    @abstractmethod
    def trained(self) -> Model:
        """The model whose updates are steps."""

    @property
    def averaged(self) -> Model:
        """The model that validation shows and exports hold."""
        if self.ema is None:
            return self.trained
        averaged = self.ema.model
        assert isinstance(averaged, Model)
        return averaged

    @property
    def step(self) -> int:
        """Optimizer updates made so far; Lightning counts those of the first optimizer only."""
        return self.trainer.global_step

    @abstractmethod
    def draw(self, batch_size: int, generator: torch.Generator, step: int) -> Draws:
        """The model's random numbers of one training forward, on the CPU."""

    @abstractmethod
    def mutable(self) -> list[Tensor]:
        """What a forward may change beside gradients; a skipped step puts it back."""

    def frozen_names(self) -> list[str]:
        """Names of this module's state that are rebuilt from the config, not saved in checkpoints."""
        return []

    def draws(self, batch_size: int, step: int, micro: int) -> Draws:
        """The random numbers of a micro-batch: from a generator made anew for (seed, step, rank, micro-batch).

        `lengths` stay on the CPU: they decide shapes, and reading them from a GPU would make the host wait.
        """
        made = self.draw(batch_size, generator("step", self.seed, step, self.global_rank, micro), step)
        return {
            name: value if name == "lengths" else value.to(self.device, non_blocking=True)
            for name, value in made.items()
        }

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [build_optimizer(self.trained, self.optim, self.optim.lr)]

    def on_train_start(self) -> None:
        self._micro = 0
        self.guard.watch(self.mutable())

    def begin(self) -> tuple[int, int, bool]:
        """A micro-batch begins: updates made so far, its number within the step, and whether it is the last of it."""
        step, micro = self.step, self._micro
        if micro == 0:
            self.guard.begin()
        _seed_layers(seed_of("layers", self.seed, step, self.global_rank, micro), self.device)
        return step, micro, micro == self.accumulate - 1

    def backward_of(self, terms: Mapping[str, Tensor], last: bool) -> Tensor:
        """Gradients of the sum of `terms`, which is returned."""
        loss = torch.stack(list(terms.values())).sum()
        self.guard.see(loss)
        wrapper = self.trainer.strategy.model
        if isinstance(wrapper, DistributedDataParallel):
            wrapper.require_backward_grad_sync = last  # in all other micro-batches gradients stay on their process
        self.manual_backward(loss / self.accumulate)
        return loss

    def update(self, step: int) -> tuple[Tensor, float]:
        """Update the model, unless the step is to be skipped; its gradient norm before clipping, and the rate."""
        lr = learning_rate(self.optim, step, self.max_steps)
        return self.guarded_update(self.all_optimizers()[0], lr), lr

    def guarded_update(self, optimizer: LightningOptimizer | torch.optim.Optimizer, lr: float) -> Tensor:
        """One update of an optimizer's parameters, or none where the processes agree to skip the step.

        Returns the norm of all gradients before clipping, which Lightning refuses under manual optimisation.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        limit = float("inf") if self.optim.clip is None else self.optim.clip
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        self.guard.see(norm)
        raw: Any = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        # Where it is 1, the next `step()` of a fused optimizer changes nothing, not even its count of steps.
        raw.found_inf = self.guard.agree()
        set_learning_rate(raw, lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def all_optimizers(self) -> list[LightningOptimizer]:
        """Those of `configure_optimizers`; steps are counted where the first one is stepped."""
        found: Any = self.optimizers()
        return found if isinstance(found, list) else [found]

    def end(self, step: int, last: bool) -> None:
        """The micro-batch is done; with the last one the step, which is counted, and the moving average follows."""
        if last:
            self.guard.end()
            if self.ema is not None:
                self.ema.update(step + 1)
        self._micro = 0 if last else self._micro + 1

    def result(
        self,
        step: int,
        last: bool,
        *,
        loss: Tensor,
        terms: Mapping[str, Tensor],
        statistics: Mapping[str, Tensor],
        norms: dict[str, Tensor],
        rates: dict[str, float],
        samples: int,
        indices: Tensor | None,
        discriminator: Mapping[str, Tensor] | None = None,
    ) -> dict[str, StepOutput]:
        """What `training_step` hands to the callbacks; samples: of this process."""
        output = StepOutput(
            ended=last,
            step=step + last,
            loss=loss.detach(),
            terms=_detached(terms),
            discriminator=_detached(discriminator or {}),
            statistics=_detached(statistics),
            norms=norms,
            rates=rates,
            indices=indices,
            samples=samples * self.trainer.world_size,
            finished=time.perf_counter(),
        )
        return {"output": output}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Frozen networks are rebuilt from the config, not saved."""
        for name in self.frozen_names():
            checkpoint["state_dict"].pop(name, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own, saved = self.state_dict(), checkpoint["state_dict"]
        saved.update({name: own[name] for name in self.frozen_names()})
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


def _seed_layers(seed: int, device: torch.device) -> None:
    """Seed what dropout inside layers draws from.

    Not torch.manual_seed, which seeds every kind of device there could be: 100 times slower, and for each that is not
    in use yet it keeps a stack trace a call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _detached(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in terms.items()}
