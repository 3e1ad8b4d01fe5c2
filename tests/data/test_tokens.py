"""Token shards as a source of batches: which view of a sample when, the same order as images, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_images import samples

from smalti.data.augment import draw
from smalti.data.module import DataModule
from smalti.data.shards import write_index, write_shard, write_shards
from smalti.data.tokens import chosen_view, holds_tokens, npy
from smalti.errors import UserError
from smalti.tokenizers.spec import TokenSpec

SPEC = TokenSpec("discrete", length=5, dim=2, image_size=8, codebook_size=100)
ABOUT = {"tokenizer": {"fingerprint": "f" * 32, "spec": SPEC.to_dict()}, "views": "flip", "crop": "center"}


def array(number: int, views: int = 2, spec: TokenSpec = SPEC) -> np.ndarray:
    """(views, n) or (views, n, q): row v begins with v and the sample's number."""
    shape = (views, spec.length, *([spec.depth] if spec.depth > 1 else []))
    indices = np.random.default_rng(number).integers(0, spec.codebook_size, shape).astype(np.uint16)
    indices[:, 0] = np.arange(views).reshape(-1, *([1] * (len(shape) - 2)))
    indices[:, 1] = number
    return indices


def write(folder: Path, count: int = 47, size: int = 10, **about: Any) -> Path:
    """Token shards of `count` samples with labels 0 to 2, as images of `sample_images.samples` would become."""
    about = {**ABOUT, **about}
    views = {"center": 1, "flip": 2, "ten_crop": 10}[about["views"]] * len(about.get("enlarge", [1]))
    spec = TokenSpec.from_dict(about["tokenizer"]["spec"])
    folder.mkdir(parents=True)
    entries = []
    for start in range(0, count, size):
        rows = (
            {"__key__": f"{n:04d}", "npy": npy(array(n, views, spec)), "cls": n % 3}
            for n in range(start, min(start + size, count))
        )
        entries.append(write_shard(folder / f"tokens-{start // size:06d}.tar", rows))
    write_index(folder, entries, ["a", "b", "c"], **about)
    return folder


def test_batches_have_indices_and_labels_in_the_order_that_images_of_the_same_shards_have(tmp_path: Path) -> None:
    write_shards(tmp_path / "images", samples(47), samples_per_shard=10, classes=["a", "b", "c"])
    options: dict[str, Any] = {"batch_size": 8, "workers": 0, "seed": 5}
    images = DataModule(path=str(tmp_path / "images"), image_size=8, **options)
    tokens = DataModule(path=str(write(tmp_path / "tokens")), **options)
    for loader in ("train_loader", "validation_loader"):
        for one, two in zip(getattr(images, loader)(), getattr(tokens, loader)(), strict=True):
            assert one["key"] == two["key"] and torch.equal(one["label"], two["label"])
            assert two["indices"].dtype == torch.int64 and two["indices"].shape == (len(two["key"]), 5)
            assert two["indices"][:, 1].tolist() == [int(key) for key in two["key"]]
    assert tokens.classes == ["a", "b", "c"] and tokens.largest_label() == 2
    assert tokens.tokens is not None and tokens.tokens["views"] == "flip" and images.tokens is None


def test_a_loader_goes_on_from_any_batch_with_the_same_views(tmp_path: Path) -> None:
    data = DataModule(path=str(write(tmp_path / "tokens")), batch_size=8, workers=0)
    whole = list(data.train_loader(0, total=20))
    for start in (1, 7, 19):
        for one, two in zip(whole[start:], data.train_loader(start, total=20), strict=True):
            assert torch.equal(one["indices"], two["indices"])


def test_two_ranks_share_the_samples(tmp_path: Path) -> None:
    data = DataModule(path=str(write(tmp_path / "tokens")), batch_size=8, workers=0)
    seen = [
        key
        for rank in (0, 1)
        for batch in data.train_loader(0, total=data.batches_per_epoch(world_size=2), rank=rank, world_size=2)
        for key in batch["key"]
    ]
    assert len(seen) == len(set(seen)) == 8 * data.batches_per_epoch(world_size=2)


@pytest.mark.parametrize(("views", "about", "count"), [("flip", {}, 2), ("ten_crop", {"enlarge": [1.1, 1.05]}, 20)])
def test_every_view_is_drawn_equally_often_and_anew_in_each_epoch(
    tmp_path: Path, views: str, about: dict[str, Any], count: int
) -> None:
    data = DataModule(path=str(write(tmp_path / "tokens", views=views, **about)), batch_size=40, workers=0)
    drawn = torch.cat([batch["indices"][:, 0] for batch in data.train_loader(0, total=400)])
    counts = torch.bincount(drawn, minlength=count)
    expected = len(drawn) / count
    # A chi-square of count − 1 degrees exceeds this with probability 1e-6.
    assert ((counts - expected) ** 2 / expected).sum() < {2: 24, 20: 66}[count]
    views_of_one = {chosen_view(0, epoch, 3, count) for epoch in range(200)}
    assert views_of_one == set(range(count))


