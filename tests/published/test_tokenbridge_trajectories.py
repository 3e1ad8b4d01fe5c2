"""Several published training steps of TokenBridge, through the real module, Trainer and optimizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from test_mar_trajectories import latents_of, optim_of
from test_maskgit_trajectories import Record
from test_tokenbridge_models import draws_of
from torch import Tensor
from torch.utils.data import DataLoader

from smalti.generators.tokenbridge import TokenBridge
from smalti.published.tokenbridge import build_generator, load_published, published_names, quantizer_of, to_published
from smalti.tokenizers.quantizers.base import Draws
from smalti.training.ema import EMAConfig
from smalti.training.generator_module import GeneratorModule
from smalti.training.loop import build_trainer, fit
from smalti.training.optim import split_by_decay


def train(case: Any, folder: Path, generator: TokenBridge, indices: Tensor) -> tuple[GeneratorModule, Record]:
    """indices: (steps, b, n, q)."""
    optim, total = optim_of(case)
    optim = replace(optim, no_decay=())  # the head is decayed, and whatever else has two dimensions
    decay = case.config["args"]["ema_rate"]
    module = GeneratorModule(generator, optim, max_steps=total, ema=EMAConfig(decay=decay, constant=True))
    steps = [{name: tensor[i] for name, tensor in case.inputs.items()} for i in range(len(indices))]
    given = iter([draws_of(inputs) for inputs in steps])

    def draw(batch_size: int, generator: torch.Generator, *, step: int) -> Draws:
        return next(given)

    generator.draw = draw  # type: ignore[method-assign]
    record = Record()
    trainer = build_trainer(max_steps=len(indices), folder=folder, callbacks=[record], accelerator="cpu")
    batches = [{"indices": i, "label": labels} for i, labels in zip(indices, case.inputs["labels"], strict=True)]
    fit(trainer, module, lambda start: DataLoader(batches[start:], batch_size=None))  # type: ignore[arg-type]
    return module, record


@pytest.mark.family("tokenbridge-trajectory")
def test_the_published_steps_are_ours(case: Any, tmp_path: Path) -> None:
    generator = build_generator(case.config["model"])
    load_published(generator, case.weights)
    names, groups = published_names(generator), split_by_decay(generator.named_parameters(), ())
    latents, quantizer = latents_of(case), quantizer_of(case.config["model"])
    indices = torch.stack([quantizer(part).indices for part in latents])
    module, record = train(case, tmp_path, generator, indices)

    case.compare("latents/0", rearrange(latents[0], "b (h w) c -> b c h w", h=generator.spec.grid[0]))
    case.compare("loss", torch.stack([output.loss for output in record.outputs]))
    case.compare("grad_norm_preclip", torch.stack([output.norms["grad_norm"] for output in record.outputs]))
    rates = torch.tensor([output.rates["lr"] for output in record.outputs], dtype=torch.float64)
    torch.testing.assert_close(rates, case.outputs["lr"].double(), **case.meta["tolerance"]["lr"])
    assert case.outputs["group_sizes"].tolist() == [sum(len(names[name]) for name in group) for group in groups]
    assert module.ema is not None
    for role, model in (("final", generator), ("ema", module.ema.model)):
        compare_weights(case, role, to_published(model))
    compared = {"loss", "grad_norm_preclip", "lr", "group_sizes", "latents/0"}
    forgotten = [name for name in case.outputs if name not in compared and not name.startswith(("final/", "ema/"))]
    assert not forgotten, f"{case}: outputs that were not compared: {forgotten}"


def compare_weights(case: Any, role: str, state: dict[str, Tensor]) -> None:
    """All weights but those whose true gradient is 0, which Adam moves by rounding noise: biases of keys, and in the
    head, which normalises keys, of those norms."""
    assert set(case.names(f"{role}/")) == set(state)
    for name, tensor in state.items():
        ours = tensor.clone()
        if name.endswith("attn.k_norm.bias"):
            continue
        if name.endswith("attn.qkv.bias") and not name.startswith("channel_blocks."):
            width = len(ours) // 3
            ours[width : 2 * width] = case.outputs[f"{role}/{name}"][width : 2 * width]
        case.compare(f"{role}/{name}", ours)
