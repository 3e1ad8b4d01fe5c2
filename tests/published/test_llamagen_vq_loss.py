"""LlamaGen's losses: both turns, its two discriminators, and its training loop (llamagen-vq-loss, -trajectory)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from smalti.objectives.adversarial import AdversarialLoss
from smalti.objectives.pixels import PixelObjective
from smalti.published.llamagen_vq import (
    build_tokenizer,
    load_discriminator,
    load_published,
    objective_from_config,
    published_discriminator_names,
    to_published,
)
from smalti.tokenizers.base import TokenizerOutput
from smalti.tokenizers.quantizers.base import Quantized
from smalti.training.ema import EMAConfig
from smalti.training.loop import build_trainer, fit
from smalti.training.optim import OptimConfig
from smalti.training.tokenizer_module import StepOutput, TokenizerModule


class ConvolutionDistance(nn.Module):
    """The stand-in for LPIPS that the fixtures describe: (conv(x) − conv(x̂))² of images in [−1, 1], a mean a sample."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        seen, made = (F.conv2d(x * 2 - 1, self.weight, stride=2, padding=1) for x in (images, reconstruction))
        return (seen - made).square().mean(dim=(1, 2, 3))


def objective_of(case: Any) -> PixelObjective:
    objective = objective_from_config(
        case.config["loss"],
        perceptual=ConvolutionDistance(case.weights["perceptual.conv.weight"]),
        stylegan_channels=(case.config.get("patched") or {}).get("stylegan_channels"),
    )
    load_discriminator(objective, case.weights_of("discriminator"))
    return objective


def unit(images: Tensor) -> Tensor:
    """[−1, 1], as published, to our [0, 1]."""
    return (images + 1) / 2


@pytest.mark.family("llamagen-vq-loss")
def test_both_turns_give_the_published_terms_and_gradients(case: Any) -> None:
    objective = objective_of(case).train()
    assert objective.discriminator is not None
    names = published_discriminator_names(objective)
    images, step = unit(case.inputs["image"]), case.config["run"]["global_step"] - 1  # theirs counts from 1

    def compare_buffers(turn: str) -> None:
        buffers = {names[name]: value for name, value in objective.discriminator.named_buffers() if name in names}
        for name in case.names(f"{turn}/buffer_after/"):
            case.compare(f"{turn}/buffer_after/{name}", buffers[name])

    last_layer = case.weights["last_layer"].clone().requires_grad_()
    signed = F.conv2d(case.inputs["features"], last_layer, padding=1)
    signed.retain_grad()
    losses = dict(zip(("codebook", "commitment", "entropy"), case.inputs["codebook_loss"], strict=True))
    output = TokenizerOutput(Quantized(torch.zeros(()), None, losses), reconstruction=unit(signed))
    logits: list[Tensor] = []
    watching = objective.discriminator.register_forward_hook(lambda module, inputs, result: logits.append(result))
    terms = objective(output, images, step, last_layer=last_layer)
    total = sum(terms.values())
    total.backward()
    raw, weights = objective.statistics(), objective.weights
    ours = {
        "reconstruction": signed,
        "rec_loss": terms["reconstruction"] / weights["reconstruction"],
        "perceptual_loss": terms["perceptual"] / weights["perceptual"],
        "adaptive_weight": raw["adversarial_weight"],
        "disc_weight": raw["adversarial_factor"],
        "gen/loss": total,
        "gen/logits_fake": logits[0],
        "gen/adv_loss": raw["generator_loss"],
        "gen/grad/reconstruction": signed.grad,
        "gen/grad/last_layer": last_layer.grad,
    }
    compare_buffers("gen")
    # Published, the generator's turn leaves gradients there, which its loop then drops; ours makes none.
    assert all(parameter.grad is None for parameter in objective.discriminator.parameters())

    logits.clear()
    loss = sum(objective.discriminator_turn(output, images, step).values())
    loss.backward()
    watching.remove()
    ours |= {"disc/loss": loss, "disc/logits_real": logits[0], "disc/logits_fake": logits[1]}
    compare_buffers("disc")
    gradients = {names[name]: parameter.grad for name, parameter in objective.discriminator.named_parameters()}
    for name, gradient in gradients.items():
        ours |= {f"disc/grad/{name}": gradient, f"disc/grad_norm/{name}": gradient.norm()}

    elsewhere = ("gen/buffer_after/", "disc/buffer_after/", "gen/discriminator_grad_norm/")
    for name in case.outputs:
        if not name.startswith(elsewhere):
            case.compare(name, ours[name])


class Record(pl.Callback):
    """Every step's output."""

    def __init__(self) -> None:
        self.outputs: list[StepOutput] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs["output"])


def optim_of(training: dict[str, Any]) -> OptimConfig:
    """Adam without decay: the published script parses a weight decay that it does not use."""
    return OptimConfig(
        lr=training["lr"],
        discriminator_lr=training["lr"],
        betas=(training["beta1"], training["beta2"]),
        weight_decay=0.0,
        schedule="constant",
        clip=training["max_grad_norm"] or None,
    )


