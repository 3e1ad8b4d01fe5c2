"""One photo of any size through a tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import SIDE

import smalti
from smalti.errors import UserError
from smalti.evaluation.run import evaluate


def photo(path, width: int, height: int):
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    Image.fromarray(ramp.astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize(("width", "height"), [(97, 61), (20, 50), (32, 32)])
def test_a_photo_of_any_size_gives_its_reconstruction_its_tokens_and_their_size(
    config, model_path, tmp_path, capsys, width, height
):
    image = photo(tmp_path / "photo.jpg", width, height)
    report = evaluate(config(f"model_path={model_path}", f"image={image}", f"output={tmp_path / 'out'}"))
    assert report["bits"] == 96
    assert report["bytes"] == 12
    assert "16 tokens of 64 codes = 96 bits = 12 bytes" in capsys.readouterr().out
    for kind in ("original", "reconstruction"):
        assert Image.open(report["files"][kind]).size == (SIDE, SIDE)
    assert Image.open(report["files"]["side-by-side"]).width > 2 * SIDE


def test_the_written_tokens_decode_to_the_written_reconstruction(config, model_path, tmp_path):
    image = photo(tmp_path / "photo.png", 48, 40)
    files = evaluate(config(f"model_path={model_path}", f"image={image}", f"output={tmp_path}"))["files"]
    indices = torch.tensor(json.loads(Path(files["tokens"]).read_text())["indices"])[None]
    tokenizer = smalti.load(model_path)
    decoded = tokenizer.decode(smalti.Tokens.full(tokenizer.quantizer.lookup(indices), indices))
    shown = np.asarray(Image.open(files["reconstruction"])).transpose(2, 0, 1)
    assert np.abs(decoded[0].mul(255).round().numpy() - shown).max() <= 1


def test_continuous_tokens_are_written_as_latents_without_a_size(config, vae_path, tmp_path, capsys):
    image = photo(tmp_path / "photo.png", 48, 40)
    report = evaluate(config(f"model_path={vae_path}", f"image={image}", f"output={tmp_path}"))
    assert report["bits"] is None
    assert np.array(json.loads(Path(report["files"]["tokens"]).read_text())["latents"]).shape == (16, 4)
    assert "16 continuous tokens" in capsys.readouterr().out


def test_a_file_that_is_no_image_is_refused(config, model_path, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"image=.*photo\.jpg cannot be read: not an image"):
        evaluate(config(f"model_path={model_path}", f"image={tmp_path / 'photo.jpg'}", f"output={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()
