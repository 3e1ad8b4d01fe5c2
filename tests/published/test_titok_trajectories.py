"""Several published training steps, through the real module, Trainer and optimizers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from einops import rearrange
from test_objectives import ConvolutionDistance
from test_titok_schedules import optim_config
from torch import Tensor
from torch.utils.data import DataLoader

from smalti.objectives.base import Objective
from smalti.objectives.codes import ProxyCodeObjective
from smalti.published.titok import build_tokenizer, load_published, to_published
from smalti.published.titok_objective import load_objective_weights, objective_from_config, published_names
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.maskgit_vqgan import MaskGITVQGAN
from smalti.tokenizers.quantizers.base import Draws
from smalti.training.ema import EMAConfig
from smalti.training.loop import build_trainer, fit
from smalti.training.optim import OptimConfig
from smalti.training.tokenizer_module import StepOutput, TokenizerModule


class Record(pl.Callback):
    """Every micro-batch's output, and the teacher's codes for it."""

    def __init__(self, objective: Objective) -> None:
        self.outputs: list[StepOutput] = []
        self.proxy_codes: list[Tensor] = []
        self.objective = objective

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs["output"])
        if isinstance(self.objective, ProxyCodeObjective):
            self.proxy_codes.append(self.objective.codes(batch["image"]))


def teacher_of(case: Any) -> MaskGITVQGAN:
    """The frozen MaskGIT-VQGAN, of which a case holds the encoder and the codebook."""
    sizes = case.size_overrides["pixel_vqgan"]
    side = case.config["dataset"]["preprocessing"]["crop_size"]
    quantizer = {"num_embeddings": case.size_overrides["proxy_codebook"], "embedding_dim": sizes["z_channels"]}
    teacher = build_tokenizer({"vqgan": {**sizes, "resolution": side}, "quantizer": quantizer})
    assert isinstance(teacher, MaskGITVQGAN)
    load_published(teacher, {**to_published(teacher), **case.weights_of("teacher")})
    return teacher


def models_of(case: Any) -> tuple[Tokenizer, Objective]:
    """The tokenizer and the objective that a case begins with."""
    config = case.config
    tokenizer = build_tokenizer(config, case.size_overrides)
    load_published(tokenizer, case.weights_of("model"))
    stage_1 = "reconstruction_loss" not in config["losses"]
    objective = objective_from_config(
        config,
        case.size_overrides,
        perceptual=ConvolutionDistance(),
        teacher=teacher_of(case) if stage_1 else None,
    )
    if not stage_1:
        load_objective_weights(objective, case.weights_of("loss"))
    return tokenizer, objective


def train(
    case: Any,
    folder: Path,
    tokenizer: Tokenizer,
    objective: Objective,
    *,
    optim: OptimConfig,
    steps: int,
    draws: Iterable[Draws] | None = None,
) -> tuple[TokenizerModule, Record]:
    """`steps` steps of the case's training; `draws` of each micro-batch replace those that we would make."""
    training = case.config["training"]
    module = TokenizerModule(
        tokenizer,
        objective,
        optim,
        max_steps=training["max_train_steps"],
        ema=EMAConfig(0.999),
        accumulate=training["gradient_accumulation_steps"],
    )
    if draws is not None:
        given = iter(draws)
        tokenizer.draw = lambda batch_size, generator: next(given)  # type: ignore[method-assign]
    record = Record(objective)
    trainer = build_trainer(max_steps=steps, folder=folder, callbacks=[record], accelerator="cpu")
    batches = [{"image": images} for images in case.inputs["images"]]
    fit(trainer, module, lambda start: DataLoader(batches[start:], batch_size=None))  # type: ignore[arg-type]
    return module, record


def published_terms(case: Any, tokenizer: Any, output: StepOutput) -> dict[str, Tensor | float]:
    """A micro-batch's generator turn in the entries of the published loss dictionary."""
    zero = torch.zeros(())
    terms, raw, losses = output.terms, output.statistics, case.config["losses"]
    frozen = tokenizer.freeze_encoder  # there the bottleneck's losses count 0
    cost = getattr(tokenizer.quantizer, "commitment_weight", 0.0)
    quantizer = terms.get("quantizer", zero)
    return {
        "total_loss": output.loss,
        "reconstruction_loss": terms.get("reconstruction", zero),
        "perceptual_loss": terms.get("perceptual", zero),
        "quantizer_loss": quantizer,
        "kl_loss": quantizer,
        "commitment_loss": zero if frozen else cost * raw.get("commitment", zero),
        "codebook_loss": zero if frozen else raw.get("codebook", zero),
        "gan_loss": raw.get("generator_loss", zero),
        "weighted_gan_loss": terms.get("adversarial", zero),
        "d_weight": raw.get("adversarial_weight", losses.get("discriminator_weight", 0.0)),
        "discriminator_factor": raw.get("adversarial_factor", zero),
    }


