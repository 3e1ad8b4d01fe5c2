"""Several published training steps of LlamaGen's GPTs, through the real module, Trainer and optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from smalti.generators.gpt import GPT
from smalti.published.llamagen import build_generator, load_published, to_published
from smalti.training.ema import EMAConfig
from smalti.training.generator_module import GeneratorModule
from smalti.training.loop import build_trainer, fit
from smalti.training.module import StepOutput
from smalti.training.optim import OptimConfig, split_by_decay


class Record(pl.Callback):
    """Every step's output, and the weights after the first one."""

    def __init__(self) -> None:
        self.outputs: list[StepOutput] = []
        self.after_step1: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs["output"])
        if len(self.outputs) == 1:
            state = to_published(module.generator.state_dict())
            self.after_step1 = {name: tensor.clone() for name, tensor in state.items()}


def batches_of(case: Any) -> list[dict[str, Tensor]]:
    """Labels, or features with the columns that the published attention mask leaves to the last row."""
    inputs = case.inputs
    if "mask" not in inputs:
        return [
            {"indices": codes, "label": labels} for codes, labels in zip(inputs["codes"], inputs["cond"], strict=True)
        ]
    present = inputs["mask"][:, :, 0, -1, : inputs["cond"].shape[2]].bool()
    rows = zip(inputs["codes"], inputs["cond"], present, inputs["valid"], strict=True)
    return [{"indices": codes, "features": text, "mask": mask, "weight": valid} for codes, text, mask, valid in rows]


def train(case: Any, folder: Path, generator: GPT) -> tuple[GeneratorModule, Record]:
    recipe, steps = case.config["train"], case.config["run"]["steps"]
    optim = OptimConfig(
        lr=recipe["lr"],
        betas=(recipe["beta1"], recipe["beta2"]),
        weight_decay=recipe["weight_decay"],
        no_decay=(),
        schedule="constant",
        clip=recipe["max_grad_norm"] or None,
    )
    ema = EMAConfig(decay=0.9999, constant=True) if recipe["ema"] else None
    module = GeneratorModule(generator, optim, max_steps=steps, ema=ema)
    drops = iter(case.inputs["drop_uniform"])
    generator.draw = lambda batch_size, made, *, step: {"drop": next(drops)}  # type: ignore[method-assign]
    record = Record()
    trainer = build_trainer(max_steps=steps, folder=folder, callbacks=[record], accelerator="cpu")
    batches = batches_of(case)
    fit(trainer, module, lambda start: DataLoader(batches[start:], batch_size=None))  # type: ignore[arg-type]
    return module, record


@pytest.mark.family("llamagen-gpt-trajectory")
def test_the_published_steps_are_ours(case: Any, tmp_path: Path) -> None:
    generator = build_generator(case.config["model"])
    load_published(generator, case.weights)
    groups = split_by_decay(generator.named_parameters(), ())
    counts = [sum(parameter.numel() for parameter in group.values()) for group in groups]
    module, record = train(case, tmp_path, generator)

    compared: dict[str, Any] = {
        "step/loss": torch.stack([output.loss for output in record.outputs]),
        "step/grad_norm": torch.stack([output.norms["grad_norm"] for output in record.outputs]),
        "step/lr": torch.tensor([output.rates["lr"] for output in record.outputs]),
        "n_nodecay": torch.tensor(counts[0]),
        "n_decay": torch.tensor(counts[1]),
    }
    for name, tensor in record.after_step1.items():
        given = case.outputs.get(f"after_step1/{name}", torch.zeros(()))
        compared[f"after_step1/{name}"] = tensor if given.ndim else tensor.norm()
    compared |= {f"final/{name}": tensor for name, tensor in to_published(generator.state_dict()).items()}
    deltas: dict[str, Tensor] = {}
    if module.ema is not None:
        averaged = to_published(module.ema.model.state_dict())
        compared |= {f"ema/{name}": tensor for name, tensor in averaged.items()}
        deltas = {
            f"ema_delta_norm/{name}": (tensor.double() - case.weights[name].double()).norm()
            for name, tensor in averaged.items()
        }
    for name in case.outputs:
        if name in deltas:
            limits = case.meta["tolerance"]["ema_delta_norm"]
            torch.testing.assert_close(deltas[name], case.outputs[name].double(), **limits, msg=f"{case} {name}")
        else:
            case.compare(name, compared[name])
