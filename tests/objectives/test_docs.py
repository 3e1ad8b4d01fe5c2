"""docs/objectives.md as it stands: every YAML example builds, every Python example runs."""

from __future__ import annotations

import re
from inspect import signature
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torchvision.models.vgg import make_layers

from smalti.objectives import perceptual
from smalti.objectives.adversarial import LOSSES, Adversarial, LeCam, PatchDiscriminator
from smalti.objectives.base import Objective
from smalti.objectives.codes import ProxyCodeObjective
from smalti.objectives.discriminators import PatchGAN, StyleGANDiscriminator
from smalti.objectives.pixels import PixelObjective

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "objectives.md").read_text()


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("example", examples("yaml"))
def test_every_yaml_example_builds(example, tmp_path, monkeypatch):
    # The pretrained networks are not at hand: their readers give untrained ones for whatever `weights` says.
    monkeypatch.setattr(perceptual, "_vgg16_features", lambda weights: make_layers([4, 4, "M"] + [4, "M"] * 4))
    monkeypatch.setattr(perceptual, "_convnext_small", lambda weights: nn.Flatten())
    monkeypatch.chdir(tmp_path)
    config = OmegaConf.create(example)
    if "teacher_path" in config:
        (tmp_path / config.teacher_path).mkdir(parents=True)
    objective = instantiate(config.objective, _convert_="all")
    assert isinstance(objective, Objective)


@pytest.mark.parametrize("example", examples("python"))
def test_every_python_example_runs(example):
    exec(compile(example, "docs/objectives.md", "exec"), {})


def test_the_page_names_every_option():
    for cls in (perceptual.LPIPS, perceptual.ConvNeXtLogits, perceptual.LPIPSAndConvNeXt):
        assert cls.__name__ in PAGE
    parts = (Adversarial, LeCam, PatchDiscriminator, PatchGAN, StyleGANDiscriminator, perceptual.LPIPS)
    for cls in (*parts, PixelObjective, ProxyCodeObjective):
        missing = [name for name in signature(cls).parameters if name not in PAGE]
        assert not missing, f"{cls.__name__}: {missing}"
    assert all(f"`{name}`" in PAGE for name in LOSSES)