def published_discriminator_terms(output: StepOutput) -> dict[str, Tensor]:
    return {
        "discriminator_loss": torch.stack(list(output.discriminator.values())).sum(),
        "lecam_loss": output.discriminator.get("lecam", torch.zeros(())),
        "logits_real": output.statistics["logits_real"],
        "logits_fake": output.statistics["logits_fake"],
    }


def compare_state(case: Any, role: str, state: dict[str, Tensor]) -> None:
    """`<role>/<name>` in full, and the shorter forms of it that a case may have instead or beside."""
    for name in case.names(f"{role}/"):
        if not case.left_out(name):
            case.compare(f"{role}/{name}", state[name].reshape(case.outputs[f"{role}/{name}"].shape))
    for name in case.names(f"{role}_norm/"):
        case.compare(f"{role}_norm/{name}", state[name].norm())
    for name in case.names(f"{role}_head/"):
        case.compare(f"{role}_head/{name}", state[name].flatten()[:64])
    for name in case.names(f"{role}_query_value/"):
        query, _, value = state[name].chunk(3)
        case.compare(f"{role}_query_value/{name}", torch.cat([query, value]))


@pytest.mark.family("titok-stage1-trajectory", "titok-stage2-trajectory", model_type="titok")
def test_the_published_steps_are_ours(case: Any, tmp_path: Path) -> None:
    draws = None
    if "noise" in case.inputs:  # the posterior's draws, (b, d, 1, n) there
        draws = [{"noise": noise} for noise in rearrange(case.inputs["noise"], "m b d 1 n -> m b n d")]
    optim, steps = optim_config(case.config), case.meta["optimizer_steps"]
    module, record = train(case, tmp_path, *models_of(case), optim=optim, steps=steps, draws=draws)
    outputs = record.outputs
    compared: set[str] = set()

    def compare(name: str, value: Any) -> None:
        if name in case.outputs:
            case.compare(name, torch.as_tensor(value).reshape(case.outputs[name].shape))
            compared.add(name)

    def column(turn: str, rows: list[dict[str, Any]]) -> None:
        for term in case.names(f"{turn}/"):
            compare(f"{turn}/{term}", torch.stack([torch.as_tensor(row[term]).float().mean() for row in rows]))

    ended = [output for output in outputs if output.ended]
    column("generator", [published_terms(case, module.tokenizer, output) for output in outputs])
    compare("lr/generator", torch.tensor([output.rates["lr"] for output in ended], dtype=torch.float64))
    compare("grad_norm_before_clip/generator", torch.stack([output.norms["grad_norm"] for output in ended]))
    if case.names("discriminator/"):
        column("discriminator", [published_discriminator_terms(output) for output in outputs if output.discriminator])
        turns = [output for output in ended if output.discriminator]
        rates = torch.tensor([output.rates["discriminator_lr"] for output in turns], dtype=torch.float64)
        compare("lr/discriminator", rates)
        norms = torch.stack([output.norms["discriminator_grad_norm"] for output in turns])
        compare("grad_norm_before_clip/discriminator", norms)
    if "indices" in case.outputs:
        case.compare_indices("indices", torch.stack([output.indices for output in outputs]))
        compared.add("indices")
    if "proxy_codes" in case.outputs:
        case.compare_indices("proxy_codes", torch.stack(record.proxy_codes), margin="no margin")
        compared.add("proxy_codes")

    tokenizer, averaged = module.tokenizer, module.ema.model
    names = published_names(module.objective)
    losses = {names[name]: value for name, value in module.objective.state_dict().items() if name in names}
    for role, state in (("final", to_published(tokenizer)), ("ema", to_published(averaged)), ("final_loss", losses)):
        compare_state(case, role, state)
    checked = ("final", "ema", "mask/", "margin")  # by compare_state; masks and margins say what is compared
    forgotten = [name for name in case.outputs if name not in compared and not name.startswith(checked)]
    assert not forgotten, f"{case}: outputs that were not compared: {forgotten}"
