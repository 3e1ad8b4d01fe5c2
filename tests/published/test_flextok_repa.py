"""FlexTok's head for features, and REPA's loss on what it gives (the loss is not in the published code)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smalti.layers.mlp import ProjectionHead
from smalti.objectives.repa import misalignment
from smalti.published.flextok import Module, Names, load_published, read_decoder, read_head, to_published
from smalti.published.regularizers import nested_dropout
from smalti.tokenizers.regularizers import keep_lengths


def head_of(case: Any) -> tuple[ProjectionHead, dict[str, str]]:
    """The published MLP head with fresh weights, and {our prefix: published prefix}."""
    config = case.config["head"]
    settings, places = read_head(Module("head", config), "head.")
    layers = settings["hidden_layers"] + 1
    options = {"ratio": settings["hidden_ratio"], "norm": settings["norm"], "bias": settings["bias"]}
    return ProjectionHead(config["dim"], settings["dim"], layers=layers, **options), places


def compare_gradients(case: Any, model: nn.Module, names: Names, prefix: str = "") -> None:
    """Published names are without `prefix` in the case."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    published = to_published(model, names)
    case.compare_gradients(lambda name: published[prefix + name])


@pytest.mark.family("flextok-repa", kind="mlp_head")
def test_the_projection_is_the_published_head(case: Any) -> None:
    head, places = head_of(case)
    model, names = nn.ModuleDict({"head": head}), Names({**places, "head": "head"}, ())
    load_published(model, {f"head.{name}": value for name, value in case.weights.items()}, names)
    loss, inputs = torch.zeros(()), []
    for i in range(sum(name.startswith("x/") for name in case.inputs)):
        x = case.inputs[f"x/{i}"].requires_grad_()
        projected = head(x)
        case.compare(f"out/{i}", projected)
        loss = loss + (projected * case.inputs[f"probe/{i}"]).sum()
        inputs.append(x)
    loss.backward()
    for i, x in enumerate(inputs):
        case.compare(f"grad_x/{i}", x.grad)
    compare_gradients(case, model, names, prefix="head.")


@pytest.mark.family("flextok-repa", kind="chain")
def test_features_projections_and_the_loss_through_the_decoder_are_the_published_ones(case: Any) -> None:
    tower = read_decoder(case.config)
    decoder = tower.decoder()
    head, places = head_of(case)
    model = nn.ModuleDict({"decoder": decoder, "head": head})
    names = Names({**tower.names.places, **places}, tower.names.gated)
    load_published(model, case.weights, names)

    count = len(case.inputs["timesteps"])
    mode = nested_dropout(tower.nested or {}).mode
    table, draws = keep_lengths(mode, tower.tokens), case.inputs["keep_draw"]
    lengths = table[draws - 1 if mode.startswith("uniform") else draws]
    null = case.inputs["null_draw"] < tower.null_dropout
    losses: list[Tensor] = []
    for i in range(count):
        one = slice(i, i + 1)
        context = decoder.context(case.inputs[f"quant/{i}"], lengths[one], null[one])
        _, features = decoder(case.inputs[f"noised/{i}"], case.inputs["timesteps"][one], context)
        assert features is not None
        target = case.inputs[f"target/{i}"]
        case.compare(f"features/{i}", features.unflatten(1, target.shape[1:3]))
        projected = head(features)
        case.compare(f"projected/{i}", projected.unflatten(1, target.shape[1:3]))
        each = misalignment(projected.flatten(0, 1)[:, None], target.flatten(0, 2)[:, None, None])  # patch by patch
        case.compare(f"cosine/{i}", -each.view(target.shape[:3]))
        losses.append(misalignment(projected, target))
    loss = torch.cat(losses).mean()
    case.compare("loss", loss)
    loss.backward()
    compare_gradients(case, model, names)
