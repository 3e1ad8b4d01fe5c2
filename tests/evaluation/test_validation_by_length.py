"""Validation while training, for tokenizers that decode prefixes: columns of metrics.csv and a strip."""

import csv
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import SIDE, Cosines, tiny_titok

from smalti.config import compose
from smalti.errors import UserError
from smalti.evaluation.lengths import decode_prefixes
from smalti.evaluation.metrics import psnr
from smalti.train import train_once
from smalti.training.callbacks.progress import _numbers
from smalti.training.callbacks.validation import Validation
from smalti.training.draws import seed_of
from smalti.training.tokenizer_run import validated_lengths


def images(count: int) -> torch.Tensor:
    coarse = torch.randint(0, 256, (count, 3, 5, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return torch.nn.functional.interpolate(coarse.float(), SIDE, mode="bilinear").to(torch.uint8)


def trainer(rank: int = 0, world_size: int = 1) -> Any:
    plugin = SimpleNamespace(forward_context=nullcontext)
    return SimpleNamespace(precision_plugin=plugin, global_rank=rank, world_size=world_size)


def measured(batches: list[torch.Tensor], process: Any, **more: Any) -> dict[str, float]:
    tokenizer = Cosines()
    tokenizer.sampling.noise = 0.1
    module: Any = SimpleNamespace(averaged=tokenizer, device=torch.device("cpu"), seed=42)
    validation = Validation(lambda: [{"image": batch} for batch in batches], every=1, **more)
    return validation.measure(process, module)


def test_it_is_the_psnr_of_the_first_images_at_each_length_from_one_noise():
    pixels = images(7)
    figures = measured([pixels[:4], pixels[4:]], trainer(), lengths=[1, 4, 24], length_images=6)
    assert figures["images"] == 7
    assert list(figures)[-3:] == ["psnr@1", "psnr@4", "psnr@24"]
    tokenizer = Cosines()
    tokenizer.sampling.noise = 0.1
    expected: dict[int, list[float]] = {1: [], 4: [], 24: []}
    for number, batch in enumerate([pixels[:4], pixels[4:6]]):
        originals = batch.float() / 255
        seed = seed_of("evaluate", 42, number)
        for k, decoded in decode_prefixes(tokenizer, tokenizer.encode(originals), [1, 4, 24], seed=seed):
            expected[k] += psnr(originals, decoded).tolist()
    for k, values in expected.items():
        assert figures[f"psnr@{k}"] == pytest.approx(sum(values) / 6)


def test_processes_share_the_first_images(monkeypatch):
    pixels, seen = images(7), []
    monkeypatch.setattr(
        "smalti.training.callbacks.validation.psnr", lambda a, b: (seen.append(len(a)), torch.zeros(len(a)))[1]
    )
    for rank in range(2):  # rank r has images r, r + 2, …; of the first 5 they have 3 and 2
        measured([pixels[rank::2]], trainer(rank, 2), lengths=[1, 2], length_images=5)
    assert seen == [3, 3, 2, 2]


def test_a_run_shows_psnr_by_length_and_a_strip(tmp_path):
    """Through the command, with a TiTok that has a regularizer: the same columns at every validation."""
    tower = [
        f"tokenizer.{part}.{key}={value}"
        for part in ("encoder", "decoder")
        for key, value in {"width": 16, "depth": 1, "heads": 2}.items()
    ]
    settings = ["tokenizer/regularizer=tail_drop", "tokenizer.num_latent_tokens=6", *tower, "data.size=24"]
    settings += ["data.batch_size=4", "data.workers=0", f"data.cache={tmp_path}/cache", f"run={tmp_path}/run"]
    settings += ["validation.images=4", "validation.every=1", "trainer.max_steps=2"]
    figures = train_once(settings)[1]
    columns = [f"validation/psnr@{k}" for k in (1, 2, 4, 6)]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [[row[name] != "" for name in columns] for row in rows] == [[True] * 4] * 2
    assert set(columns) <= figures.keys()
    assert figures["validation/psnr@6"] == pytest.approx(figures["validation/psnr"], abs=1e-6)
    strips = sorted((tmp_path / "run" / "images").glob("strip-*.png"))
    assert [path.name for path in strips] == ["strip-000000001.png", "strip-000000002.png"]
    assert Image.open(strips[0]).width > 5 * 128


def test_lengths_of_a_run_are_automatic_none_or_those_asked_for():
    spec = Cosines().spec
    assert validated_lengths("auto", spec) == [1, 2, 4, 8, 16, 24]
    assert validated_lengths("auto", tiny_titok().spec) == []
    assert validated_lengths(None, spec) == []
    assert validated_lengths([3, 1], spec) == [1, 3]
    with pytest.raises(UserError, match=r"validation\.lengths=\[1\], but this tokenizer decodes all of its 16 tokens"):
        validated_lengths([1], tiny_titok().spec)
    with pytest.raises(UserError, match="lengths=all is unknown; use auto, or a list"):
        validated_lengths("all", spec)


@pytest.mark.parametrize("override", ["validation.lengths=[1,4]", "validation.lengths=null", "validation.lengths=4"])
def test_a_command_line_may_choose_them(override):
    assert compose("train", [override]).changes


def test_the_progress_line_shows_them_in_one():
    row = {"loss": 0.5, "validation/psnr": 20.0, "validation/psnr@1": 14.234, "validation/psnr@2": 16.0}
    assert _numbers(row) == "loss 0.5  psnr 20  psnr@1/2 14.2/16.0"
