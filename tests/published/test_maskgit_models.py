"""MaskGIT's networks, masks, losses, gradients and initial values, as in the published code of TiTok's generators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smalti.generators.base import Condition, GeneratorOutput
from smalti.generators.decoding.schedules import masked_share, random_mask
from smalti.generators.maskgit import MaskGIT
from smalti.published.maskgit import build_generator, load_published, published_names, to_published
from smalti.tokenizers.spec import Tokens
from smalti.training.optim import split_by_decay

BODIES = ("maskgit-bert", "maskgit-uvit")


def model_of(case: Any) -> MaskGIT:
    model = build_generator(case.config)
    load_published(model, case.weights)
    return model


def draws_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"masked": "timestep_uniform", "order": "mask_uniform", "label": "label_drop_uniform"}
    return {ours: inputs[theirs] for ours, theirs in names.items() if theirs in inputs}


@pytest.mark.family(*BODIES, runner="forward")
def test_logits_are_the_published_ones(case: Any) -> None:
    model, labels = model_of(case).eval(), case.inputs["condition"]
    dropped = case.inputs["label_drop_uniform"] < model.label_dropout
    assert torch.equal(dropped, case.outputs["label_dropped"].bool())
    for name, given in (
        ("logits_cond", labels),
        ("logits_uncond", torch.full_like(labels, -1)),
        ("logits_drop", labels.masked_fill(dropped, -1)),
    ):
        with torch.inference_mode():
            case.compare(name, model.logits(case.inputs["input_ids"], given))


@pytest.mark.family(*BODIES, runner="masking")
def test_masks_are_the_published_ones(case: Any) -> None:
    model, drawn = build_generator(case.config), draws_of(case.inputs)
    masks = random_mask(model.mask_schedule, drawn["masked"], drawn["order"])
    case.compare("mask_ratio", masked_share(model.mask_schedule, drawn["masked"]))
    assert torch.equal(masks, case.outputs["masks"].bool())
    assert torch.equal(masks.sum(1), case.outputs["num_masked"])
    assert torch.equal(case.inputs["tokens"].masked_fill(masks, model.v), case.outputs["masked_tokens"])


@pytest.mark.family(*BODIES, runner="loss")
def test_losses_and_gradients_are_the_published_ones(case: Any) -> None:
    model = model_of(case).train()
    seen: list[Tensor] = []
    logits_of = model.logits

    def logits(indices: Tensor, labels: Tensor) -> Tensor:
        assert torch.equal(indices, case.outputs["masked_tokens"])
        seen.append(logits_of(indices, labels))
        return seen[0]

    model.logits = logits  # type: ignore[method-assign]
    output: GeneratorOutput = model(
        Tokens.full(None, case.inputs["tokens"]), Condition(case.inputs["condition"]), draws_of(case.inputs)
    )
    output.loss.backward()
    case.compare("logits", seen[0])
    case.compare("loss", output.loss)
    case.compare("correct_tokens", output.statistics["accuracy"])
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    case.compare("total_grad_norm", torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
    case.compare_gradients(to_published(model, gradients).__getitem__)
    assert sorted(case.names("grad_norm/")) == sorted(to_published(model))


@pytest.mark.family("maskgit-shapes")
def test_every_weight_of_a_published_size_has_its_place(case: Any) -> None:
    with torch.device("meta"):
        state = to_published(build_generator(case.config))
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {
        name: case.outputs[f"shape/{name}"].tolist() for name in case.names("shape/")
    }
    assert sum(tensor.numel() for tensor in state.values()) == int(case.outputs["num_parameters"])


@pytest.mark.family("maskgit-decay-groups")
def test_decayed_parameters_are_the_published_ones(case: Any) -> None:
    with torch.device("meta"):
        model = build_generator(case.config)
    names, (plain, decayed) = published_names(model), split_by_decay(model.named_parameters())
    ours = {theirs: 0 for name in plain for theirs in names[name]} | {t: 1 for name in decayed for t in names[name]}
    assert ours == {name: int(case.outputs[f"decayed/{name}"]) for name in case.names("decayed/")}


@pytest.mark.family("maskgit-init")
def test_fresh_parameters_are_distributed_as_published(case: Any) -> None:
    torch.manual_seed(0)
    compare_statistics(case, to_published(build_generator(case.config)))


def compare_statistics(case: Any, state: dict[str, Tensor]) -> None:
    """constant/, std/ and kurtosis/ of parameters under published names."""
    for name in case.names("constant/"):
        assert (state[name] == case.outputs[f"constant/{name}"]).all(), name
    for name in case.names("std/"):
        case.compare(f"std/{name}", state[name].std(correction=0))
    for name in case.names("kurtosis/"):
        centred = state[name].double() - state[name].double().mean()
        case.compare(f"kurtosis/{name}", centred.pow(4).mean() / centred.pow(2).mean() ** 2)
