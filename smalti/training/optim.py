"""AdamW with the recipe's decay groups, and learning rates as pure functions of the step.

Source of the rules: TiTok's training code (bytedance/1d-tokenizer), whose groups and rates the fixtures pin down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# The published rule: a parameter is not decayed if it has fewer than two dimensions or its name contains one of these.
NO_DECAY = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer of the main model and, where there is one, of the discriminator.

    lr, end_lr: peak and last learning rate. discriminator_lr: peak for the discriminator; it ends at the same fraction
    of its peak as the main model. schedule: "cosine" | "constant", both after `warmup_steps` linear ones from 0.
    clip: largest gradient norm, for the model and for the discriminator separately; null: no clipping.
    no_decay: names (parts of names) that get no weight decay, beside every parameter of fewer than two dimensions.
    rise_past_end: the published cosine goes up again past the last step; by default it stays at end_lr.
    schedule_processes: processes of the published run. It only acts on the discriminator, whose published cosine is
    `discriminator_start / processes` steps shorter than the run (not `discriminator_start` steps).
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    no_decay: tuple[str, ...] = NO_DECAY
    warmup_steps: int = 0
    end_lr: float = 0.0
    schedule: str = "cosine"
    clip: float | None = 1.0
    discriminator_lr: float = 1e-4
    rise_past_end: bool = False
    schedule_processes: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "no_decay", tuple(self.no_decay))
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule={self.schedule!r}: use 'cosine' or 'constant'")
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be positive")


@dataclass(frozen=True)
class Schedule:
    """A learning rate as a fraction of its peak: linear warm-up from 0, then cosine to `end` or constant.

    warmup, total: in ticks (one tick an optimizer update). end: the fraction left at `total`.
    """

    kind: str
    warmup: int
    total: int
    end: float
    rise_past_end: bool = False

    def __call__(self, tick: int) -> float:
        """The fraction in force in the update after `tick` updates; with a warm-up the first one has rate 0."""
        if tick < self.warmup:
            return tick / max(1, self.warmup)
        if self.kind == "constant":
            return 1.0
        progress = (tick - self.warmup) / max(1, self.total - self.warmup)
        if not self.rise_past_end:
            progress = min(progress, 1.0)
        return self.end + (1.0 - self.end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """The main model's learning rate in the update after `step` updates."""
    end = config.end_lr / config.lr
    return config.lr * Schedule(config.schedule, config.warmup_steps, max_steps, end, config.rise_past_end)(step)


def discriminator_learning_rate(config: OptimConfig, step: int, max_steps: int, start: int) -> float:
    """The discriminator's learning rate; it warms up on its own from its first turn, at `start`."""
    ticks = config.schedule_processes
    end = config.end_lr / config.lr
    total = max_steps * ticks - start
    schedule = Schedule(config.schedule, config.warmup_steps * ticks, total, end, config.rise_past_end)
    return config.discriminator_lr * schedule((step - start) * ticks)


def split_by_decay(
    named: Iterable[tuple[str, Tensor]], no_decay: Iterable[str] = NO_DECAY
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trainable parameters by name: (not decayed, decayed)."""
    words = tuple(no_decay)
    plain: dict[str, Tensor] = {}
    decayed: dict[str, Tensor] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or any(word in name for word in words)
            (plain if exempt else decayed)[name] = parameter
    return plain, decayed


def build_optimizer(module: nn.Module, config: OptimConfig, lr: float) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `module` in two groups, [no decay, decay].

    The fused kernel is asked for always: it is the one that can skip an update on the device (`found_inf`), without
    the host waiting for the gradients (see TrainingModule).
    """
    plain, decayed = split_by_decay(module.named_parameters(), config.no_decay)
    groups = [
        {"params": list(plain.values()), "weight_decay": 0.0},
        {"params": list(decayed.values()), "weight_decay": config.weight_decay},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
