"""Texts of samples: which caption an epoch sees, how features are padded, what weighs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_images import encoded, picture
from test_tokens import ABOUT, array

from smalti.data.module import DataModule
from smalti.data.shards import write_index, write_shard, write_shards
from smalti.data.text import choose, pad_left
from smalti.data.tokens import npy
from smalti.errors import UserError

TEXT = {"path": "t5", "fingerprint": "e" * 32, "dim": 3, "length": 4}


def images(folder: Path, count: int = 40) -> DataModule:
    """Images of 12 × 10 pixels, each with two captions."""
    rows = (
        {"__key__": f"{n:04d}", "png": encoded(picture(n, 12, 10)), "txt": f" long {n}\n", "short.txt": f"short {n}"}
        for n in range(count)
    )
    write_shards(folder, rows, samples_per_shard=10)
    return DataModule(path=str(folder), image_size=10, batch_size=8, workers=0)


def features(length: int, kind: float) -> np.ndarray:
    return np.full((length, 3), kind, np.float16) + np.arange(length, dtype=np.float16)[:, None]


def tokens(folder: Path, count: int = 40, **members: bytes) -> DataModule:
    """Token shards: sample n has n % 7 features, none for 0, of a long and of a short caption."""
    folder.mkdir()
    entries = []
    for start in range(0, count, 10):
        rows: list[dict[str, Any]] = []
        for n in range(start, min(start + 10, count)):
            row: dict[str, Any] = {"__key__": f"{n:04d}", "npy": npy(array(n)), "txt": f"long {n}"}
            both = {"text.npy": npy(features(n % 7, 100)), "short.text.npy": npy(features(n % 7, 200))}
            rows.append(row | (both if n % 7 else {}) | members)
        entries.append(write_shard(folder / f"tokens-{start // 10:06d}.tar", rows))
    write_index(folder, entries, **ABOUT, text=TEXT)
    return DataModule(path=str(folder), batch_size=8, workers=0)


def test_the_short_caption_stands_in_where_the_draw_is_small_and_the_other_where_one_is_missing() -> None:
    assert [choose("long", "short", draw, 0.3) for draw in (0.0, 0.29, 0.3, 0.9)] == ["short"] * 2 + ["long"] * 2
    assert choose("long", None, 0.0, 0.3) == "long" and choose(None, "short", 0.9, 0.3) == "short"
    assert choose(None, None, 0.0, 0.3) is None


def test_features_stand_behind_zeros_and_what_is_too_much_is_cut_off() -> None:
    padded, mask = pad_left(features(2, 1), 4)
    assert padded[:, 0].tolist() == [0, 0, 1, 2] and mask.tolist() == [False, False, True, True]
    padded, mask = pad_left(features(6, 1), 4)
    assert padded[:, 0].tolist() == [1, 2, 3, 4] and mask.all()


def test_three_captions_in_ten_are_short_anew_in_each_epoch_and_validation_sees_the_long_one(tmp_path: Path) -> None:
    data = images(tmp_path / "images")
    data.read_text(4, 3)
    seen = [
        (key, caption)
        for batch in data.train_loader(0, total=400)
        for key, caption in zip(batch["key"], batch["caption"], strict=True)
    ]
    assert all(caption in (f"long {int(key)}", f"short {int(key)}") for key, caption in seen)
    short = [caption.startswith("short") for _, caption in seen]
    # Binomial: six standard deviations of 3,200 draws at 0.3.
    assert abs(np.mean(short) - 0.3) < 6 * (0.21 / len(short)) ** 0.5
    first = int(seen[0][0])
    assert {caption for key, caption in seen if int(key) == first} == {f"long {first}", f"short {first}"}
    again = [caption for batch in data.train_loader(7, total=400) for caption in batch["caption"]]
    assert again == [caption for _, caption in seen[7 * 8 :]]
    assert all(caption.startswith("long") for batch in data.validation_loader() for caption in batch["caption"])


def test_token_shards_give_the_features_of_the_captions_that_images_give(tmp_path: Path) -> None:
    captions, coded = images(tmp_path / "images"), tokens(tmp_path / "tokens")
    for data in (captions, coded):
        data.read_text(4, 3)
    for loader in ("train_loader", "validation_loader"):
        for one, two in zip(getattr(captions, loader)(), getattr(coded, loader)(), strict=True):
            assert one["key"] == two["key"] and one["weight"].tolist() == [1.0] * len(one["key"])
            assert two["features"].shape == (len(two["key"]), 4, 3) and two["features"].dtype == torch.float16
            for row, key in enumerate(two["key"]):
                count = int(key) % 7
                assert two["weight"][row] == (count > 0)
                if not count:
                    assert two["mask"][row].all() and not two["features"][row].any()
                    continue
                first = 100 if one["caption"][row].startswith("long") else 200
                mask = two["mask"][row]
                assert mask.tolist() == [n >= 4 - count for n in range(4)]
                assert two["features"][row][mask, 0].tolist() == [first + n for n in range(min(count, 4))]


def test_batches_have_no_texts_before_they_are_asked_for(tmp_path: Path) -> None:
    assert "features" not in next(iter(tokens(tmp_path / "tokens").train_loader()))
    batch = next(iter(images(tmp_path / "images").train_loader()))
    assert "weight" not in batch and batch["caption"][0].startswith(" long")


def test_images_smaller_than_their_crop_and_samples_without_a_text_weigh_nothing(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"__key__": "large", "png": encoded(picture(0, 10, 30)), "txt": "a"},
        {"__key__": "small", "png": encoded(picture(1, 9, 30)), "txt": "a"},
        {"__key__": "silent", "png": encoded(picture(2, 10, 30))},
        {"__key__": "blank", "png": encoded(picture(3, 10, 30)), "txt": " \n"},
    ]
    write_shards(tmp_path / "train", rows)
    write_shards(tmp_path / "val", rows[:1])
    data = DataModule(path=str(tmp_path), image_size=10, batch_size=4, workers=0)
    data.read_text(4, 3)
    batch = next(iter(data.train_loader()))
    assert {key: weight for key, weight in zip(batch["key"], batch["weight"].tolist(), strict=True)} == {
        "large": 1.0, "small": 0.0, "silent": 0.0, "blank": 0.0,
    }  # fmt: skip
    assert data.test_captions() == ["a"]


def test_features_of_another_width_than_the_index_says_are_refused(tmp_path: Path) -> None:
    data = tokens(tmp_path / "tokens", **{"text.npy": npy(np.zeros((2, 5), np.float16))})
    with pytest.raises(UserError, match=r"its text features are float16 \(2, 5\), but index\.json says \(…, 3\)"):
        data.read_text(4, 3)


def test_texts_that_are_not_there_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "silent", ({"__key__": f"{n}", "png": encoded(picture(n))} for n in range(9)))
    with pytest.raises(UserError, match=r"the training images of .*silent have no captions; give shards with KEY\.txt"):
        DataModule(path=str(tmp_path / "silent"), image_size=10, batch_size=4, workers=0).read_text(4, 3)
    file = tmp_path / "folder" / "a.png"
    file.parent.mkdir()
    for name in "abc":
        (file.parent / f"{name}.png").write_bytes(encoded(picture(1)))
    with pytest.raises(UserError, match="have no captions"):
        DataModule(path=str(file.parent), image_size=10, batch_size=1, workers=0).read_text(4, 3)


def test_an_index_may_name_no_text_encoder(tmp_path: Path) -> None:
    data = tokens(tmp_path / "tokens")
    assert data.tokens is not None and data.tokens["text"] == TEXT
    index = json.loads((tmp_path / "tokens" / "index.json").read_text())
    assert index["text"]["fingerprint"] == "e" * 32
