"""Training on pixels: reconstruction, perceptual, quantizer and adversarial terms (VQGAN, TiTok stage 2 and one-stage).

loss = w_rec · |x̂ − x|ᵖ / e^logvar + w_perc · perceptual(x, x̂) + w_q · Σ quantizer losses + w_adv · factor · G(D(x̂))
Everything in float32 with autocast off, as published.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import UserError, did_you_mean
from smalti.objectives.adversarial import Adversarial
from smalti.objectives.base import Objective
from smalti.tokenizers.base import TokenizerOutput

_DISTANCES = {"l1": F.l1_loss, "l2": F.mse_loss}
_RANGES = ("unit", "signed")


class PixelObjective(Objective):
    """Named terms of a reconstruction against its image; terms of weight 0 are absent.

    reconstruction: "l1" or "l2", means over all elements.
    pixel_range: in which the reconstruction is compared and the discriminator looks: "unit", [0, 1] (TiTok), or
    "signed", [−1, 1] (LlamaGen), where an l2 term counts four times as much.
    perceptual: a module (images, reconstruction) -> () or (b,), frozen here; null trains without.
    quantizer_weight: of the sum of the quantizer's losses (TiTok's KL recipe: 1e-6).
    logvar_init: divides the reconstruction by e^logvar, a constant as in TiTok's KL recipe (0); null leaves it out.
    """

    logvar: Tensor | None

    def __init__(
        self,
        *,
        reconstruction: str = "l2",
        reconstruction_weight: float = 1.0,
        pixel_range: str = "unit",
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        quantizer_weight: float = 1.0,
        adversarial: Adversarial | None = None,
        logvar_init: float | None = None,
    ) -> None:
        super().__init__()
        if reconstruction not in _DISTANCES:
            raise UserError(
                f"objective.reconstruction={reconstruction!r} is not one of {', '.join(_DISTANCES)}"
                f"{did_you_mean(reconstruction, _DISTANCES)}"
            )
        if pixel_range not in _RANGES:
            raise UserError(
                f"objective.pixel_range={pixel_range!r} is not one of {', '.join(_RANGES)}"
                f"{did_you_mean(pixel_range, _RANGES)}"
            )
        weights = {
            "reconstruction": reconstruction_weight,
            "perceptual": perceptual_weight,
            "quantizer": quantizer_weight,
        }
        for name, weight in weights.items():
            if weight < 0:
                raise UserError(f"objective.{name}_weight={weight} is negative; use 0 to leave the term out")
        self.weights = weights
        self.distance = _DISTANCES[reconstruction]
        self.pixel_range = pixel_range
        self.perceptual = None if perceptual is None else perceptual.requires_grad_(False).eval()
        self.adversarial = adversarial
        if adversarial is not None:
            self.discriminator_start = adversarial.first_step
            measured = reconstruction_weight > 0 or (perceptual is not None and perceptual_weight > 0)
            if adversarial.adaptive_weight_max is not None and not measured:
                raise UserError(
                    "objective.adversarial.adaptive_weight_max is measured against the reconstruction and perceptual "
                    "terms but both are switched off; set it to null for a constant weight"
                )
        self.register_buffer("logvar", None if logvar_init is None else torch.tensor(float(logvar_init)))

    @property  # not a second registration of the module that `adversarial` holds
    def discriminator(self) -> nn.Module | None:  # type: ignore[override]
        return None if self.adversarial is None else self.adversarial.discriminator

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.perceptual is not None:
            self.perceptual.eval()
        return self

    def forward(
        self, output: TokenizerOutput, images: Tensor, step: int, last_layer: Tensor | None = None
    ) -> dict[str, Tensor]:
        reconstruction = _pixels_of(output)
        with torch.autocast(images.device.type, enabled=False):
            images, reconstruction = images.float(), reconstruction.float()
            shown, made = self._ranged(images), self._ranged(reconstruction)
            terms: dict[str, Tensor] = {}
            if self.weights["reconstruction"] > 0:
                scale = 1.0 if self.logvar is None else torch.exp(-self.logvar)
                terms["reconstruction"] = self.weights["reconstruction"] * scale * self.distance(made, shown)
            if self.perceptual is not None and self.weights["perceptual"] > 0:
                terms["perceptual"] = self.weights["perceptual"] * self.perceptual(images, reconstruction).mean()
            if self.adversarial is not None and self.adversarial.weight > 0:
                rest = torch.stack([images.new_zeros(()), *terms.values()]).sum()
                terms["adversarial"] = self.adversarial.generator_term(made, step, rest, last_layer)
            losses = list(output.quantized.losses.values())
            if losses and self.weights["quantizer"] > 0:
                terms["quantizer"] = self.weights["quantizer"] * torch.stack([loss.float() for loss in losses]).sum()
        return terms

    def discriminator_acts(self, step: int) -> bool:
        return self.adversarial is not None and self.adversarial.acts(step)

    def discriminator_turn(self, output: TokenizerOutput, images: Tensor, step: int) -> dict[str, Tensor]:
        """The discriminator's terms, at any step: before the start its loss counts 0, but LeCam already does."""
        if self.adversarial is None:
            return super().discriminator_turn(output, images, step)
        with torch.autocast(images.device.type, enabled=False):
            shown, made = self._ranged(images.float()), self._ranged(_pixels_of(output).float())
            return self.adversarial.discriminator_terms(shown, made, step)

    def _ranged(self, images: Tensor) -> Tensor:
        return images * 2 - 1 if self.pixel_range == "signed" else images

    def statistics(self) -> dict[str, Tensor]:
        """generator_loss (raw), adversarial_weight, adversarial_factor; logits_real, logits_fake, lecam_real and
        lecam_fake after a discriminator turn."""
        return {} if self.adversarial is None else dict(self.adversarial.statistics)


def _pixels_of(output: TokenizerOutput) -> Tensor:
    if output.reconstruction is None:
        raise UserError(
            "objective._target_=PixelObjective needs pixels but this tokenizer predicts proxy codes only; use "
            "smalti.objectives.codes.ProxyCodeObjective, or a tokenizer with a pixel head"
        )
    return output.reconstruction
