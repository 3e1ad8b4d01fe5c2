"""Several published training steps of MAR, through the real module, Trainer and optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from test_mar_models import draws_of, record_losses
from test_maskgit_trajectories import Record
from torch import Tensor
from torch.utils.data import DataLoader

from smalti.generators.mar import MAR
from smalti.published.mar import build_generator, load_published, published_names, to_published
from smalti.tokenizers.quantizers.base import Draws
from smalti.tokenizers.quantizers.kl import GaussianQuantizer
from smalti.training.ema import EMAConfig
from smalti.training.generator_module import GeneratorModule
from smalti.training.loop import build_trainer, fit
from smalti.training.optim import OptimConfig, split_by_decay

SCALE = 0.2325  # published, of KL-16's latents
NO_DECAY = ("head.",)  # of configs/experiment/mar.yaml; beside everything of one dimension


def latents_of(case: Any) -> Tensor:
    """(steps, b, n, c): samples of the posteriors, scaled."""
    moments, noise = case.inputs["moments"], case.inputs["posterior_noise"]
    steps, _, channels = noise.shape[:3]
    quantizer = GaussianQuantizer(dim=channels)
    flat = [rearrange(x, "s b c h w -> (s b) (h w) c") for x in (moments, noise)]
    return rearrange(quantizer(flat[0], {"noise": flat[1]}).latents * SCALE, "(s b) n c -> s b n c", s=steps)


def optim_of(case: Any) -> tuple[OptimConfig, int]:
    """The recipe, whose epochs are so many steps here; and the steps of all epochs."""
    args, per_epoch = case.config["args"], case.config["steps_per_epoch"]
    lr = args["lr"] if args["lr"] is not None else args["blr"] * case.config["eff_batch_size"] / 256
    warmup = args["warmup_epochs"] * per_epoch
    assert warmup == int(warmup)
    optim = OptimConfig(
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=args["weight_decay"],
        no_decay=NO_DECAY,
        warmup_steps=int(warmup),
        end_lr=args["min_lr"],
        schedule=args["lr_schedule"],
        clip=args["grad_clip"],
    )
    return optim, args["epochs"] * per_epoch


class Later(GeneratorModule):
    """A module whose training goes on at a later epoch: `before` updates were made already."""

    before = 0

    @property
    def step(self) -> int:
        return self.before + super().step


def train(case: Any, folder: Path, generator: MAR, latents: Tensor) -> tuple[GeneratorModule, Record]:
    optim, total = optim_of(case)
    module = Later(
        generator, optim, max_steps=total, ema=EMAConfig(decay=case.config["args"]["ema_rate"], constant=True)
    )
    module.before = case.config["start_epoch"] * case.config["steps_per_epoch"]
    steps = len(latents)
    given = iter(
        draws_of({name: tensor[i] for name, tensor in case.inputs.items()}, generator.loss_repeats)
        for i in range(steps)
    )

    def draw(batch_size: int, generator: torch.Generator, *, step: int) -> Draws:
        return next(given)

    generator.draw = draw  # type: ignore[method-assign]
    record = Record()
    trainer = build_trainer(max_steps=steps, folder=folder, callbacks=[record], accelerator="cpu")
    rows = zip(latents, case.inputs["labels"], strict=True)
    batches = [{"latents": tokens, "label": labels} for tokens, labels in rows]
    fit(trainer, module, lambda start: DataLoader(batches[start:], batch_size=None))  # type: ignore[arg-type]
    return module, record


@pytest.mark.family("mar-trajectory")
def test_the_published_steps_are_ours(case: Any, tmp_path: Path) -> None:
    generator = build_generator(case.config["model"])
    load_published(generator, case.weights)
    names, groups = published_names(generator), split_by_decay(generator.named_parameters(), NO_DECAY)
    latents, seen = latents_of(case), record_losses(generator)
    module, record = train(case, tmp_path, generator, latents)

    case.compare("latents/0", rearrange(latents[0], "b (h w) c -> b c h w", h=generator.spec.grid[0]))
    case.compare("loss", torch.stack([output.loss for output in record.outputs]))
    for i, name in enumerate(("mse", "vb")):
        case.compare(name, torch.stack([terms[i].mean() for terms in seen]))
    case.compare("grad_norm_preclip", torch.stack([output.norms["grad_norm"] for output in record.outputs]))
    rates = torch.tensor([output.rates["lr"] for output in record.outputs], dtype=torch.float64)
    torch.testing.assert_close(rates, case.outputs["lr"].double(), **case.meta["tolerance"]["lr"])
    sizes = [sum(len(names[name]) for name in group) for group in groups]
    assert case.outputs["group_sizes"].tolist() == sizes
    assert module.ema is not None
    for role, model in (("final", generator), ("ema", module.ema.model)):
        compare_weights(case, role, to_published(model))
    compared = {"loss", "mse", "vb", "grad_norm_preclip", "lr", "group_sizes", "latents/0"}
    forgotten = [name for name in case.outputs if name not in compared and not name.startswith(("final/", "ema/"))]
    assert not forgotten, f"{case}: outputs that were not compared: {forgotten}"


def compare_weights(case: Any, role: str, state: dict[str, Tensor]) -> None:
    """All weights, but for the keys' biases, whose true gradient is 0: Adam moves them by rounding noise."""
    assert set(case.names(f"{role}/")) == set(state)
    for name, tensor in state.items():
        ours = tensor.clone()
        if name.endswith("attn.qkv.bias"):
            width = len(ours) // 3
            ours[width : 2 * width] = case.outputs[f"{role}/{name}"][width : 2 * width]
        case.compare(f"{role}/{name}", ours)
