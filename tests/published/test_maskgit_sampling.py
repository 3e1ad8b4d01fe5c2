"""MaskGIT's sampling: guidance, both noises, scores and numbers of masked tokens, as in the published code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_maskgit_models import model_of
from torch import Tensor

from smalti.generators.decoding.masked import Prediction, Step
from smalti.generators.decoding.schedules import random_mask, stay_masked
from smalti.generators.maskgit import MaskGITSampling, SampleDraws, gumbel
from smalti.published.maskgit import sampling_of


class GivenDraws(SampleDraws):
    """The published form: a Gumbel number for every logit."""

    def __init__(self, case: Any) -> None:
        self.tokens, self.confidence = (case.inputs[f"gumbel_uniform_{name}"] for name in ("logits", "confidence"))

    def choose(self, step: Step, logits: Tensor, temperature: float) -> Tensor:
        return (logits + temperature * gumbel(self.tokens[step.index])).argmax(-1)

    def gumbel(self, step: Step) -> Tensor:
        return gumbel(self.confidence[step.index])


def published_scale(scale: float, settings: MaskGITSampling) -> float:
    """w of the published cond + w · (cond − uncond), which it has except under the power-cosine schedule."""
    return scale if settings.guidance_schedule == "power_cosine" else scale - 1


@pytest.mark.family("maskgit-sampling")
def test_every_step_is_the_published_one(case: Any) -> None:
    model, settings = model_of(case).eval(), MaskGITSampling(**sampling_of(case.config["model"]["generator"]))
    rows: list[int] = []
    logits_of = model.logits

    def counted(indices: Tensor, labels: Tensor) -> Tensor:
        rows.append(len(indices))
        return logits_of(indices, labels)

    model.logits = counted  # type: ignore[method-assign]
    parts = model.decoder(case.inputs["condition"], settings, GivenDraws(case))
    b, n = case.outputs["ids"].shape
    kept: list[tuple[Tensor, Tensor]] = []  # what each step began with: tokens, and which of them are masked
    predictions: list[Prediction] = []
    counts: list[int] = []

    def predictor(tokens: Tensor, masked: Tensor, step: Step) -> Prediction:
        kept.append((tokens, masked))
        predictions.append(parts.predictor(tokens, masked, step))
        return predictions[-1]

    def schedule(left: int, step: Step) -> int:
        counts.append(parts.schedule(left, step))
        return counts[-1]

    with torch.inference_mode():
        decode = replace(parts, predictor=predictor, schedule=schedule)
        ids = decode(torch.full((b, n), model.v), settings.steps)
        scores = [parts.scorer(prediction, Step(s, settings.steps)) for s, prediction in enumerate(predictions)]

    assert torch.equal(ids, case.outputs["ids"])
    case.compare("logits", torch.stack([prediction.logits for prediction in predictions]))
    masks = [masked for _, masked in kept]
    sampled = [torch.where(masked, p.tokens, tokens) for (tokens, masked), p in zip(kept, predictions, strict=True)]
    assert torch.equal(torch.stack(sampled), case.outputs["sampled_ids"])
    after = [tokens.masked_fill(masked, model.v) for tokens, masked in kept[1:]] + [ids]
    assert torch.equal(torch.stack(after), case.outputs["ids_after_step"])
    case.compare("num_masked_after", torch.stack([(tokens == model.v).sum(1) for tokens in after]))
    case.compare("confidence", torch.stack([x.masked_fill(~m, 1e30) for x, m in zip(scores, masks, strict=True)]))
    # The published code computes a number for the last step, too, and does not use it.
    assert counts == case.outputs["mask_len"][:-1].tolist()
    case.compare("cfg_scale", torch.tensor([published_scale(w, settings) for w in settings.scales()]))
    temperatures = [settings.temperature * (1 - Step(s, settings.steps).done) for s in range(settings.steps)]
    case.compare("annealed_temp", torch.tensor(temperatures))
    # Both branches are one batch here; none is computed in vain, as there under the power-cosine's first scale, 1.
    assert rows == [b if scale == 1 else 2 * b for scale in settings.scales()]
    assert int(case.outputs["model_calls"]) == sum(2 if w != 0 else 1 for w in case.outputs["cfg_scale"].tolist())


@pytest.mark.family("titok-schedules", kind="generator")
def test_schedules_of_the_generators_are_the_published_ones(case: Any) -> None:
    config = case.config["model"]["generator"]
    n, steps = config["image_seq_len"], config["num_steps"]
    for decay in ("constant", "linear", "power-cosine"):
        settings = MaskGITSampling(**sampling_of({**config, "guidance_decay": decay}))
        scales = [published_scale(w, settings) for w in settings.scales()]
        case.compare(f"maskgit/cfg_scale/{decay}", torch.tensor(scales))
        masked = [n]
        for step in (Step(s, steps) for s in range(steps - 1)):
            masked.append(stay_masked(settings.mask_schedule, n, masked[-1], step.done))
        case.compare(f"maskgit/masked_before_step/{decay}", torch.tensor(masked))
    masks = random_mask("arccos", case.inputs["mask_timestep"], case.inputs["mask_order_draw"])
    assert torch.equal(masks, case.outputs["maskgit/train_mask"].bool())
    case.compare("maskgit/train_num_masked", masks.sum(1))
    hidden = case.outputs["maskgit/train_masked_tokens"][masks]
    assert hidden.unique().numel() == 1  # the mask's number
    tokens = case.inputs["tokens"].masked_fill(masks, int(hidden[0]))
    assert torch.equal(tokens, case.outputs["maskgit/train_masked_tokens"])
