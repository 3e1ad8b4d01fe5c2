"""A data set as token shards: the tokens of its crops, whatever the number of processes and of sittings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sample_images import picture, samples
from tiny_models import SIDE, tiny_titok

from smalti import tokenising
from smalti.config import compose
from smalti.data import augment
from smalti.data.decode import decode_member
from smalti.data.module import DataModule
from smalti.data.shards import verify, write_shards
from smalti.data.tokens import TokenSource
from smalti.errors import UserError
from smalti.tokenizers.base import Tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_titok().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 images of 24 × 20 pixels with classes and captions, in three shards."""
    folder = tmp_path_factory.mktemp("images")
    write_shards(folder, samples(25), samples_per_shard=10, classes=["a", "b", "c"])
    return folder


def encode(images: Path, model: Path, output: Path, *more: str) -> None:
    words = [f"data.path={images}", f"model_path={model}", f"output={output}", "data.workers=0", "batch_size=8", *more]
    tokenising.tokenise(compose("encode", words).config)


def tokens_of(folder: Path) -> dict[str, np.ndarray]:
    source = TokenSource(sorted(folder.glob("*.tar")), folder)
    return {source.key(n): decode_member("npy", source.read(n).image) for n in range(len(source))}


def crops(image: np.ndarray, views: str, enlarge: tuple[float, ...] = (1.1,)) -> list[np.ndarray]:
    centre = augment.center_crop(augment.resize_shorter(image, SIDE), SIDE)
    if views == "ten_crop":
        return [c for f in enlarge for c in augment.ten_crops(augment.adm_crop(image, int(f * SIDE)), SIDE)]
    return [centre] if views == "center" else [centre, centre[:, ::-1]]


@pytest.mark.parametrize("views", ["center", "flip", "ten_crop"])
def test_every_image_becomes_the_tokens_of_its_crops(tmp_path: Path, images: Path, model: Path, views: str) -> None:
    encode(images, model, tmp_path / "tokens", f"views={views}")
    tokenizer = Tokenizer.from_pretrained(model)
    found = tokens_of(tmp_path / "tokens")
    assert list(found) == [f"{n:04d}" for n in range(25)]
    for key, array in found.items():
        cut = np.stack(crops(picture(int(key)), views))
        expected = tokenizer.encode(torch.from_numpy(cut).permute(0, 3, 1, 2).float() / 255).indices
        assert array.dtype == np.uint16
        # Sums in another order may change which of two codes is the nearer one.
        assert (array == expected.numpy()).mean() > 0.99
    index = json.loads((tmp_path / "tokens" / "index.json").read_text())
    assert index["views"] == views and index["classes"] == ["a", "b", "c"]
    assert index["tokenizer"]["fingerprint"] == tokenizer.fingerprint()
    assert index["tokenizer"]["spec"] == tokenizer.spec.to_dict() and index["tokenizer"]["path"] == str(model)
    assert verify(tmp_path / "tokens") == 3
    sample = TokenSource(sorted((tmp_path / "tokens").glob("*.tar")), tmp_path).read(7)
    assert sample.label == 1 and sample.caption == "picture 7"


def test_two_ranges_of_ten_crops_are_twenty_views(tmp_path: Path, images: Path, model: Path) -> None:
    encode(images, model, tmp_path / "tokens", "views=ten_crop", "enlarge=[1.1,1.05]")
    assert {array.shape for array in tokens_of(tmp_path / "tokens").values()} == {(20, 16)}
    data = DataModule(path=str(tmp_path / "tokens"), batch_size=4, workers=0)
    assert next(iter(data.train_loader()))["indices"].shape == (4, 16)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    @contextmanager
    def processes(device: str) -> Iterator[tuple[int, int, torch.device]]:
        yield rank, world_size, torch.device("cpu")

    monkeypatch.setattr(tokenising, "processes", processes)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".tar", ".json")}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_what_is_written_does_not_depend_on_the_number_of_processes_or_their_order(
    tmp_path: Path, images: Path, model: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]
) -> None:
    encode(images, model, tmp_path / "one", "views=flip")
    for place, rank in enumerate(order):
        assert not (tmp_path / "three" / "index.json").exists(), place
        as_rank(monkeypatch, rank, 3)
        encode(images, model, tmp_path / "three", "views=flip")
    assert files(tmp_path / "one") == files(tmp_path / "three")
    assert not (tmp_path / "three" / ".parts").exists()


