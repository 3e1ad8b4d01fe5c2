"""LlamaGen's crops, text samples and written samples (family llamagen-data)."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.data import augment
from smalti.data.text import choose, is_large, padded, weights
from smalti.evaluation.adm import sample_to_uint8
from smalti.generators.gpt import causal_mask

SHORT = 0.3  # data.short_captions of experiment=gpt_t2i


def images(case: Any) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in case.inputs.items() if name.startswith("image")}


def signed(image: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 as the published loaders normalise it: (3, h, w) in [−1, 1]."""
    return image.transpose(2, 0, 1).astype(np.float32) / 255 * 2 - 1


def equal(case: Any, name: str, ours: Any) -> None:
    assert np.array_equal(np.asarray(ours), case.outputs[name].numpy()), f"{case} {name}"


@pytest.mark.family("llamagen-data", kind="center")
def test_centre_crops_are_exact(case: Any) -> None:
    for name, image in images(case).items():
        for size in case.config["sizes"]:
            equal(case, f"{name}/center{size}", augment.adm_crop(image, size))


@pytest.mark.family("llamagen-data", kind="random")
def test_random_crops_and_the_ranges_of_their_draws_are_exact(case: Any) -> None:
    size = case.config["image_size"]
    for name, image in images(case).items():
        length, top, left = case.inputs[f"draws/{name}"].tolist()
        resized = augment.adm_resize(image, length)
        equal(case, f"{name}/crop", augment.crop(resized, top, left, size))
        equal(case, f"{name}/range_size", augment.adm_lengths(size))
        h, w = resized.shape[:2]
        for axis, side in (("y", h), ("x", w)):
            equal(case, f"{name}/range_{axis}", (0, side - size + 1))
        low, high = augment.adm_lengths(size)  # our uniform numbers reach these integers, each for an equal share
        draws = augment.AugmentDraws(
            top=(top + 0.5) / (h - size + 1), left=(left + 0.5) / (w - size + 1), flip=0.9,
            scale=(length - low + 0.5) / (high - low),
        )  # fmt: skip
        equal(case, f"{name}/crop", augment.adm_random_crop(image, size, draws))


@pytest.mark.family("llamagen-data", kind="ten")
def test_ten_crops_and_the_mirrored_pair_are_the_published_ones(case: Any) -> None:
    size = case.config["image_size"]
    for name, image in images(case).items():
        larger = augment.adm_crop(image, int(size * case.config["crop_range"]))
        case.compare(f"{name}/ten_crop", np.stack([signed(cut) for cut in augment.ten_crops(larger, size)]))
        cut = augment.adm_crop(image, size)
        case.compare(f"{name}/flip_pair", np.stack([signed(cut), signed(augment.flip(cut))]))


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.mark.family("llamagen-data", kind="t2i")
def test_text_samples_are_padded_masked_and_weighed_as_published(case: Any) -> None:
    config, size = case.config, case.config["image_size"]
    tokens = (size // config["downsample_size"]) ** 2
    length = config["t5_feature_max_len"]
    for i in range(config["n"]):
        image, draw = case.inputs[f"image{i}"].numpy(), case.inputs["uniforms"][i].item()
        long, short = (
            None if (given := case.inputs.get(f"{kind}{i}")) is None else given[0].numpy()
            for kind in ("feature", "short")
        )
        chosen = choose(long, short, draw, SHORT) if is_large(png(image), size) else None
        if (short if draw < SHORT else long) is None:
            chosen = None  # the published code takes no other caption where the drawn one is missing
        sample = padded([chosen], length, config["t5_feature_dim"])
        case.compare(f"{i}/valid", weights([chosen])[0])
        case.compare(f"{i}/caption", sample["features"])
        case.compare(f"{i}/mask", causal_mask(sample["mask"], 0, length + tokens)[:, 0])
        if chosen is not None:
            case.compare(f"{i}/image", signed(augment.adm_crop(image, size)))
        else:  # ours keeps the picture, which weighs nothing; theirs is grey
            assert not case.outputs[f"{i}/image"].any()


@pytest.mark.family("llamagen-data", kind="to_uint8")
def test_samples_become_the_published_uint8(case: Any) -> None:
    images, size = (case.inputs["decoded"] + 1) / 2, case.config["image_size_eval"]
    resized = torch.nn.functional.interpolate(images, size=(size, size), mode="bicubic")
    case.compare("resized", resized * 2 - 1)
    for name, ours in (("uint8", sample_to_uint8(images, size)), ("uint8_no_resize", sample_to_uint8(images))):
        apart = (ours.int() - case.outputs[name].int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() <= 0.001, f"{case} {name}"
