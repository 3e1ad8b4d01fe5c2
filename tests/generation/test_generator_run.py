"""`train.py` for generators: on images and on tokens alike; what is filled in; what is refused before it starts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from sample_images import samples
from tiny_models import SIDE, tiny_titok

import smalti
from smalti import runs, tokenising
from smalti.config import compose
from smalti.data.shards import write_shards
from smalti.errors import UserError
from smalti.published.export import from_run
from smalti.tokenizers.quantizers.kl import GaussianQuantizer
from smalti.train import train_once
from smalti.training import run as run_module

TINY = [
    "experiment=gpt", "generator.width=16", "generator.depth=1", "generator.heads=2", "generator.sampling.guidance=1.0",
    "data.batch_size=4", "data.workers=0", "validation.images=4", "validation.every=3", "trainer.max_steps=3",
    "optimizer.warmup_steps=0", "optimizer.lr=1e-2", "logger.every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, 30 images of three classes as shards, and their tokens: centre crops, mirrored or not."""
    folder = tmp_path_factory.mktemp("place")
    tiny_titok().save_pretrained(folder / "tokenizer")
    write_shards(folder / "images", samples(30), samples_per_shard=10, classes=["a", "b", "c"])
    words = [f"data.path={folder}/images", f"model_path={folder}/tokenizer", f"output={folder}/tokens", "views=flip"]
    tokenising.tokenise(compose("encode", [*words, "data.workers=0"]).config)
    return folder


def train(place: Path, run: Path, *more: str) -> Path:
    """A run on `place`; the path of its folder."""
    given = [word if "PLACE" not in word else word.replace("PLACE", str(place)) for word in more]
    folder, _ = train_once([*TINY, f"run={run}", *given])
    return Path(folder)


def losses(run: Path) -> list[tuple[float, str]]:
    with (run / "metrics.csv").open() as file:
        return [(float(row["loss"]), row["validation/loss"]) for row in csv.DictReader(file)]


def test_images_with_the_tokenizer_in_the_loop_and_their_tokens_give_the_same_losses(
    tmp_path: Path, place: Path
) -> None:
    on_images = train(place, tmp_path / "images", "data.path=PLACE/images", "tokenizer_path=PLACE/tokenizer",
                      "data.crop=center")  # fmt: skip
    on_tokens = train(place, tmp_path / "tokens", "data.path=PLACE/tokens")
    with_both = train(place, tmp_path / "both", "data.path=PLACE/tokens", "tokenizer_path=PLACE/tokenizer")
    assert losses(on_images) == losses(on_tokens) == losses(with_both)
    assert (on_images / "images" / "step-000000003.png").is_file()
    assert not (on_tokens / "images").exists(), "there is nothing to decode samples with"
    assert (with_both / "images" / "step-000000003.png").is_file()


def test_an_export_says_which_tokenizer_it_is_for_and_has_the_datas_classes(tmp_path: Path, place: Path) -> None:
    run = train(place, tmp_path / "run", "data.path=PLACE/tokens")
    tokenizer = smalti.load(place / "tokenizer")
    exported = smalti.load(run / "export")
    origin = {"path": str(place / "tokenizer"), "fingerprint": tokenizer.fingerprint()}
    assert exported.metadata["tokenizer"] == origin
    assert exported.num_classes == 3 and exported.spec == tokenizer.spec
    again = from_run(run)
    assert again.fingerprint() == exported.fingerprint() and again.metadata["tokenizer"] == origin


@pytest.mark.parametrize(("given", "found"), [("null", 3), ("7", 7), ("0", None)])
def test_the_number_of_classes_is_the_datas_or_the_given_one_or_none(
    tmp_path: Path, place: Path, given: str, found: int | None
) -> None:
    run = train(
        place, tmp_path / "run", "data.path=PLACE/tokens", f"generator.num_classes={given}", "trainer.max_steps=1"
    )
    assert smalti.load(run / "export").num_classes == found


def test_without_names_of_classes_the_labels_are_counted(tmp_path: Path, place: Path) -> None:
    write_shards(tmp_path / "unnamed", samples(12))
    words = [f"data.path={tmp_path}/unnamed", "tokenizer_path=PLACE/tokenizer"]
    run = train(place, tmp_path / "run", *words, "trainer.max_steps=1")
    assert smalti.load(run / "export").num_classes == 3
    with pytest.raises(UserError, match=r"generator\.num_classes=2, but .*unnamed has labels up to 2; use 3, or null"):
        train(place, tmp_path / "few", *words, "generator.num_classes=2")


