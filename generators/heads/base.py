"""The contract of heads: small networks that model one continuous token given what a transformer says about it."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from smalti.generators.heads.annealing import ANNEALINGS, annealed_steps
from smalti.settings import check_choice, check_sizes
from smalti.tokenizers.quantizers.base import Draws

Noise = Callable[[int], Tensor]  # k to standard normal numbers (m, c): 0 is where sampling starts, k follows step k
LARGE = 20.0  # standard deviations of a latent that no image has


@dataclass(frozen=True)
class HeadSampling:
    """How a head turns noise into a token. The values here are MAR's own.

    steps: evaluations of the network; of a diffusion head also one number for each of several equal sections of the
    noise levels, the cleanest first, such as [20, 10, 5].
    temperature: scales the noise that each step of a diffusion adds, and not the noise that sampling starts from.
    sampler: of a diffusion head, "ancestral", or "ddim" with the share `eta` of the ancestral noise.
    spacing: of its timesteps, "even" from the first to the last, or "stride", every i-th from the first.
    max_timestep: where its larger timesteps are moved to, which may make them fewer; None: left where they are. The
    last one of MAR's schedule makes any error of the network 300 times as large, so that a head that has not learned
    long gives huge values; 950 keeps them in bounds.
    annealing: fewer steps the more tokens are known, from `steps` to `last_steps`: of `ANNEALINGS`, or "none".
    """

    steps: int | tuple[int, ...] = 100
    temperature: float = 1.0
    sampler: str = "ancestral"
    eta: float = 0.0
    spacing: str = "even"
    max_timestep: int | None = None
    annealing: str = "none"
    last_steps: int = 5

    def __post_init__(self) -> None:
        if isinstance(self.steps, Sequence):
            object.__setattr__(self, "steps", tuple(self.steps))
        sections = self.steps if isinstance(self.steps, tuple) else (self.steps,)
        if not sections or min(sections) < 1:
            raise ValueError(f"steps={self.steps} is not positive")
        check_sizes(last_steps=self.last_steps, max_timestep=self.max_timestep)
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative; 0 adds no noise between steps")
        check_choice("sampler", self.sampler, ("ancestral", "ddim"))
        check_choice("spacing", self.spacing, ("even", "stride"))
        check_choice("annealing", self.annealing, ("none", *ANNEALINGS))
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} is not in 0…1, from no noise to the ancestral sampler's")
        if self.eta and self.sampler == "ancestral":
            raise ValueError(f"eta={self.eta} is of sampler=ddim; leave it out with sampler=ancestral")
        if self.temperature != 1 and self.sampler == "ddim" and not self.eta:
            raise ValueError(f"temperature={self.temperature}: sampler=ddim adds no noise with eta=0; leave it at 1")
        if isinstance(self.steps, tuple) and (self.spacing == "stride" or self.annealing != "none"):
            raise ValueError(
                f"steps={list(self.steps)}: sections go with spacing=even and annealing=none; use one number"
            )
        if self.annealing != "none" and self.last_steps > max(sections):
            raise ValueError(f"last_steps={self.last_steps} is above steps={self.steps}; use at most as many")

    def at(self, iteration: int, iterations: int) -> HeadSampling:
        """The settings of one of several iterations (0, 1, …), with the number of steps that annealing gives it."""
        if self.annealing == "none":
            return self
        assert isinstance(self.steps, int)  # see above
        steps = annealed_steps(self.annealing, iteration, iterations, self.steps, self.last_steps)
        return replace(self, steps=steps, annealing="none")


class Head(nn.Module, ABC):
    """p(token | condition) of continuous tokens of `dim` channels.

    Computes in float32 whatever autocast says.
    """

    dim: int

    @abstractmethod
    def check(self, sampling: HeadSampling) -> None:
        """Raises ValueError for settings that this kind of head does not have."""

    @abstractmethod
    def draw(self, rows: int, generator: torch.Generator) -> Draws:
        """The random numbers of `loss` for so many rows."""

    @abstractmethod
    def loss(self, target: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """The loss of each row, (m,) float32. target: (m, c) tokens; condition: (m, d)."""

    @abstractmethod
    def sample(self, condition: Tensor, *, noise: Noise, sampling: HeadSampling, guidance: float = 1.0) -> Tensor:
        """Tokens (m, c) float32, each from its own row of `condition` and `noise` alone. Without gradient.

        condition: (m, d); with a guidance scale other than 1 (2m, d), the unconditional rows behind the conditional.
        noise: called with 0, 1, … in this order, for the steps that add noise.
        """


def warn_if_large(sample: Tensor) -> None:
    """Warns, in the same words every time, where values are NaN or far beyond any latent's."""
    if sample.numel() and not float(sample.abs().amax()) <= LARGE:
        warnings.warn(
            f"sampled tokens are NaN or beyond ±{LARGE:g}, where latents have a standard deviation of about 1: the "
            "head has not learned enough yet, or its weights overflowed; max_timestep=950 keeps errors from growing",
            stacklevel=4,  # who called `sample`, which torch.no_grad wraps
        )
