"""FlexTok's flow: noise levels, guidance, time embedding, whole samplings and whole training passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from smalti import flow
from smalti.layers.time import TimestepEmbedding, sinusoid
from smalti.objectives.flow import FlowObjective
from smalti.published.flextok import (
    Module,
    build_tokenizer,
    load_published,
    read_decoder,
    read_noise,
    to_published,
)
from smalti.published.regularizers import nested_dropout
from smalti.tokenizers.base import TokenizerOutput
from smalti.tokenizers.flextok import FlexTok
from smalti.tokenizers.patch_vae import PatchVAE
from smalti.tokenizers.quantizers.base import Draws
from smalti.tokenizers.quantizers.fsq import FSQ
from smalti.tokenizers.regularizers import NestedDropout, keep_lengths
from smalti.tokenizers.spec import Tokens
from smalti.training.loop import build_trainer, fit
from smalti.training.optim import OptimConfig
from smalti.training.tokenizer_module import TokenizerModule


@pytest.mark.family("flextok-flow", kind="noise")
def test_levels_noised_latents_targets_and_loss_are_the_published_ones(case: Any) -> None:
    module = Module("flow_matching_noise_module", case.config["flow_matching_noise_module"])
    sigma = flow.NoiseLevels(**read_noise(module))(case.inputs["draw"])
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


# --- sampling


def images_of(case: Any, name: str) -> list[Tensor]:
    """The inputs `name/0`, `name/1`, …"""
    return [case.inputs[f"{name}/{i}"] for i in range(len(case.inputs)) if f"{name}/{i}" in case.inputs]


def decoder_alone(case: Any) -> FlexTok:
    """A FlexTok with a case's decoder; its VAE and encoder are not used."""
    tower = read_decoder(case.config)
    side = max(side * patch for side, patch in zip(tower.grid, tower.patch, strict=True))
    model = FlexTok(
        image_size=side,
        vae=PatchVAE(image_size=side, latent_channels=tower.channels, patch_size=1, width=1, depth=0),
        num_latent_tokens=tower.tokens,
        quantizer=FSQ(levels=[4] * tower.dim),  # the codes are given
        encoder={"width": 4, "depth": 1, "heads": 1},
        decoder=tower.settings,
        patch_size=list(tower.patch),
        regularizer=NestedDropout(),
        repa=tower.features,
    )
    load_published(nn.ModuleDict({"decoder": model.decoder}), case.weights, tower.names)
    return model.eval()


def guidance_scale(given: Any) -> Any:
    """A number, or "linear-a", which stands for t -> 1 + a·t."""
    if not isinstance(given, str):
        return given
    slope = float(given.removeprefix("linear-"))
    return lambda t: 1 + slope * t


@pytest.mark.family("flextok-flow", kind="euler")
def test_every_step_of_a_sampling_is_the_published_one(case: Any) -> None:
    model, run = decoder_alone(case), case.config["run"]
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    model.decoder.register_forward_hook(lambda _, inputs, result: calls.append((inputs[0], inputs[1], result[0])))
    codes = images_of(case, "quant")
    lengths = case.inputs.get("eval_keep_k", torch.full((len(codes),), model.spec.length))
    for i, noise in enumerate(images_of(case, "noise")):
        calls.clear()
        final = model.sample_latents(
            Tokens(codes[i], lengths[i : i + 1]),
            noise,
            steps=run["timesteps"],
            solver="euler",
            guidance=guidance_scale(run["guidance_scale"]),
            apg=run["perform_norm_guidance"],
        )
        assert len(calls) == run["timesteps"]
        for step, (x, t, velocity) in enumerate(calls):
            case.compare(f"step{step}/t", t.expand(len(codes)))
            case.compare(f"step{step}/x/{i}", x[:1])
            case.compare(f"step{step}/cond/{i}", velocity[:1])
            assert (f"step{step}/uncond/{i}" in case.outputs) == (len(x) == 2)  # both branches in one batch, or one
            if len(x) == 2:
                case.compare(f"step{step}/uncond/{i}", velocity[1:])
        case.compare(f"final/{i}", final)


# --- training


