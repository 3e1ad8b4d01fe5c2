"""FlexTok's flow: noise levels, guidance, time embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smalti import flow
from smalti.layers.time import TimestepEmbedding, sinusoid


def noise_levels(config: dict[str, Any]) -> flow.NoiseLevels:
    """The published noise module; there, stratified draws exist for logit-normal levels only."""
    normal, scale = config.get("ln", False), config.get("mode_scale", 0.0)
    return flow.NoiseLevels(
        distribution="logit_normal" if normal else "mode" if scale else "uniform",
        mode_scale=scale,
        stratified=normal and config.get("stratisfied", False),
    )


@pytest.mark.family("flextok-flow", kind="noise")
def test_levels_noised_latents_targets_and_loss_are_the_published_ones(case: Any) -> None:
    sigma = noise_levels(case.config["flow_matching_noise_module"])(case.inputs["draw"])
    case.compare("sigmas", sigma)
    case.compare("timesteps", sigma)
    losses = []
    for image in range(len(sigma)):
        clean, noise, predicted = (case.inputs[f"{name}/{image}"] for name in ("clean", "noise", "pred"))
        noised, target = flow.add_noise(clean, noise, sigma[image : image + 1])
        case.compare(f"noised/{image}", noised)
        case.compare(f"target/{image}", target)
        losses.append((predicted - target).square().mean())
    case.compare("loss_per_image", torch.stack(losses))
    case.compare("loss", torch.stack(losses).mean())


@pytest.mark.family("flextok-flow", kind="guidance")
def test_every_step_of_guidance_is_the_published_one(case: Any) -> None:
    run = case.config["run"]
    momentum = run["momentum"] or 0.0
    settings = {"momentum": momentum, "threshold": run["norm_threshold"], "eta": run["eta"]}
    plain = flow.Guidance(scale=run["guidance_scale"])
    projected = flow.Guidance(scale=run["guidance_scale"], projected=True, **settings)
    step = iter(zip(case.inputs["cond"], case.inputs["uncond"], strict=True))
    branches: list[torch.Tensor] = []

    def both(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat(branches)

    with_memory = flow.guided(both, projected)
    running = torch.zeros(())
    for index, branches[:] in enumerate(step):
        conditional, unconditional = branches
        x, t = torch.zeros_like(conditional), torch.zeros(len(conditional))
        case.compare(f"cfg/{index}", flow.guided(both, plain)(x, t))
        case.compare(f"apg/{index}", with_memory(x, t))
        running = conditional - unconditional + momentum * running
        case.compare(f"momentum/{index}", running)
        capped = flow.cap(running, run["norm_threshold"])
        if f"norm/{index}" in case.outputs:
            case.compare(f"norm/{index}", running.flatten(1).norm(dim=1)[:, None, None, None])
            torch.testing.assert_close(capped, running * case.outputs[f"scale/{index}"], rtol=1e-5, atol=2e-5)
        parallel, orthogonal = flow.project(capped, conditional)
        case.compare(f"parallel/{index}", parallel)
        case.compare(f"orthogonal/{index}", orthogonal)


@pytest.mark.family("flextok-flow", kind="rescale")
def test_rescaled_guidance_is_the_published_one(case: Any) -> None:
    run, conditional, unconditional = case.config["run"], case.inputs["cond"], case.inputs["uncond"]
    velocity = unconditional + run["guidance_scale"] * (conditional - unconditional)
    case.compare("cfg", velocity)
    for index, settings in enumerate(run["rescale"]):
        ours = flow.rescale(velocity, conditional, settings["rescale"], channel_wise=settings["channel_wise"])
        case.compare(f"rescaled/{index}", ours)
    for index, settings in enumerate(run["dynamic"]):
        case.compare(f"dynamic/{index}", flow.rescale_to_mimic(velocity, conditional, unconditional, **settings))


@pytest.mark.family("flextok-flow", kind="sigma_shift")
def test_levels_shifted_by_resolution_are_the_published_ones(case: Any) -> None:
    factor = case.inputs["resolutions"].float().prod(1).sqrt() / case.config["run"]["base_resolution"]
    case.compare("shifted", flow.shift_levels(case.inputs["sigmas"], factor))


@pytest.mark.family("flextok-flow", kind="timestep_embedding")
def test_the_time_embedding_is_the_published_one(case: Any) -> None:
    config = case.config["time_embedder"]
    size, largest = config.get("frequency_embedding_size", 256), config.get("max_timestep", 1000.0)
    case.compare("sinusoid", sinusoid(case.inputs["t"], size, largest))
    embedding = TimestepEmbedding(config["dim"], size, largest)
    names = {"mlp.0": "fc", "mlp.2": "proj"}
    embedding.load_state_dict({names[name[:5]] + name[5:]: value for name, value in case.weights.items()})
    case.compare("temb", embedding(case.inputs["t"]))
