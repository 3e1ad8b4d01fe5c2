"""`train.py experiment=tokenbridge`: on a continuous tokenizer, which is bridged, a bridged one, and token shards."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from sample_images import samples
from tiny_models import SIDE, tiny_titok

import smalti
from smalti import tokenising
from smalti.config import compose
from smalti.data.shards import write_shards
from smalti.errors import UserError
from smalti.evaluation.run import evaluate
from smalti.generation import generate
from smalti.published.export import export
from smalti.tokenizers.patch_vae import PatchVAE
from smalti.tokenizers.tokenbridge import BridgedTokenizer
from smalti.train import train_once

TINY = [
    "experiment=tokenbridge", "generator.width=16", "generator.depth=1", "generator.heads=2", "generator.buffer=2",
    "generator.head_width=16", "generator.head_depth=1", "generator.head_heads=2", "generator.sampling.iterations=4",
    "bridging.bits=3", "bridging.images=16", "data.batch_size=4", "data.workers=0", "validation.images=4",
    "validation.every=2", "trainer.max_steps=2", "optimizer.warmup_steps=0", "logger.every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE, 24 images of three classes as shards, and what both make: latents, a bridged tokenizer, its codes."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    vae = PatchVAE(image_size=SIDE, latent_channels=3, patch_size=8, width=16, depth=1)
    vae.scale.set_variance(0.5)
    vae.save_pretrained(folder / "vae")
    tiny_titok().save_pretrained(folder / "discrete")
    write_shards(folder / "images", samples(24), samples_per_shard=12, classes=["a", "b", "c"])
    data = [f"data.path={folder}/images", "data.workers=0"]
    made = ["bits=3", "images=16", "seed=42", "device=cpu", "batch_size=4"]
    export(compose("export", [f"bridge={folder}/vae", f"output={folder}/bridged", *data, *made]).config)
    for tokenizer in ("vae", "bridged"):
        words = [f"model_path={folder}/{tokenizer}", f"output={folder}/tokens-{tokenizer}", "views=flip", "device=cpu"]
        tokenising.tokenise(compose("encode", [*data, *words]).config)
    return folder


def train(place: Path, run: Path, *more: str) -> Path:
    folder, _ = train_once([*TINY, f"run={run}", *(word.replace("PLACE", str(place)) for word in more)])
    return Path(folder)


def losses(run: Path) -> list[str]:
    with (run / "metrics.csv").open() as file:
        return [row["loss"] for row in csv.DictReader(file)]


IMAGES = ("data.path=PLACE/images", "data.crop=center")


def test_a_continuous_tokenizer_is_bridged_said_so_and_kept(
    tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(place, tmp_path / "run", *IMAGES, "tokenizer_path=PLACE/vae", "trainer.max_steps=1")
    said = capsys.readouterr().out
    assert "gives 16 continuous tokens of 3 channels: bridged to 16 tokens of 3 × 8 codes, kept in " in said
    kept = smalti.load(run / "tokenizer")
    assert isinstance(kept, BridgedTokenizer)
    assert kept.metadata["bridged_from"]["fingerprint"] == smalti.load(place / "vae").fingerprint()
    generator = smalti.load(run / "export")
    origin = {"path": str(run / "tokenizer"), "fingerprint": kept.fingerprint()}
    assert generator.metadata["tokenizer"] == origin and generator.spec == kept.spec

    train(place, tmp_path / "run", *IMAGES, "tokenizer_path=PLACE/vae")  # goes on with the same levels
    assert "bridged to" not in capsys.readouterr().out
    assert smalti.load(run / "tokenizer").fingerprint() == kept.fingerprint()
    assert (run / "images" / "step-000000002.png").is_file()

    words = [f"model_path={run}/export", f"output={tmp_path}/samples.png", "num=4", "device=cpu"]
    assert generate(compose("generate", words).config).is_file()


def test_bridging_before_or_in_the_run_and_on_images_or_shards_of_latents_gives_the_same_losses(
    tmp_path: Path, place: Path
) -> None:
    """A posterior's noise is drawn from (seed, step), whether moments come from images or from shards of float32."""
    before = train(place, tmp_path / "before", *IMAGES, "tokenizer_path=PLACE/bridged", "data.flip=false")
    within = train(
        place, tmp_path / "within", *IMAGES, "tokenizer_path=PLACE/vae", "data.flip=false", "bridging.images=16"
    )
    assert losses(before) == losses(within)
    bridged = smalti.load(place / "bridged")
    assert smalti.load(within / "tokenizer").fingerprint() == bridged.fingerprint()
    on_latents = train(place, tmp_path / "latents", "data.path=PLACE/tokens-vae", "tokenizer_path=PLACE/bridged")
    assert smalti.load(on_latents / "export").spec == bridged.spec
    again = train(place, tmp_path / "again", "data.path=PLACE/tokens-vae", "tokenizer_path=PLACE/vae")
    assert smalti.load(again / "export").spec.levels == bridged.spec.levels


def test_it_learns_from_token_shards_of_codes_alone(tmp_path: Path, place: Path) -> None:
    run = train(place, tmp_path / "run", "data.path=PLACE/tokens-bridged")
    bridged = smalti.load(place / "bridged")
    generator = smalti.load(run / "export")
    assert generator.metadata["tokenizer"] == {"path": str(place / "bridged"), "fingerprint": bridged.fingerprint()}
    assert generator.spec == bridged.spec and not (run / "tokenizer").exists()


def test_its_samples_are_measured(tmp_path: Path, place: Path) -> None:
    run = train(place, tmp_path / "run", "data.path=PLACE/tokens-bridged", "trainer.max_steps=1")
    words = [f"model_path={run}/export", f"data.path={place}/images", f"output={tmp_path}/measured", "samples=6"]
    words += ["data.workers=0", "batch_size=3", "classifier_steps=2", "bounds=3", "device=cpu"]
    report = evaluate(compose("evaluate", words).config)
    assert report["protocol"]["bounds"]["uniform_tokens"] == 3  # codes drawn for every channel


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*IMAGES, "tokenizer_path=PLACE/discrete"), "TokenBridge cannot model 16 tokens of 64 codes: "),
        ((*IMAGES, "tokenizer_path=PLACE/vae", "bridging.bits=10"), "PLACE/vae: bits=10: of 1,024 quantiles the "),
        ((*IMAGES, "tokenizer_path=PLACE/vae", "bridging.order=[0,1]"), "PLACE/vae: order has 2 numbers for dim=3"),
        ((*IMAGES, "tokenizer_path=PLACE/bridged", "generator.sampling.iterations=17"), "=17 for 16 tokens: each "),
        (("data.path=PLACE/tokens-vae",), "tokens-vae has 16 continuous tokens of 3 channels, whose codes only "),
        (("data.path=PLACE/tokens-bridged", "tokenizer_path=PLACE/vae"), "has tokens of tokenizer .*, but tokenizer"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, place: Path, words: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said.replace("PLACE", str(place))) as error:
        train(place, tmp_path / "run", *words)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