def test_a_run_starts_from_the_weights_of_another(tmp_path: Path, place: Path) -> None:
    first = train(place, tmp_path / "first", "data.path=PLACE/tokens")
    second = train(place, tmp_path / "second", "data.path=PLACE/tokens", f"init_path={first}/export",
                   "trainer.max_steps=1", "optimizer.lr=1e-12")  # fmt: skip
    one, two = (smalti.load(run / "export").state_dict() for run in (first, second))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-9, rtol=0)
    with pytest.raises(UserError, match=r"holds a GPT: blocks\.0\..* is .* there and .* here; give a generator of the"):
        train(place, tmp_path / "third", "data.path=PLACE/tokens", f"init_path={first}/export", "generator.width=32")


def test_a_run_goes_on_without_its_tokenizer_but_not_with_another(tmp_path: Path, place: Path) -> None:
    train(place, tmp_path / "run", "data.path=PLACE/tokens", "trainer.max_steps=2")
    run = train(place, tmp_path / "run", "data.path=PLACE/tokens", "trainer.max_steps=3")
    assert json.loads((run / "finished.json").read_text())["step"] == 3


REFUSED = [
    ([], "tokenizer_path is required: an export of experiment="),
    (["data.path=PLACE/tokens", "tokenizer_path=OTHER"], r"has tokens of tokenizer [0-9a-f]{16}, but tokenizer_path="),
    (["data.path=PLACE/tokens", "generator.num_classes=2"], "has labels up to 2; use 3, or null"),
    (["data.path=PLACE/images", "tokenizer_path=PLACE/tokenizer", "data.image_size=64"], f"takes images of {SIDE}; le"),
    (["data.path=PLACE/images", "tokenizer_path=CONTINUOUS"], "GPT cannot model 16 continuous tokens of 4 channels: "),
    (["data.path=PLACE/tokens", "data.flip=false"], r"data\.flip=false has no effect: data\.path=.* has tokens"),
    (["data.path=PLACE/tokens", "data.batch_size=400"], r"data\.batch_size=400 is larger than the"),
    (["data.path=PLACE/tokens", "tokenizer=titok"], "tokenizer is given, but this run trains a generator"),
    (["data.path=PLACE/tokens", "generator.heads=3"], r"generator\.width=16 is not a multiple of generator\.heads=3"),
    (["data.path=PLACE/tokens", "generator.widht=8"], r"did you mean 'generator\.width'\?"),
    (["data.path=PLACE/tokens", "tokenizer.image_size=8"], "the tokenizer is the one of tokenizer_path, as it is"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[" ".join(words) or "nothing" for words, _ in REFUSED])
def test_what_cannot_work_is_refused_before_a_run_folder_is_made(
    tmp_path: Path, place: Path, words: list[str], said: str
) -> None:
    torch.manual_seed(3)
    tiny_titok(num_latent_tokens=8).save_pretrained(tmp_path / "other")
    tiny_titok(quantizer=GaussianQuantizer(dim=4)).save_pretrained(tmp_path / "continuous")
    for name in ("other", "continuous"):
        words = [word.replace(name.upper(), str(tmp_path / name)) for word in words]
    scale = [] if words else ["scale=paper"]
    with pytest.raises(UserError, match=said):
        train(place, tmp_path / "run", *words, *scale)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_is_not_trained_on_tokens_nor_from_a_tokenizer_path(tmp_path: Path, place: Path) -> None:
    with pytest.raises(UserError, match="has token shards, but images are needed"):
        train_once([f"run={tmp_path}/run", f"data.path={place}/tokens", "data.batch_size=4"])
    with pytest.raises(UserError, match="is for generators, but this run trains a tokenizer"):
        train_once([f"run={tmp_path}/run", f"tokenizer_path={place}/tokenizer"])


def test_what_a_generator_cannot_model_is_said_before_its_tokenizer_is_trained(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*TINY, f"data.path={place}/images", f"output={tmp_path}/runs", "generator.num_classes=2"]
    with pytest.raises(UserError, match=r"generator\.num_classes=2, but .* has labels up to 2"):
        train_once(words)
    assert list(tmp_path.iterdir()) == []


def test_at_the_tiny_scale_the_missing_tokenizer_is_trained_first_and_named(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def first(config: DictConfig) -> dict[str, float]:
        """In place of the tokenizer's training: its export, made beforehand."""
        if config.generator is not None:
            return run_module_train(config)
        started.append(config.experiment)
        runs.create(config)
        tiny_titok().save_pretrained(Path(config.run) / "export")
        return {}

    run_module_train = run_module.train
    monkeypatch.setattr(run_module, "train", first)
    requires = compose("train", TINY).config.requires.tokenizer_path.experiment
    folder, _ = train_once([*TINY, f"data.path={place}/images", f"output={tmp_path}/runs", "trainer.max_steps=1"])
    assert started == [requires]
    said = capsys.readouterr().out
    assert f"tokenizer_path is not given: experiment={requires} is trained first" in said
    origin = smalti.load(Path(folder) / "export").metadata["tokenizer"]
    assert origin["path"].startswith(str(tmp_path / "runs" / requires))
