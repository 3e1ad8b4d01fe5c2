"""Published configurations and loss-module weights: names, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smalti.errors import UserError
from smalti.objectives.perceptual import ConvNeXtLogits, LPIPSAndConvNeXt
from smalti.published.titok_objective import (
    load_objective_weights,
    objective_from_config,
    perceptual_from_name,
    published_names,
)

LOSSES = {
    "discriminator_start": 20_000,
    "quantizer_weight": 0.0,
    "discriminator_factor": 1.0,
    "discriminator_weight": 0.01,
    "perceptual_loss": "convnext_s",
    "perceptual_weight": 0.1,
    "reconstruction_loss": "l2",
    "reconstruction_weight": 1.0,
    "lecam_regularization_weight": 0.001,
}
SMALL = {"discriminator": {"hidden_channels": 32, "num_stages": 2}}


def build(**losses):
    return objective_from_config({"losses": LOSSES | losses}, SMALL, perceptual=nn.Identity())


def published_state(objective) -> dict[str, torch.Tensor]:
    state = objective.state_dict()
    return {theirs: torch.full_like(state[ours], 0.5) for ours, theirs in published_names(objective).items()}


def test_names_are_those_of_the_published_loss_module():
    # keys of the published discriminator (fixture family titok-stage2), without its constant blur kernels
    layers = ["block_in.0", "blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2", "to_logits.0", "to_logits.2"]
    expected = {f"discriminator.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert set(published_names(build()).values()) == expected | {"ema_real_logits_mean", "ema_fake_logits_mean"}


def test_no_name_of_ours_moves_a_parameter_to_another_decay_group():
    # the published rule (optim): no decay below two dimensions or with one of these in the name
    words = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")
    objective = build()
    names = published_names(objective)
    for ours, parameter in objective.named_parameters():
        groups = [parameter.ndim < 2 or any(word in name for word in words) for name in (ours, names[ours])]
        assert groups[0] == groups[1], ours


def test_weights_arrive_and_constants_are_left_alone():
    objective = build()
    kernel = objective.discriminator.stages[0].halve.kernel.clone()
    state = published_state(objective)
    state |= {
        "discriminator.blocks.0.1.kernel": torch.zeros(1, 1, 4, 4),
        "perceptual_loss.imagenet_mean": torch.zeros(3),
    }
    load_objective_weights(objective, state)
    assert all((tensor == 0.5).all() for tensor in objective.state_dict().values())
    assert torch.equal(objective.discriminator.stages[0].halve.kernel, kernel)


def test_a_gaussian_bottleneck_has_its_weight_and_logvar():
    config = {"losses": LOSSES | {"kl_weight": 1e-3}, "model": {"vq_model": {"quantize_mode": "vae"}}}
    objective = objective_from_config(config, SMALL, perceptual=nn.Identity())
    assert objective.weights["quantizer"] == 1e-3 and objective.logvar.item() == 0


def test_without_lecam_there_are_no_averages():
    assert not any("ema" in name for name in published_names(build(lecam_regularization_weight=0.0)).values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("ema_real_logits_mean"), "ema_real_logits_mean is missing"),
        (lambda state: state.update({"discriminator.extra": torch.zeros(1)}), "discriminator.extra .* has no place"),
        (lambda state: state.update({"discriminator.to_logits.2.bias": torch.zeros(7)}), r"has shape \(7,\) but"),
    ],
)
def test_a_state_that_does_not_fit_is_one_line_with_the_name(change, words):
    objective = build()
    state = published_state(objective)
    change(state)
    with pytest.raises(UserError, match=words):
        load_objective_weights(objective, state)


def test_perceptual_names_give_their_modules():
    convnext = ConvNeXtLogits(network=nn.Flatten())
    assert perceptual_from_name("convnext_s", convnext=convnext) is convnext
    lpips = nn.Identity()
    both = perceptual_from_name("lpips-convnext_s-0.5-2.0", lpips, convnext)  # type: ignore[arg-type]
    assert isinstance(both, LPIPSAndConvNeXt) and (both.lpips_weight, both.convnext_weight) == (0.5, 2.0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vgg", "use lpips, convnext_s"),
        ("lpips-convnext_s", "ends in no two weights"),
        ("lpips", "weights=null"),  # nothing is fetched unasked
    ],
)
def test_other_perceptual_names_are_one_line(name, words):
    with pytest.raises(UserError, match=words):
        perceptual_from_name(name)
