"""Pictures of an exported generator: the same from (seed, number), however they are asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import SIDE, Cosines, tiny_titok
from toy_generator import ToyGenerator

from smalti import generation
from smalti.config import compose
from smalti.errors import UserError
from smalti.generation import load_sampler
from smalti.generators.gpt import GPT
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.spec import Tokens


def export(folder: Path, tokenizer: Tokenizer, **arguments: object) -> Path:
    """A tokenizer and a generator of its tokens, of random weights that tell classes apart."""
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(2)
    toy = ToyGenerator(tokens=tokenizer.spec.to_dict(), **{"num_classes": 3, **arguments})  # type: ignore[arg-type]
    torch.nn.init.normal_(toy.head.weight, std=2.0)
    origin = {"path": str(folder / "tokenizer"), "fingerprint": tokenizer.fingerprint()}
    toy.save_pretrained(folder / "generator", metadata={"tokenizer": origin})
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("models"), tiny_titok())


def generate(models: Path, output: Path, *more: str) -> Path:
    words = [f"model_path={models / 'generator'}", f"output={output}", "batch_size=5", *more]
    return generation.generate(compose("generate", words).config)


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])


def test_an_npz_has_the_pictures_of_the_folder_and_their_labels(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "PART", 8)
    generate(models, tmp_path / "folder", "num=21")
    generate(models, tmp_path / "adm.npz", "num=21", "batch_size=3")
    with np.load(tmp_path / "adm.npz") as saved:
        assert saved["arr_0"].dtype == np.uint8 and saved["arr_0"].shape == (21, SIDE, SIDE, 3)
        assert np.array_equal(saved["arr_0"], pictures(tmp_path / "folder"))
        assert saved["arr_1"].tolist() == [n % 3 for n in range(21)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adm.json", "adm.npz", "folder"]
    about = json.loads((tmp_path / "adm.json").read_text())
    assert about["num"] == 21 and about["seed"] == 0 and about["sampling"] == {"temperature": 1.0}


def test_a_picture_depends_on_seed_and_number_alone(tmp_path: Path, models: Path) -> None:
    generate(models, tmp_path / "ten", "num=10", "labels=[1]")
    generate(models, tmp_path / "four", "num=4", "labels=1", "batch_size=1")
    assert np.array_equal(pictures(tmp_path / "ten")[:4], pictures(tmp_path / "four"))
    generate(models, tmp_path / "other", "num=4", "labels=[1]", "seed=1")
    assert not np.array_equal(pictures(tmp_path / "four"), pictures(tmp_path / "other"))
    assert len({picture.tobytes() for picture in pictures(tmp_path / "ten")}) == 10


def test_pictures_are_what_the_generators_tokens_decode_to(tmp_path: Path, models: Path) -> None:
    config = compose("generate", [f"model_path={models / 'generator'}", "labels=[2,0]"]).config
    sampler = load_sampler(config, torch.device("cpu"))
    tokens = sampler.tokens(range(4))
    assert isinstance(tokens, Tokens) and tokens.indices.shape == (4, 16)
    generate(models, tmp_path / "folder", "num=4", "labels=[2,0]")
    images = sampler.tokenizer.decode(tokens)
    expected = (images * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.abs(pictures(tmp_path / "folder").astype(int) - expected).max() <= 1


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    @contextmanager
    def processes(device: str) -> Iterator[tuple[int, int, torch.device]]:
        yield rank, world_size, torch.device("cpu")

    monkeypatch.setattr(generation, "processes", processes)
    monkeypatch.setattr(generation, "_wait", lambda world_size: None)


def test_processes_share_the_parts_and_finished_ones_are_kept(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generation, "PART", 4)
    generate(models, tmp_path / "one.npz", "num=14")
    as_rank(monkeypatch, 1, 2)
    parts = tmp_path / "two.npz.parts"
    parts.mkdir()
    shutil.copy(tmp_path / "one.json", parts / "samples.json")
    generate(models, tmp_path / "two.npz", "num=14")
    assert sorted(path.name for path in parts.glob("*.npy")) == ["000000004.npy", "000000012.npy"]
    as_rank(monkeypatch, 0, 1)
    capsys.readouterr()
    generate(models, tmp_path / "two.npz", "num=14")
    assert "8 of 8 pictures" in capsys.readouterr().err
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes() and not parts.exists()


def test_a_folder_is_finished_and_one_of_other_settings_refused(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    generate(models, folder, "num=6")
    before = pictures(folder)
    (folder / "000003.png").unlink()
    generate(models, folder, "num=6")
    assert np.array_equal(pictures(folder), before)
    with pytest.raises(UserError, match=r"was made with seed=0, now it is 1; name a new one"):
        generate(models, folder, "num=6", "seed=1")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds something else than pictures of generate\.py"):
        generate(models, tmp_path / "mine")
    generate(models, tmp_path / "a.npz", "num=2")
    with pytest.raises(UserError, match=r"a\.npz was made with num=2, now it is 3"):
        generate(models, tmp_path / "a.npz", "num=3")


def test_a_picture_of_all_replaces_one_of_ours_only(tmp_path: Path, models: Path) -> None:
    generate(models, tmp_path / "a.png", "num=6")
    first = (tmp_path / "a.png").read_bytes()
    generate(models, tmp_path / "a.png", "num=6", "seed=1")
    assert (tmp_path / "a.png").read_bytes() != first
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    with pytest.raises(UserError, match=r"photo\.png exists, and not by generate\.py"):
        generate(models, tmp_path / "photo.png")


def test_pictures_may_have_another_size(tmp_path: Path, models: Path) -> None:
    generate(models, tmp_path / "folder", "num=2", "size=20")
    assert pictures(tmp_path / "folder").shape == (2, 20, 20, 3)


def test_prefixes_decode_and_a_decoder_that_samples_is_set(tmp_path: Path) -> None:
    models = export(tmp_path, Cosines())
    generate(models, tmp_path / "short", "num=3", "length=2")
    generate(models, tmp_path / "whole", "num=3")
    generate(models, tmp_path / "noisy", "num=3", "decoding.noise=0.1")
    made = [pictures(tmp_path / name).astype(int) for name in ("short", "whole", "noisy")]
    assert not np.array_equal(made[0], made[1]) and not np.array_equal(made[1], made[2])
    with pytest.raises(UserError, match=r"length=25: use 1 to 24"):
        generate(models, tmp_path / "long", "length=25")


def test_a_generator_without_classes_takes_no_labels(tmp_path: Path) -> None:
    models = export(tmp_path, tiny_titok(), num_classes=None)
    generate(models, tmp_path / "a.npz", "num=3")
    with np.load(tmp_path / "a.npz") as saved:
        assert list(saved) == ["arr_0"]
    with pytest.raises(UserError, match=r"labels=\[1\], but this generator was trained without classes"):
        generate(models, tmp_path / "b.npz", "labels=[1]")


def test_labels_that_there_are_not_a_length_and_settings_are_refused_before_anything_is_written(
    tmp_path: Path, models: Path
) -> None:
    for word, said in (
        ("labels=[0,3]", r"labels=\[0,3\]: this generator knows the classes 0 to 2; 3 is none of them"),
        ("labels=[-2]", "-2 is none of them"),
        ("length=4", "length=4: this tokenizer decodes all 16 tokens only"),
        ("sampling.temprature=2", r"did you mean 'temperature'\?"),
        ("sampling.temperature=0.0", r"temperature=0\.0 must be above 0"),
        ("decoding.steps=2", "TiTok does not sample; leave decoding out"),
    ):
        with pytest.raises(UserError, match=said):
            generate(models, tmp_path / "out", word)
    assert list(tmp_path.iterdir()) == []


def test_guidance_without_a_null_condition_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tokenizer = tiny_titok()
    gpt = GPT(
        tokens=tokenizer.spec.to_dict(),
        width=8,
        depth=1,
        heads=2,
        num_classes=3,
        label_dropout=0.0,
        sampling={"guidance": 2.0},
    )
    gpt.save_pretrained(tmp_path / "generator")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    its = f"tokenizer_path={tmp_path / 'tokenizer'}"
    with pytest.raises(UserError, match=r"guidance=2\.0: this generator does not know what no condition is; use 1"):
        generate(tmp_path, tmp_path / "out", its)
    assert not (tmp_path / "out").exists()
    generate(tmp_path, tmp_path / "out", its, "num=2", "sampling.guidance=1")


def test_the_tokenizer_is_found_asked_for_and_held_to_its_fingerprint(tmp_path: Path) -> None:
    models = export(tmp_path / "models", tiny_titok())
    moved = tmp_path / "moved"
    (models / "tokenizer").rename(moved)
    with pytest.raises(UserError, match=r"tokenizer_path is required: .*tokenizer, which is not there\); give the"):
        generate(models, tmp_path / "a.png")
    generate(models, tmp_path / "a.png", f"tokenizer_path={moved}")
    other = tiny_titok()
    torch.nn.init.normal_(other.latent_tokens)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"is tokenizer [0-9a-f]{16}, but model_path=.* was trained on tokens of"):
        generate(models, tmp_path / "a.png", f"tokenizer_path={tmp_path / 'other'}")


def test_a_published_generator_which_names_no_tokenizer_takes_one_of_the_same_tokens(tmp_path: Path) -> None:
    tiny_titok().save_pretrained(tmp_path / "tokenizer")
    toy = ToyGenerator(tokens=tiny_titok().spec.to_dict(), num_classes=3)
    toy.save_pretrained(tmp_path / "generator")
    with pytest.raises(UserError, match="tokenizer_path is required"):
        generate(tmp_path, tmp_path / "a.png")
    generate(tmp_path, tmp_path / "a.png", f"tokenizer_path={tmp_path / 'tokenizer'}")
    tiny_titok(num_latent_tokens=8).save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match=r"has 8 tokens of 64 codes, but model_path=.* writes 16 tokens of 64 codes"):
        generate(tmp_path, tmp_path / "a.png", f"tokenizer_path={tmp_path / 'short'}")