def test_the_second_of_two_views_is_seen_where_images_would_be_flipped() -> None:
    for sample in range(50):
        assert chosen_view(1, 2, sample, 2) == int(draw(1, 2, sample).flip < 0.5)


@pytest.mark.parametrize(("views", "centre"), [("center", 0), ("flip", 0), ("ten_crop", 4)])
def test_validation_takes_the_centre_crop(tmp_path: Path, views: str, centre: int) -> None:
    data = DataModule(path=str(write(tmp_path / "tokens", views=views)), batch_size=8, workers=0)
    for batch in data.validation_loader():
        assert set(batch["indices"][:, 0].tolist()) == {centre}


def test_several_codes_a_token_keep_their_axis(tmp_path: Path) -> None:
    deep = TokenSpec("discrete", length=5, dim=2, image_size=8, codebook_size=100, depth=3)
    folder = write(tmp_path / "tokens", tokenizer={"fingerprint": "f", "spec": deep.to_dict()})
    batch = next(iter(DataModule(path=str(folder), batch_size=8, workers=0).train_loader()))
    assert batch["indices"].shape == (8, 5, 3)


def test_training_and_validation_folders_are_found_and_must_be_alike(tmp_path: Path) -> None:
    write(tmp_path / "both" / "train")
    write(tmp_path / "both" / "validation", count=12)
    data = DataModule(path=str(tmp_path / "both"), batch_size=8, workers=0)
    assert (len(data.train), len(data.validation)) == (47, 12)
    assert holds_tokens(str(tmp_path / "both")) and holds_tokens(str(tmp_path / "both" / "train" / "*.tar"))
    other = write(tmp_path / "other", tokenizer={"fingerprint": "e" * 32, "spec": SPEC.to_dict()})
    train = str(tmp_path / "both" / "train")
    with pytest.raises(UserError, match=r"differs from .* in the tokenizer: e{32} against f{32}"):
        DataModule(path=train, val_path=str(other), batch_size=8).check()
    with pytest.raises(UserError, match="in views"):
        DataModule(path=train, val_path=str(write(tmp_path / "ten", views="ten_crop")), batch_size=8).check()
    write_shards(tmp_path / "images", samples(12), classes=["a", "b", "c"])
    assert not holds_tokens(str(tmp_path / "images"))
    with pytest.raises(UserError, match=r"data\.path has token shards and the validation data images"):
        DataModule(path=train, val_path=str(tmp_path / "images"), batch_size=8).check()
    with pytest.raises(UserError, match="token shards beside shards of images"):
        DataModule(path=[f"{train}/*.tar", f"{tmp_path}/images/*.tar"], batch_size=8).check()


def test_an_array_that_is_not_what_the_index_says_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "tokens", count=20, size=20)
    for wrong, said in (
        (array(0)[:1], r"an array of uint16 \(1, 5\), but index.json says \(2, 5\)"),
        (array(0).astype(np.float32), "an array of float32"),
        (array(0) + 90, "the tokenizer has 100 codes"),
    ):
        rows = [{"__key__": f"{n:04d}", "npy": npy(wrong)} for n in range(20)]
        entry = write_shard(folder / "tokens-000000.tar", rows)
        write_index(folder, [entry], ["a"], **ABOUT)
        with pytest.raises(UserError, match=rf"tokens-000000.tar: sample '00\d\d' cannot be decoded: .*{said}"):
            DataModule(path=str(folder), batch_size=8, workers=0).check()


def test_indices_of_large_codebooks_are_read_from_32_bits(tmp_path: Path) -> None:
    spec = TokenSpec("discrete", length=5, dim=2, image_size=8, codebook_size=70_000)
    indices = np.full((2, 5), 69_999, dtype=np.uint32)
    (tmp_path / "tokens").mkdir()
    rows = [{"__key__": f"{n}", "npy": npy(indices)} for n in range(9)]
    entry = write_shard(tmp_path / "tokens" / "tokens-000000.tar", rows)
    about = {**ABOUT, "tokenizer": {"fingerprint": "f", "spec": spec.to_dict()}}
    write_index(tmp_path / "tokens", [entry], None, **about)
    data = DataModule(path=str(tmp_path / "tokens"), batch_size=4, workers=0)
    batch = next(iter(data.train_loader()))
    assert (batch["indices"] == 69_999).all() and batch["label"].tolist() == [-1] * 4
    assert data.largest_label() == -1


