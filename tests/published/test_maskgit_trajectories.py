"""Several published training steps of MaskGIT and RAR, through the real module, Trainer and optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from test_maskgit_models import draws_of
from test_titok_schedules import optim_config
from test_titok_trajectories import compare_state
from torch import Tensor
from torch.utils.data import DataLoader

from smalti.generators.base import Generator
from smalti.generators.rar import RAR, choose_orders
from smalti.published import maskgit, rar
from smalti.tokenizers.quantizers.base import Draws
from smalti.training.ema import EMAConfig
from smalti.training.generator_module import GeneratorModule
from smalti.training.loop import build_trainer, fit
from smalti.training.module import StepOutput
from smalti.training.optim import OptimConfig, learning_rate


class Record(pl.Callback):
    """Every micro-batch's output."""

    def __init__(self) -> None:
        self.outputs: list[StepOutput] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs["output"])


def given_draws(case: Any, generator: Generator) -> Iterator[Any]:
    """For each micro-batch, its random numbers as a function of the step."""
    for row in range(len(case.inputs["tokens"])):
        inputs = {name: tensor[row] for name, tensor in case.inputs.items()}
        if isinstance(generator, RAR):
            yield lambda step, given=inputs, model=generator: {
                "order": choose_orders(given["order_uniform"], given["perms"], model.random_ratio(step)),
                "label": given["label_drop_uniform"],
            }
        else:
            yield lambda step, given=inputs: draws_of(given)


def train(case: Any, folder: Path, generator: Generator, optim: OptimConfig) -> tuple[GeneratorModule, Record]:
    training = case.config["training"]
    module = GeneratorModule(
        generator,
        optim,
        max_steps=training["max_train_steps"],
        ema=EMAConfig(0.999) if training["use_ema"] else None,
        accumulate=training["gradient_accumulation_steps"],
    )
    given = given_draws(case, generator)

    def draw(batch_size: int, generator: torch.Generator, *, step: int) -> Draws:
        return next(given)(step)

    generator.draw = draw  # type: ignore[method-assign]
    record = Record()
    steps = int(case.outputs["global_step"])
    trainer = build_trainer(max_steps=steps, folder=folder, callbacks=[record], accelerator="cpu")
    rows = zip(case.inputs["tokens"], case.inputs["condition"], strict=True)
    batches = [{"indices": tokens, "label": labels} for tokens, labels in rows]
    fit(trainer, module, lambda start: DataLoader(batches[start:], batch_size=None))  # type: ignore[arg-type]
    return module, record


@pytest.mark.family("maskgit-trajectory", "rar-trajectory")
def test_the_published_steps_are_ours(case: Any, tmp_path: Path) -> None:
    published: Any = rar if case.meta["model_type"] == "rar" else maskgit
    generator = published.build_generator(case.config)
    published.load_published(generator, case.weights)
    config = {**case.config, **maskgit.resolved(case.config)}
    optim = optim_config(config)
    module, record = train(case, tmp_path, generator, optim)
    outputs, ended = record.outputs, [output for output in record.outputs if output.ended]
    total, steps = config["training"]["max_train_steps"], int(case.outputs["global_step"])

    compared = {
        "loss": torch.stack([output.loss for output in outputs]),
        "correct_tokens": torch.stack([output.statistics["accuracy"] for output in outputs]),
        "grad_norm": torch.stack([output.norms["grad_norm"] for output in ended]),
        "lr": torch.tensor([output.rates["lr"] for output in ended], dtype=torch.float64),
        "lr_after_last": torch.tensor(learning_rate(optim, steps, total)),
        "global_step": torch.tensor(module.step),
    }
    if isinstance(generator, RAR):
        made = [0, *(output.step for output in outputs)][:-1]  # updates before each micro-batch
        compared["random_ratio"] = torch.tensor([generator.random_ratio(step) for step in made])
    if module.ema is not None:
        compared["ema_decay"] = torch.tensor([module.ema.config.at(step) for step in range(1, steps + 1)])
    for name, value in compared.items():
        case.compare(name, value)

    state = with_unread_rows(case, published.to_published(generator))
    compare_state(case, "final", state)
    if module.ema is not None:
        compare_state(case, "ema", with_unread_rows(case, published.to_published(module.ema.model)))
    forgotten = [n for n in case.outputs if n not in compared and not n.startswith(("final/", "ema/"))]
    assert not forgotten, f"{case}: outputs that were not compared: {forgotten}"
    assert {n for n in state if not case.left_out(n)} == set(case.names("final/"))


def with_unread_rows(case: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """RAR's tables, with the published rows that nothing reads, which training leaves as they were."""
    for name, (_, unread) in rar.TABLES.items():
        if case.meta["model_type"] == "rar":
            state[name] = torch.cat([state[name][:, :-unread], case.weights[name][:, -unread:]], dim=1)
    return state
