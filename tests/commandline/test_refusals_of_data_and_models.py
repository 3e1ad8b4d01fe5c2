"""What only data and built models show: refused by the real commands in one line, before the run folder is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from smalti.config import compose
from smalti.instantiate import instantiate

TITOK = [
    "tokenizer.encoder={width: 16, depth: 1, heads: 2, patch_size: 16}",
    "tokenizer.decoder={width: 16, depth: 1, heads: 2, patch_size: 16}",
    "tokenizer.num_latent_tokens=4",
    "tokenizer.quantizer.codebook_size=16",
]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small exports: a TiTok, a MaskGIT-VQGAN, and damaged copies."""
    made = {}
    for name, overrides in {
        "titok": TITOK,
        "vqgan": ["experiment=maskgit_vqgan", "tokenizer.channels=32", "tokenizer.channel_mult=[1,1]"],
    }.items():
        made[name] = tmp_path_factory.mktemp(name)
        instantiate(compose("train", overrides).config.tokenizer, "tokenizer").save_pretrained(made[name])
    for name in ("cut", "changed", "unknown", "no_json"):
        made[name] = tmp_path_factory.mktemp(name)
        for file in made["titok"].iterdir():
            (made[name] / file.name).write_bytes(file.read_bytes())
    weights = made["cut"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    changed = load_file(made["changed"] / "model.safetensors")
    save_file({key: value + 1 for key, value in changed.items()}, made["changed"] / "model.safetensors")
    config = json.loads((made["titok"] / "config.json").read_text())
    config["model"]["name"] = "titak"
    (made["unknown"] / "config.json").write_text(json.dumps(config))
    (made["no_json"] / "config.json").write_text("{")
    return made


BAD_LINES = [
    ("train data.path={photos}", "data.batch_size=32 is larger than the 3 training images"),
    ("train data.path={one}", "at least two are needed"),
    ("train data.path={broken}", "broken"),
    ("train data.path={photos}/*.tar", "*.tar"),
    ("train +tokenizer.depth=3", "tokenizer.depth is not an argument of smalti.tokenizers.titok.TiTok"),
    ("train tokenizer.head=codes", "proxy_codebook_size"),
    ("train init_path={vqgan}", "init_path={vqgan} holds a MaskGITVQGAN"),
    ("train init_path={cut}", "damaged"),
    ("train init_path={changed}", "fingerprint"),
    ("train init_path={unknown}", "did you mean 'titok'"),
    ("train init_path={no_json}", "damaged"),
    ("train experiment=titok_s128 teacher_path={titok}", "teacher_path={titok} gives 4 tokens of 16 codes"),
    ("train experiment=titok_s128 teacher_path={vqgan}", "but this model predicts 8 × 8 of 256"),
    ("train objective/perceptual=lpips objective.perceptual.weights={missing}", "{missing}"),
    ("evaluate model_path={unknown}", "did you mean 'titok'"),
    ("evaluate model_path={cut}", "damaged"),
    ("evaluate model_path={titok} image={file}", "file.bin"),
    ("export output=out source=titok checkpoint={file}", "file.bin"),
    ("export output=out source=titok checkpoint={foreign}", "neither a TiTok nor a MaskGIT-VQGAN"),
]


@pytest.mark.parametrize(("line", "said"), BAD_LINES, ids=[line for line, _ in BAD_LINES])
def test_the_heavy_part_refuses_in_one_line_and_leaves_nothing(
    line: str, said: str, call: Callable, places: dict[str, Path], exports: dict[str, Path], tmp_path: Path
) -> None:
    from PIL import Image

    for name in ("one", "broken"):
        (tmp_path / name / "cats").mkdir(parents=True)
        for number in range(1 if name == "one" else 40):
            Image.new("RGB", (64, 64)).save(tmp_path / name / "cats" / f"{number}.png")
    for picture in (tmp_path / "broken" / "cats").iterdir():
        picture.write_bytes(picture.read_bytes()[:40])
    import torch

    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    known = {**places, **exports, "foreign": tmp_path / "foreign.safetensors"}
    known |= {name: tmp_path / name for name in ("one", "broken")}
    command, *words = line.format(**known).split()
    if command == "train" and "data.path" not in line:
        words += [f"data.path={places['photos']}", "data.batch_size=2", "trainer.devices=1"]
    result = call(command, *words)
    assert result.code == 2, result
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert said.format(**known) in result.err
    assert result.left == []