@pytest.mark.family("llamagen-vq-trajectory")
def test_the_published_steps_are_ours(case: Any, tmp_path: Path) -> None:
    training, run = case.config["train"], case.config["run"]
    batches = [{"image": unit(images)} for images in case.inputs["images"]]
    tokenizer = build_tokenizer(
        case.config["model"], case.config.get("patched"), image_size=batches[0]["image"].shape[-1]
    )
    load_published(tokenizer, case.weights_of("model"))
    objective = objective_of(case)
    module = TokenizerModule(
        tokenizer,
        objective,
        optim_of(training),
        max_steps=run["steps"],
        ema=EMAConfig(decay=0.9999, constant=True),
    )
    # What is multiplied by 0 before the start is seen where it is made.
    logits: list[Tensor] = []  # of each step: reconstructions in the generator's turn, images, reconstructions
    raw_losses: list[Tensor] = []
    adversarial, discriminator = objective.adversarial, objective.discriminator
    assert adversarial is not None and discriminator is not None
    discriminator.register_forward_hook(lambda module, inputs, result: logits.append(result.detach()))
    loss = adversarial.loss

    def seen(real: Tensor, fake: Tensor) -> Tensor:
        raw_losses.append(loss.discriminator(real, fake).detach())
        return loss.discriminator(real, fake)

    adversarial.loss = AdversarialLoss(loss.generator, seen)
    record = Record()
    trainer = build_trainer(max_steps=run["steps"], folder=tmp_path, callbacks=[record], accelerator="cpu")
    fit(trainer, module, lambda start: DataLoader(batches[start:], batch_size=None))  # type: ignore[arg-type]

    steps, weights = record.outputs, objective.weights
    zero = torch.zeros(())

    def column(value: Any) -> Tensor:
        return torch.stack([torch.as_tensor(value(step)).double() for step in steps])

    # Published, usage is that of a ring of recent codes that begins as zeros; code 0 counts as used.
    ring, usage, indices = torch.zeros(65_536, dtype=torch.int64), [], []
    for step in steps:
        assert step.indices is not None
        indices.append(step.indices.flatten())
        ring = torch.cat([ring, indices[-1]])[-len(ring) :]
        shown = case.config["model"]["codebook_show_usage"]
        usage.append(len(ring.unique()) / case.config["model"]["codebook_size"] if shown else 0.0)
    commitment = case.config["model"]["commit_loss_beta"]
    entropy = case.config["model"]["entropy_loss_ratio"]
    ours = {
        "rec_loss": column(lambda step: step.terms["reconstruction"] / weights["reconstruction"]),
        "perceptual_loss": column(lambda step: step.terms["perceptual"] / weights["perceptual"]),
        "vq_loss": column(lambda step: step.statistics["codebook"]),
        "commit_loss": column(lambda step: commitment * step.statistics["commitment"]),
        "entropy_loss": column(lambda step: entropy * step.statistics.get("entropy", zero)),
        "gen_adv_loss": column(lambda step: step.statistics["generator_loss"]),
        "adaptive_weight": column(lambda step: step.statistics["adversarial_weight"]),
        "disc_weight": column(lambda step: step.statistics["adversarial_factor"]),
        "loss_gen": column(lambda step: step.loss),
        "loss_disc": column(lambda step: step.discriminator["discriminator"]),
        "disc_loss_unweighted": torch.stack(raw_losses),
        "logits_fake_gen": torch.stack([of_step.mean() for of_step in logits[::3]]),
        "logits_real": column(lambda step: step.statistics["logits_real"]),
        "logits_fake": column(lambda step: step.statistics["logits_fake"]),
        "grad_norm_gen": column(lambda step: step.norms["grad_norm"]),
        "grad_norm_disc": column(lambda step: step.norms["discriminator_grad_norm"]),
        "lr": column(lambda step: step.rates["lr"]),
        "codebook_usage": torch.tensor(usage),
    }
    for name in case.names("step/"):
        if name == "indices":
            case.compare_indices("step/indices", torch.stack(indices), margin="no margin")
        elif name != "margin":
            case.compare(f"step/{name}", ours[name])
    for role, model in (("final/model.", tokenizer), ("ema/", module.averaged)):
        state = to_published(model)
        for name in case.names(role):
            if name not in run["gradient_is_rounding_noise"]:
                case.compare(f"{role}{name}", state[name])
    names = published_discriminator_names(objective)
    state = {names[name]: value for name, value in discriminator.state_dict().items()}
    for name in case.names("final/discriminator."):
        case.compare(f"final/discriminator.{name}", state[name])
    averaged, before = to_published(module.averaged), case.weights_of("model")
    for name in case.names("ema_norm/"):
        case.compare(f"ema_norm/{name}", averaged[name].norm())
    tolerance = case.meta["tolerance"]["ema_delta_norm"]
    for name in case.names("ema_delta_norm/"):
        if name not in run["gradient_is_rounding_noise"]:
            moved = (averaged[name].double() - before[name].double()).norm()
            published = case.outputs[f"ema_delta_norm/{name}"]
            torch.testing.assert_close(moved, published, **tolerance, msg=f"{case} ema_delta_norm/{name}")
