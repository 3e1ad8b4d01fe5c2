"""The adversarial term: a patch discriminator, its losses, LeCam, and the weight by gradients.

TiTok's discriminator and hinge loss as in MaskBit (Weber et al. 2024, arXiv:2409.16211); LeCam: Tseng et al. 2021
(arXiv:2104.03310); the adaptive weight: VQGAN (Esser et al. 2021, arXiv:2012.09841, eq. 7).

image (b, 3, h, w) in [0, 1] -> conv 5×5 -> stages of (conv 3×3, blur and halve, norm) -> max pool to 16×16 -> logits
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import UserError, did_you_mean

_BINOMIAL = {3: (1.0, 2.0, 1.0), 4: (1.0, 3.0, 3.0, 1.0), 5: (1.0, 4.0, 6.0, 4.0, 1.0)}
_GROUPS = 32
_LOGIT_SIDE = 16


class _FixedDepthwise(torch.autograd.Function):
    """Depthwise convolution of stride 2 with a constant kernel.

    Convolution keeps its input for the kernel's gradient even where the kernel has none; this keeps nothing. With
    in-place activations the published discriminator keeps 63 instead of 167 MiB an image of 256 px, at equal time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(kernel)
        ctx.size, ctx.padding = x.shape[-2:], padding
        return F.conv2d(x, kernel.expand(x.shape[1], 1, -1, -1), stride=2, padding=padding, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (kernel,) = ctx.saved_tensors
        (gradient,) = gradients
        c, k = gradient.shape[1], kernel.shape[-1]
        reached = [2 * (out - 1) + k - 2 * ctx.padding for out in gradient.shape[-2:]]
        left_over = [size - far for size, far in zip(ctx.size, reached, strict=True)]
        gradient = F.conv_transpose2d(
            gradient,
            kernel.expand(c, 1, -1, -1),
            stride=2,
            padding=ctx.padding,
            output_padding=left_over,
            groups=c,
        )
        return gradient, None, None


class Blur(nn.Module):
    """Halve (b, c, h, w) with a binomial kernel, `SAME` padding (one more pixel right and below where it is odd).

    The published padding is that of four taps whatever the kernel's size.
    """

    kernel: Tensor

    def __init__(self, taps: int) -> None:
        super().__init__()
        line = torch.tensor(_BINOMIAL[taps])
        kernel = torch.outer(line, line)
        self.register_buffer("kernel", (kernel / kernel.sum())[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size in (x.shape[-1], x.shape[-2]):
            total = max((-(-size // 2) - 1) * 2 + 4 - size, 0)
            pads += [total // 2, total - total // 2]
        symmetric = set(pads) == {1}  # every even size: no padded copy is made
        blurred: Tensor = _FixedDepthwise.apply(x if symmetric else F.pad(x, pads), self.kernel, int(symmetric))
        return blurred


class _Stage(nn.Module):
    """Convolve, halve, normalise: (b, c_in, h, w) -> (b, c_out, ⌈h/2⌉, ⌈w/2⌉)."""

    def __init__(self, channels_in: int, channels_out: int, blur: int | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.halve = nn.AvgPool2d(2) if blur is None else Blur(blur)
        self.norm = nn.GroupNorm(_GROUPS, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.halve(self.conv(x))), 0.1, inplace=True)


class PatchDiscriminator(nn.Module):
    """The discriminator of TiTok and MaskBit: 1.9 M parameters, a 16×16 map of logits at any image size.

    Images float (b, 3, h, w) in [0, 1], not normalised; logits (b, 1, 16, 16). Stages are `hidden_channels` × 1, 2, 4,
    … wide. blur: taps of the kernel before each halving (3, 4 or 5), null for a plain average of 2×2.
    """

    def __init__(self, *, hidden_channels: int = 128, num_stages: int = 3, blur: int | None = 4) -> None:
        super().__init__()
        key = "objective.adversarial.discriminator"
        if hidden_channels <= 0 or hidden_channels % _GROUPS:
            below = max(hidden_channels // _GROUPS, 1) * _GROUPS
            raise UserError(
                f"{key}.hidden_channels={hidden_channels} is not a multiple of the {_GROUPS} groups of its "
                f"normalisation; use {below} or {below + _GROUPS}"
            )
        if num_stages < 1:
            raise UserError(f"{key}.num_stages={num_stages} leaves nothing to discriminate with; use 1 or more")
        if blur is not None and blur not in _BINOMIAL:
            raise UserError(f"{key}.blur={blur} is not a kernel; use 3, 4, 5, or null for an average of 2×2")
        widths = [hidden_channels, *(hidden_channels * 2**i for i in range(num_stages))]
        self.stem = nn.Conv2d(3, hidden_channels, 5, padding=2)
        self.stages = nn.ModuleList(_Stage(a, b, blur) for a, b in pairwise(widths))
        self.pool = nn.AdaptiveMaxPool2d(_LOGIT_SIDE)
        self.mix = nn.Conv2d(widths[-1], widths[-1], 1)
        self.to_logits = nn.Conv2d(widths[-1], 1, 5, padding=2)

    def forward(self, images: Tensor) -> Tensor:
        x = F.leaky_relu(self.stem(images), 0.1, inplace=True)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.to_logits(F.leaky_relu(self.mix(self.pool(x)), 0.1, inplace=True))
        return logits


class AdversarialLoss(NamedTuple):
    """What the tokenizer minimises, of the logits of its reconstructions, and what the discriminator minimises."""

    generator: Callable[[Tensor], Tensor]  # fake logits -> ()
    discriminator: Callable[[Tensor, Tensor], Tensor]  # real logits, fake logits -> ()


def _linear(fake: Tensor) -> Tensor:
    return -fake.mean()


def _hinge(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def _cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


LOSSES = {
    "hinge": AdversarialLoss(_linear, _hinge),
    "vanilla": AdversarialLoss(_linear, _cross_entropy),
    "non_saturating": AdversarialLoss(lambda fake: F.softplus(-fake).mean(), _cross_entropy),
    "wasserstein": AdversarialLoss(_linear, lambda real, fake: fake.mean() - real.mean()),
}

# LlamaGen gives its cross-entropies the targets as logits and the logits as targets: −y·log σ(1) − (1 − y)·log σ(−1) of
# a logit y is 1 + log(1 + 1/e) − y, and of one that is meant to be 0 log 2, whatever it is.
_ONE = 1 + math.log1p(math.exp(-1))
_SWAPPED = {
    "non_saturating": AdversarialLoss(
        lambda fake: _ONE - fake.mean(), lambda real, fake: 0.5 * (_ONE - real.mean() + math.log(2))
    )
}


class LeCam(nn.Module):
    """Keeps the discriminator near its own running averages: w · [relu(D(x) − ā_fake)² + relu(ā_real − D(x̂))²].

    D(x), D(x̂) are means over the batch. The averages start at 0 and move after they were used. As published each
    process keeps its own; with `across_ranks` they are of the mean over all processes, equal everywhere.
    """

    real_mean: Tensor
    fake_mean: Tensor

    def __init__(self, *, weight: float = 0.001, decay: float = 0.999, across_ranks: bool = False) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise UserError(f"objective.adversarial.lecam.decay={decay} is not in [0, 1); use 0.999 as published")
        if weight < 0:
            raise UserError(f"objective.adversarial.lecam.weight={weight} is negative; use 0 to switch LeCam off")
        self.weight, self.decay, self.across_ranks = weight, decay, across_ranks
        self.register_buffer("real_mean", torch.zeros(1))
        self.register_buffer("fake_mean", torch.zeros(1))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The weighted term of logits `real` and `fake`, against the averages as they stand; then moves these."""
        real, fake = real.mean(), fake.mean()
        term = F.relu(real - self.fake_mean).square().mean() + F.relu(self.real_mean - fake).square().mean()
        self._move(torch.stack([real, fake]).detach())
        return self.weight * term

    @torch.no_grad()
    def _move(self, means: Tensor) -> None:
        if self.across_ranks and dist.is_available() and dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        for average, mean in zip((self.real_mean, self.fake_mean), means, strict=True):
            average.mul_(self.decay).add_(mean, alpha=1 - self.decay)


class Adversarial(nn.Module):
    """A discriminator, when it acts, and how much it counts.

    The tokenizer's term is weight · factor · generator loss, the discriminator's factor · discriminator loss (+ LeCam);
    both from step `start` on (steps count from 0). factor is the published `discriminator_factor`, weight its
    `discriminator_weight`; LlamaGen's one number for both terms is the factor.
    loss: "hinge" (TiTok), "vanilla" (VQGAN's other one), "non_saturating", "wasserstein". generator_loss: another one
    of these for the tokenizer's term; null: the same.
    swapped_bce: "non_saturating" as LlamaGen's code has it: the discriminator learns nothing from reconstructions.
    before_start: "skip", or "idle": the discriminator runs and its optimizer steps with gradients of 0. Then running
    averages of its normalisation move, and its optimizer's bias correction is over when it begins: LlamaGen's first
    updates are 0.45 of the rate for that reason.
    adaptive_weight_max: null for a constant weight (TiTok). A number multiplies the weight by
    |∂(reconstruction + perceptual)/∂W| / (|∂ generator loss/∂W| + 1e-4), W the decoder's last weight, at most that
    number (VQGAN: 1e4); where no gradients are computed (validation) the factor is 0, as published.
    """

    def __init__(
        self,
        *,
        discriminator: nn.Module,
        loss: str = "hinge",
        generator_loss: str | None = None,
        swapped_bce: bool = False,
        weight: float = 0.1,
        factor: float = 1.0,
        start: int = 0,
        before_start: str = "skip",
        lecam: LeCam | None = None,
        adaptive_weight_max: float | None = None,
    ) -> None:
        super().__init__()
        key = "objective.adversarial"
        for name, choice, known in (
            ("loss", loss, LOSSES),
            ("generator_loss", generator_loss or loss, LOSSES),
            ("before_start", before_start, ("skip", "idle")),
        ):
            if choice not in known:
                hint = did_you_mean(choice, known)
                raise UserError(f"{key}.{name}={choice!r} is not one of {', '.join(known)}{hint}")
        if swapped_bce and "non_saturating" not in (loss, generator_loss):
            raise UserError(f"{key}.swapped_bce=true acts on loss=non_saturating only; set it to false")
        for name, value in {"weight": weight, "factor": factor, "start": start}.items():
            if value < 0:
                raise UserError(f"{key}.{name}={value} is negative; use 0 or more ({key}=null trains without)")
        if adaptive_weight_max is not None and adaptive_weight_max <= 0:
            raise UserError(
                f"{key}.adaptive_weight_max={adaptive_weight_max} leaves no weight; use 1e4 as VQGAN does, or null"
            )
        losses = {**LOSSES, **_SWAPPED} if swapped_bce else LOSSES
        self.discriminator = discriminator
        self.loss = AdversarialLoss(losses[generator_loss or loss].generator, losses[loss].discriminator)
        self.weight, self.factor, self.start = weight, factor, start
        self.first_step = 0 if before_start == "idle" else start
        self.lecam = lecam if lecam is not None and lecam.weight > 0 else None
        self.adaptive_weight_max = adaptive_weight_max
        self.statistics: dict[str, Tensor] = {}

    def factor_at(self, step: int) -> float:
        """The factor in force: 0 before the start."""
        return self.factor if step >= self.start else 0.0

    def acts(self, step: int) -> bool:
        """Whether the discriminator is run and its optimizer steps: from the start on, or from the first step."""
        return self.factor > 0 and self.weight > 0 and step >= self.first_step

    def generator_term(self, reconstruction: Tensor, step: int, rest: Tensor, last_layer: Tensor | None) -> Tensor:
        """The tokenizer's weighted term; the discriminator gets no gradient, and is not run while it does not act.

        rest: () the terms that the adaptive weight is measured against.
        """
        raw, weight = reconstruction.new_zeros(()), reconstruction.new_full((), self.weight)
        if self.acts(step):
            # Frozen while its forward is recorded, not until the next turn: what others see of requires_grad (DDP,
            # the optimizer, a compiled discriminator's guards) is the same before and after.
            with frozen(self.discriminator):
                raw = self.loss.generator(self.discriminator(reconstruction))
            if self.adaptive_weight_max is not None:
                weight = weight * adaptive_weight(rest, raw, last_layer, self.adaptive_weight_max)
        factor = self.factor_at(step)
        self.statistics.update(
            generator_loss=raw.detach(), adversarial_weight=weight, adversarial_factor=raw.new_full((), factor)
        )
        return weight * factor * raw

    def discriminator_terms(self, images: Tensor, reconstruction: Tensor, step: int) -> dict[str, Tensor]:
        """The discriminator's weighted terms; reconstruction is detached here."""
        real, fake = self.discriminator(images.detach()), self.discriminator(reconstruction.detach())
        factor = self.factor_at(step)
        counted = self.factor > 0 and step >= self.first_step  # idle: times 0, for gradients of 0
        terms = {"discriminator": factor * self.loss.discriminator(real, fake) if counted else real.new_zeros(())}
        self.statistics.update(logits_real=real.detach().mean(), logits_fake=fake.detach().mean())
        if self.lecam is not None:
            terms["lecam"] = self.lecam(real, fake)
            self.statistics.update(
                lecam_real=self.lecam.real_mean.detach().mean(), lecam_fake=self.lecam.fake_mean.detach().mean()
            )
        return terms


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Record forwards of `module` without gradients for its parameters; then put their requires_grad back."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def adaptive_weight(rest: Tensor, adversarial: Tensor, last_layer: Tensor | None, maximum: float) -> Tensor:
    """|∂rest/∂W| / (|∂adversarial/∂W| + 1e-4) at the last layer's weight W, in [0, maximum], detached.

    Costs a second backward through the networks of both losses, and keeps their graphs. 0 where nothing is recorded.
    """
    if last_layer is None or not last_layer.requires_grad:
        raise UserError(
            "objective.adversarial.adaptive_weight_max is set but this tokenizer has no trainable last layer to "
            "measure gradients at; set it to null for a constant weight"
        )
    if not torch.is_grad_enabled():
        return adversarial.new_zeros(())
    (of_rest,) = torch.autograd.grad(rest, last_layer, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (of_rest.norm() / (of_adversarial.norm() + 1e-4)).clamp(0, maximum).detach()
