"""Published MAR files from end to end: a checkpoint-last.pth in, a generator out."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import smalti
from smalti.errors import UserError
from smalti.generators.base import Condition
from smalti.generators.mar import MAR
from smalti.published.export import SOURCES
from smalti.published.mar import build_generator, convert, infer, to_published

CONFIG = {  # arguments of the published constructor, tiny; the width is MAR-B's, which tells the number of heads
    "img_size": 64, "vae_stride": 16, "patch_size": 1, "vae_embed_dim": 4, "class_num": 3, "buffer_size": 5,
    "encoder_embed_dim": 768, "encoder_depth": 1, "encoder_num_heads": 12, "decoder_embed_dim": 768,
    "decoder_depth": 2, "decoder_num_heads": 12, "diffloss_d": 2, "diffloss_w": 16,
}  # fmt: skip
TRAINED = {"attn_dropout": 0.2, "proj_dropout": 0.0, "label_drop_prob": 0.3, "diffusion_batch_mul": 2}


def weights(seed: int, **config: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = to_published(build_generator({**CONFIG, **config}))
    return {name: torch.randn_like(tensor) * 0.02 for name, tensor in state.items()}


def write(folder: Path, **more: Any) -> dict[str, dict[str, Tensor]]:
    """A file as the published training writes it; its live and its averaged weights."""
    states = {"model": weights(0), "model_ema": weights(1)}
    torch.save({**states, **more}, folder / "checkpoint-last.pth")
    return states


def assert_holds(model: MAR, state: dict[str, Tensor]) -> None:
    ours = to_published(model)
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], state[name]) for name in state)


def test_a_released_file_becomes_an_export_with_equal_tokens(tmp_path: Path) -> None:
    states = write(tmp_path)
    model = SOURCES["mar"](str(tmp_path), None)
    assert isinstance(model, MAR)
    assert_holds(model, states["model_ema"])
    assert_holds(convert(tmp_path / "checkpoint-last.pth", weights="model"), states["model"])
    given = {"iterations": 16, "steps": 100, "guidance": 2.9, "guidance_schedule": "linear", "temperature": 1.0}
    assert {name: getattr(model.sampling, name) for name in given} == given
    model.save_pretrained(tmp_path / "export")
    loaded = smalti.load(tmp_path / "export")
    assert loaded.metadata["licence"] == "MIT" and "LTH14/mar" in loaded.metadata["source"]
    made = [
        one.generate(Condition(torch.arange(2)), seeds=torch.arange(2), sampling={"iterations": 2, "steps": 3}).latents
        for one in (model, loaded)
    ]
    assert torch.equal(*made)


def test_sizes_are_read_off_the_weights_and_the_rest_off_the_trainings_settings(tmp_path: Path) -> None:
    assert infer(weights(0)) == CONFIG
    write(tmp_path, optimizer={"state": {}}, epoch=3, args=argparse.Namespace(**TRAINED, patch_size=1, blr=1e-4))
    model = convert(tmp_path)
    named = ("attention_dropout", "dropout", "label_dropout", "loss_repeats")
    assert {name: model.arguments[name] for name in named} == dict(zip(named, TRAINED.values(), strict=True))
    assert model.spec.grid == (4, 4) and model.spec.dim == 4 and model.num_classes == 3


def test_patches_are_told_by_the_trainings_settings(tmp_path: Path) -> None:
    config = {"patch_size": 2, "img_size": 128}
    torch.save({"model_ema": weights(0, **config), "args": argparse.Namespace(patch_size=2)}, tmp_path / "x.pth")
    model = convert(tmp_path / "x.pth")
    assert model.patch_size == 2 and model.spec.grid == (8, 8) and model.spec.dim == 4 and model.n == 16


def test_another_width_needs_a_config(tmp_path: Path) -> None:
    other = {"encoder_embed_dim": 24, "encoder_num_heads": 3, "decoder_embed_dim": 24, "decoder_num_heads": 2}
    torch.save({"model_ema": weights(0, **other)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"a width of 24, whose number of heads is not known .*; give config=FILE"):
        convert(tmp_path / "x.pth")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **other}))
    model = convert(tmp_path / "x.pth", tmp_path / "config.json")
    assert model.arguments["heads"] == 3 and model.arguments["decoder_heads"] == 2
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **other, "buffer_size": 6}))
    with pytest.raises(UserError, match=r"does not fit its config: .*_pos_embed_learned is \(1, 21, 24\) in the file"):
        convert(tmp_path / "x.pth", tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"encoder_embed_dim": 24}))
    with pytest.raises(UserError, match="does not describe a MAR generator: lacks 'encoder_depth'; check config="):
        convert(tmp_path / "x.pth", tmp_path / "config.json")


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


def test_what_is_no_mar_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"does not exist; give a published checkpoint-last\.pth, or its folder"):
        convert(tmp_path)
    torch.save({"model": {"a.weight": torch.zeros(2)}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="holds no model_ema; it has model"):
        convert(tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"is no MAR generator: its names are a\.weight, …"):
        convert(tmp_path / "x.pth", weights="model")
    with (tmp_path / "y.pth").open("wb") as file:
        pickle.dump({"model_ema": Harmful()}, file)
    with pytest.raises(UserError, match="pickled objects, which are never run"):
        convert(tmp_path / "y.pth")
    assert capsys.readouterr().out == ""
