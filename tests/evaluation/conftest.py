"""A tiny tokenizer and a folder of images that every test of the evaluation can use."""

import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
from omegaconf import DictConfig
from PIL import Image
from tiny_models import tiny_titok

from smalti.tokenizers.quantizers.kl import GaussianQuantizer

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))  # for its toy generator


@pytest.fixture(scope="session")
def model_path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_titok().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vae_path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "vae"
    tiny_titok(quantizer=GaussianQuantizer(dim=4)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images_path(tmp_path_factory) -> Path:
    """11 test images of two classes, 40 × 36 pixels, beside 2 for training."""
    folder = tmp_path_factory.mktemp("images")
    draws = np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 11)):
        for number in range(count):
            place = folder / split / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(draws.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            coarse.resize((40, 36), Image.Resampling.BICUBIC).save(place / f"{number}.png")
    return folder


@pytest.fixture
def config():
    """Compose configs/evaluate.yaml under overrides."""

    def compose(*overrides: str) -> DictConfig:
        with hydra.initialize_config_module("smalti.configs", version_base="1.3"):
            return hydra.compose("evaluate", ["data.workers=0", "device=cpu", *overrides])

    return compose