def test_an_index_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "tokens")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "views": "nine_crop"}))
    with pytest.raises(UserError, match=r"index.json is damaged, or of a newer smalti"):
        DataModule(path=str(folder), batch_size=8).check()


def test_whoever_needs_images_refuses_tokens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has token shards, but images are needed"):
        DataModule(path=str(write(tmp_path / "tokens")), batch_size=8).need_images()


CONTINUOUS = TokenSpec("continuous", length=5, dim=2, image_size=8)
STATISTICS = {"scale_factor": 0.5, "measured_scale_factor": 0.5, "count": 1, "mean": [0.0, 0.0], "std": [2.0, 2.0]}


def write_latents(folder: Path, kind: str = "moments", dtype: str = "float16", **about: Any) -> Path:
    """Token shards of 20 samples of continuous tokens, two views each: view v is v + the sample's number throughout."""
    folder.mkdir(parents=True)
    width = {"moments": 4, "latents": 2}[kind]
    rows = (
        {"__key__": f"{n:04d}", "npy": npy(np.full((2, 5, width), [[[n]], [[n + 0.5]]], dtype=dtype)), "cls": n % 3}
        for n in range(20)
    )
    entry = write_shard(folder / "tokens-000000.tar", rows)
    tokenizer = {"fingerprint": "f" * 32, "spec": CONTINUOUS.to_dict()}
    latents = {"kind": kind, "dtype": dtype}
    index = {**ABOUT, "tokenizer": tokenizer, "latents": latents, "statistics": STATISTICS, **about}
    write_index(folder, [entry], ["a", "b", "c"], **{name: value for name, value in index.items() if value is not None})
    return folder


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("kind", "width"), [("moments", 4), ("latents", 2)])
def test_continuous_tokens_come_as_floats_of_one_view(tmp_path: Path, kind: str, width: int, dtype: str) -> None:
    data = DataModule(path=str(write_latents(tmp_path / "tokens", kind, dtype)), batch_size=8, workers=0)
    views = set()
    for batch in data.train_loader(0, total=8):
        values = batch[kind]
        assert values.dtype == torch.float32 and values.shape == (8, 5, width)
        for key, value in zip(batch["key"], values, strict=True):
            view = float(value[0, 0]) - int(key)
            assert (value == value[0, 0]).all() and view in (0, 0.5)
            views.add(view)
    assert views == {0, 0.5}
    for batch in data.validation_loader():
        assert batch[kind][:, 0, 0].tolist() == [int(key) for key in batch["key"]]
    assert data.tokens is not None and data.tokens["statistics"]["scale_factor"] == 0.5


@pytest.mark.parametrize(
    ("about", "said"),
    [
        (
            {"statistics": None},
            r"index\.json has no statistics of its latents \(scale_factor\): nobody knows",
        ),
        ({"statistics": {**STATISTICS, "scale_factor": 0.0}}, "has no statistics of its latents"),
        ({"latents": None}, r"index\.json is damaged, or of a newer smalti"),
        ({"latents": {"kind": "moments", "dtype": "float8"}}, "is damaged, or of a newer smalti"),
        (
            {"latents": {"kind": "latents", "dtype": "float16"}},
            r"an array of float16 \(2, 5, 4\), but index\.json",
        ),
    ],
)
def test_continuous_tokens_without_statistics_or_of_another_form_are_refused(
    tmp_path: Path, about: dict[str, Any], said: str
) -> None:
    folder = write_latents(tmp_path / "tokens", **about)
    with pytest.raises(UserError, match=said):
        DataModule(path=str(folder), batch_size=8, workers=0).check()


def test_latents_that_are_not_finite_are_named(tmp_path: Path) -> None:
    folder = write_latents(tmp_path / "tokens")
    rows = [{"__key__": f"{n}", "npy": npy(np.full((2, 5, 4), np.nan, np.float16))} for n in range(20)]
    index = json.loads((folder / "index.json").read_text())
    index["shardlist"] = [write_shard(folder / "tokens-000000.tar", rows)]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"cannot be decoded: moments that are not finite numbers"):
        DataModule(path=str(folder), batch_size=8, workers=0).check()


def test_training_and_validation_latents_are_stored_alike(tmp_path: Path) -> None:
    train, other = (write_latents(tmp_path / dtype, dtype=dtype) for dtype in ("float16", "float32"))
    with pytest.raises(UserError, match=r"differs from .* in latents: .*float32.* against .*float16"):
        DataModule(path=str(train), val_path=str(other), batch_size=8).check()