def training_model(case: Any) -> tuple[FlexTok, Any, Draws]:
    """The model of a case, which encodes to the given latents; published names; the draws of its training pass."""
    vae = {"vae": {"latent_channels": case.inputs["vae_latents/0"].shape[1], "scaling_factor": 1.0}}
    one_level = {"block_out_channels": [1], "norm_num_groups": 1}  # latents as large as images; it is not used
    model, names = build_tokenizer({**vae, **case.config}, one_level)
    published = to_published(model, names)
    load_published(model, {**{name: published[name] for name in published if "vae." in name}, **case.weights}, names)
    latents = torch.cat(images_of(case, "vae_latents"))
    model._latents = lambda images, draws=None: latents  # type: ignore[method-assign]
    nested = next(m for m in case.config["decoder"]["module_dict"].values() if "NestedDropout" in m["_target_"])
    table = keep_lengths(nested_dropout(nested).mode, model.spec.length)
    rounds = nested.get("size_sampling_mode", "uniform").startswith("uniform")
    lengths = table[case.inputs["keep_draw"] - 1 if rounds else case.inputs["keep_draw"]]
    draws = {
        "lengths": lengths,
        "null": case.inputs["null_draw"] < model.null_dropout,
        "sigma": model.noise_levels(case.inputs["draw"]),
        "noise": torch.cat(images_of(case, "noise")),
    }
    return model, names, draws


def compare_pass(case: Any, output: TokenizerOutput, draws: Draws, terms: dict[str, Tensor]) -> None:
    assert output.flow is not None and output.quantized.indices is not None
    case.compare("sigmas", output.flow.sigma)
    case.compare("keep_k", draws["lengths"])
    case.compare("loss", terms["flow"])
    case.compare("loss_per_image", (output.flow.velocity - output.flow.target).square().mean((1, 2, 3)))
    for i in range(len(draws["sigma"])):
        case.compare(f"velocity/{i}", output.flow.velocity[i : i + 1])
        clear = (case.outputs[f"margin/{i}"] > 1e-5).all(-1)
        assert torch.equal(output.quantized.indices[i : i + 1][clear], case.outputs[f"tokens/{i}"][clear])


class Recorder(pl.Callback):
    """The forward's output and the gradients that an optimizer step is made of."""

    def __init__(self, model: FlexTok) -> None:
        self.gradients: dict[str, Tensor] = {}
        model.register_forward_hook(lambda _, inputs, output: setattr(self, "output", output))

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        for name, parameter in module.tokenizer.named_parameters():
            if parameter.grad is not None:
                self.gradients[name] = parameter.grad.clone()


def published_gradients(model: FlexTok, names: Any, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(gradients.get(name, torch.zeros(())).expand_as(parameter))
    return to_published(model, names)


@pytest.mark.family("flextok-flow", kind="train")
def test_a_whole_training_pass_through_the_real_module_is_the_published_one(case: Any, tmp_path: Path) -> None:
    model, names, draws = training_model(case)
    objective, recorder = FlowObjective(), Recorder(model)
    objective.meet(model)
    module = TokenizerModule(model, objective, OptimConfig(lr=1e-3, clip=None), max_steps=1)
    model.draw = lambda batch_size, generator: draws  # type: ignore[method-assign]
    context = model.decoder.context(
        model.quantizer(model.encoder(model._latents(draws["noise"]))).latents, draws["lengths"], draws["null"]
    )
    for i, tokens in enumerate(context.tokens):
        case.compare(f"registers_dropped/{i}", tokens[None])

    trainer = build_trainer(max_steps=1, folder=tmp_path, callbacks=[recorder], accelerator="cpu")
    side = model.spec.image_size
    batch = {"image": torch.zeros(len(draws["sigma"]), 3, side, side)}
    fit(trainer, module, lambda start: DataLoader([batch][start:], batch_size=None))  # type: ignore[arg-type]

    output: TokenizerOutput = recorder.output  # type: ignore[attr-defined]
    compare_pass(case, output, draws, objective(output, batch["image"], 0))
    gradients = published_gradients(model, names, recorder.gradients)
    case.compare_gradients(lambda name: gradients[name])
    trained = {theirs for name in recorder.gradients for theirs in names.published(name)}
    assert trained == set(case.names("grad_norm/"))
