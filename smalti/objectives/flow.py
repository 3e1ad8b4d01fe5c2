"""Training a decoder that denoises: the error of its velocity, and early features like those of DINOv2 (REPA).

loss = mean |v − (noise − clean)|² + w_repa · (− cos(features, frozen features)) + w_q · Σ quantizer losses
The published FlexTok has no loss; this is rectified flow's, unweighted, as its sampler implies.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from smalti.errors import UserError
from smalti.objectives.base import Objective
from smalti.objectives.repa import Representation, misalignment
from smalti.tokenizers.base import Flow, Tokenizer, TokenizerOutput
from smalti.tokenizers.flextok import FlexTok

_LEVELS = ("clean", "middle", "noisy")  # thirds of σ
_DOUBLINGS = 20  # keep lengths up to 2^19 have a place of their own in the statistics
_MEMORY = 0.05  # weight of a batch in the running means
_NO_FLOW = (
    "objective._target_=FlowObjective needs a decoder that denoises but this tokenizer gives pixels or codes; use "
    "objective=pixels, or tokenizer=flextok"
)


class FlowObjective(Objective):
    """Terms `flow`, `repa`, `quantizer`; those of weight 0 are absent.

    repa: what the decoder's features shall resemble; null, or one whose weights are not there, trains without.
    repa_weight: 0.5 as in REPA; FlexTok's is not published. quantizer_weight: of the sum of the quantizer's losses
    (FSQ has none).
    """

    means: Tensor
    seen: Tensor

    def __init__(
        self, *, repa: Representation | None = None, repa_weight: float = 0.5, quantizer_weight: float = 1.0
    ) -> None:
        super().__init__()
        for name, weight in (("repa", repa_weight), ("quantizer", quantizer_weight)):
            if weight < 0:
                raise UserError(f"objective.{name}_weight={weight} is negative; use 0 to leave the term out")
        self.repa = repa if repa is not None and repa.available and repa_weight > 0 else None
        self.note = repa.missing if repa is not None and not repa.available else None
        self.repa_weight, self.quantizer_weight = repa_weight, quantizer_weight
        count = len(_LEVELS) + _DOUBLINGS
        self.register_buffer("means", torch.zeros(count))
        self.register_buffer("seen", torch.zeros(count, dtype=torch.bool))
        self._length = 1

    def meet(self, tokenizer: Tokenizer) -> list[str]:
        """Before training. The projection of features is left out of a tokenizer whose features nobody reads."""
        if not isinstance(tokenizer, FlexTok):
            raise UserError(_NO_FLOW)
        dim = tokenizer.features_dim
        if self.repa is None:
            if dim is not None:
                tokenizer.leave_out_features()
            return [] if self.note is None else [self.note]
        if dim != self.repa.dim:
            has = "null" if dim is None else f"{{dim: {dim}}}"
            raise UserError(
                f"objective.repa={self.repa.model} has features of {self.repa.dim} channels, but tokenizer.repa={has}; "
                f"set tokenizer.repa={{layer: 1, dim: {self.repa.dim}}}, or objective.repa=null"
            )
        return []

    def forward(
        self, output: TokenizerOutput, images: Tensor, step: int, last_layer: Tensor | None = None
    ) -> dict[str, Tensor]:
        flow = output.flow
        if flow is None:
            raise UserError(_NO_FLOW)
        with torch.autocast(images.device.type, enabled=False):
            errors = (flow.velocity.float() - flow.target.float()).square().mean((1, 2, 3))
            self._note(errors.detach(), flow, output.quantized.latents.shape[1])
            terms = {"flow": errors.mean()}
            if self.repa is not None:
                if flow.features is None:
                    raise UserError(
                        "objective.repa needs features of the decoder; set tokenizer.repa={layer: 1, dim: …}"
                    )
                terms["repa"] = self.repa_weight * misalignment(flow.features.float(), self.repa(images)).mean()
            losses = list(output.quantized.losses.values())
            if losses and self.quantizer_weight > 0:
                terms["quantizer"] = self.quantizer_weight * torch.stack([loss.float() for loss in losses]).sum()
        return terms

    def statistics(self) -> dict[str, Tensor]:
        """Running means of the flow's error: flow_clean, flow_middle, flow_noisy by thirds of σ; flow_at_1, _2, _4, …
        by keep length, up to that number and above the one before; images without condition are in none of those."""
        means = self.means.clone().unbind()
        doublings = (self._length - 1).bit_length() + 1
        by_level = {f"flow_{name}": mean for name, mean in zip(_LEVELS, means, strict=False)}
        return by_level | {f"flow_at_{2**i}": means[len(_LEVELS) + i] for i in range(doublings)}

    @torch.no_grad()
    def _note(self, errors: Tensor, flow: Flow, length: int) -> None:
        """Add a batch to the running means. A place that no image has fallen into yet shows the mean of all."""
        self._length = length
        level = (flow.sigma * len(_LEVELS)).long().clamp(max=len(_LEVELS) - 1)
        edges = 2 ** torch.arange(_DOUBLINGS - 1, device=errors.device)
        doubling = len(_LEVELS) + torch.bucketize(flow.lengths, edges)
        places = torch.arange(len(self.means), device=errors.device)
        member = (level[:, None] == places) | ((doubling[:, None] == places) & (flow.lengths[:, None] > 0))
        member = F.pad(member, (0, 1), value=True)  # and all images
        totals = torch.stack([member.float().sum(0), torch.where(member, errors[:, None], 0.0).sum(0)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
        count, mean = totals[0, :-1], (totals[1] / totals[0].clamp(min=1))
        here, new = count > 0, ~self.seen
        moved = torch.where(new, mean[:-1], self.means.lerp(mean[:-1], _MEMORY))
        self.means.copy_(torch.where(here, moved, torch.where(new, mean[-1], self.means)))
        self.seen |= here