def test_finished_shards_are_kept_and_damaged_ones_written_again(
    tmp_path: Path, images: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(images, model, tmp_path / "whole")
    as_rank(monkeypatch, 0, 2)
    encode(images, model, tmp_path / "tokens")
    as_rank(monkeypatch, 0, 1)
    capsys.readouterr()
    encode(images, model, tmp_path / "tokens")
    assert "15 images are encoded already" in capsys.readouterr().err
    assert files(tmp_path / "tokens") == files(tmp_path / "whole")

    shard = tmp_path / "tokens" / "tokens-000001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    encode(images, model, tmp_path / "tokens")
    assert "15 images are encoded already" in capsys.readouterr().err
    assert files(tmp_path / "tokens") == files(tmp_path / "whole")

    encode(images, model, tmp_path / "tokens")
    assert "25 images are encoded already" in capsys.readouterr().err
    assert files(tmp_path / "tokens") == files(tmp_path / "whole")


def test_a_folder_of_images_is_shuffled_into_shards_and_held_out_images_stay_held_out(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "SAMPLES_PER_SHARD", 12)
    for n in range(30):
        file = tmp_path / "images" / ("cat", "dog")[n % 2] / f"{n:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(n)).save(file)
    encode(tmp_path / "images", model, tmp_path / "tokens")
    found = tokens_of(tmp_path / "tokens")
    assert sorted(found) == sorted(f"{('cat', 'dog')[n % 2]}/{n:02d}" for n in range(30))
    assert list(found) != sorted(found) and len(list((tmp_path / "tokens").glob("*.tar"))) == 3
    both = [
        DataModule(path=str(tmp_path / name), batch_size=4, workers=0, image_size=SIDE) for name in ("images", "tokens")
    ]
    held = [{key for batch in data.validation_loader() for key in batch["key"]} for data in both]
    assert held[0] == held[1]


def test_the_folders_of_splits_are_kept(tmp_path: Path, model: Path) -> None:
    for name, count in (("train", 12), ("validation", 5)):
        write_shards(tmp_path / "images" / name, samples(count), classes=["a", "b", "c"])
    encode(tmp_path / "images", model, tmp_path / "tokens")
    data = DataModule(path=str(tmp_path / "tokens"), batch_size=4, workers=0)
    assert (len(data.train), len(data.validation)) == (12, 5)


def test_another_tokenizer_other_views_and_foreign_shards_are_refused(
    tmp_path: Path, images: Path, model: Path
) -> None:
    encode(images, model, tmp_path / "tokens")
    with pytest.raises(UserError, match=r"has other tokens already \(views=center\); name a new folder"):
        encode(images, model, tmp_path / "tokens", "views=flip")
    other = tiny_titok(num_latent_tokens=8)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"has other tokens already \(tokenizer [0-9a-f]{16}\)"):
        encode(images, tmp_path / "other", tmp_path / "tokens")
    with pytest.raises(UserError, match="has other shards already; name a new folder"):
        encode(images, model, images)


def test_tokens_themselves_are_refused(tmp_path: Path, images: Path, model: Path) -> None:
    encode(images, model, tmp_path / "tokens")
    with pytest.raises(UserError, match="has token shards, but images are needed"):
        encode(tmp_path / "tokens", model, tmp_path / "again")


def test_an_image_that_cannot_be_read_is_named_and_the_rest_goes_on_later(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = list(samples(25))
    good, rows[12] = rows[12]["png"], {**rows[12], "png": b"no image"}
    write_shards(tmp_path / "images", rows, samples_per_shard=10)
    with pytest.raises(UserError, match=r"sample '0012' cannot be decoded"):
        encode(tmp_path / "images", model, tmp_path / "tokens")
    rows[12]["png"] = good
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    write_shards(tmp_path / "images", rows, samples_per_shard=10)
    capsys.readouterr()
    encode(tmp_path / "images", model, tmp_path / "tokens")
    assert "10 images are encoded already" in capsys.readouterr().err
    assert len(tokens_of(tmp_path / "tokens")) == 25
