"""What a tokenizer must beat."""

import pytest
import torch
from PIL import Image

import smalti.evaluation.baselines as baselines_module
from smalti.evaluation.baselines import (
    Baselines,
    Files,
    codecs,
    compress,
    further_budgets,
    mean_colour,
    why_absent,
)
from smalti.evaluation.metrics import psnr


def smooth(b: int = 2, size: int = 32) -> torch.Tensor:
    """Colour ramps, which any codec stores in little."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    return torch.stack([torch.stack([x, y, (x + y) / 2 * i / b]) for i in range(1, b + 1)])


def test_the_mean_colour_is_each_image_s_own():
    images = torch.rand(3, 3, 8, 8)
    painted = mean_colour(images)
    assert torch.allclose(painted[1, :, 0, 0], images[1].mean((1, 2)))
    assert painted.var((2, 3)).max() == 0


@pytest.mark.parametrize("codec", codecs())
def test_the_best_file_fits_the_budget_and_more_bytes_are_no_worse(codec):
    image = smooth()[1]
    small, large = compress(image, codec, 400), compress(image, codec, 900)
    assert small.size <= 400
    assert large.size <= 900
    assert psnr(image[None], large.image[None]) >= psnr(image[None], small.image[None])
    assert small.psnr == pytest.approx(psnr(image[None], small.image[None]).item())


def test_a_budget_below_every_file_has_none():
    assert compress(smooth()[0], "jpeg", 96) is None  # the tables of a JPEG alone take more


def test_at_few_bytes_a_smaller_image_may_be_the_best_file():
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert compress(noise, "webp", 200).shrink > 1


def test_a_file_is_made_once_whatever_the_number_of_budgets(monkeypatch):
    files, made = Files(smooth()[1], "webp"), []
    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda *a, **k: (made.append(k["quality"]), save(*a, **k)))
    found = [files.best(budget) for budget in (100, 200, 400, 400, 200)]
    assert found[2] is found[3]
    assert len(made) == len(files._data) < 5 * 4 * 7


def test_the_tokenizer_is_compared_on_the_images_that_the_codec_can_store():
    images = torch.cat([smooth(1), torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))])
    least = [next(size for size in range(999) if compress(image, "webp", size)) for image in images]
    budget = min(least)
    fits = least.index(budget)
    baselines = Baselines([1, budget], codecs=["jpeg", "webp"])
    baselines.update(images, torch.tensor([[10.0, 20.0], [30.0, 40.0]]))
    figures = baselines.figures(1)
    assert figures["jpeg_images"] == 0
    assert "jpeg_psnr" not in figures
    assert figures["webp_images"] == 1
    assert figures["webp_bytes"] == budget < max(least)
    assert figures["psnr_on_webp_images"] == (30, 40)[fits]
    assert baselines.figures(0) == {"jpeg_images": 0, "webp_images": 0}
    assert baselines.colour() == pytest.approx(psnr(images, mean_colour(images)).mean().item())


def test_codecs_get_the_first_images_only_the_mean_colour_all():
    images, ours = smooth(4), torch.arange(4.0)[None]
    whole, parts = (Baselines([400], codecs=["webp"], limit=3) for _ in range(2))
    whole.update(images, ours)
    parts.update(images[2:], ours[:, 2:], start=2)
    parts.update(images[:2], ours[:, :2])
    assert whole.compared == parts.compared == 3
    assert whole.sums["images"] == 4
    assert whole.figures(0) == pytest.approx(parts.figures(0))
    assert whole.rate_distortion()["curves"]["tokens"] == [{"bytes": 400, "psnr": 1.0, "images": 3}]


def test_curves_go_on_beyond_the_tokens_budgets():
    baselines = Baselines([4, 8], further=further_budgets(8, 32), codecs=["jpeg"])
    baselines.update(smooth(2), torch.zeros(2, 2))
    jpeg = baselines.rate_distortion()["curves"]["jpeg"]
    assert jpeg[0]["budget"] > 8
    assert jpeg[-1]["budget"] == 1024
    assert all(point["bytes"] <= point["budget"] for point in jpeg)
    assert [point["psnr"] for point in jpeg] == sorted(point["psnr"] for point in jpeg)


def test_tokens_without_a_size_are_compared_with_the_mean_colour_only():
    baselines = Baselines([], codecs=["jpeg"])
    baselines.update(smooth(), torch.zeros(1, 2))
    assert baselines.codecs == []
    assert baselines.compared == 0
    assert baselines.colour() > 0


def test_a_format_that_pillow_has_not_is_left_out_with_the_package_that_adds_it(monkeypatch):
    monkeypatch.setattr(baselines_module, "find_spec", lambda name: None)
    monkeypatch.setattr(Image, "SAVE", {name: save for name, save in Image.SAVE.items() if name not in ("AVIF", "JXL")})
    assert codecs() == ("jpeg", "webp")
    assert why_absent("jxl") == "this Pillow writes no JPEG XL: pip install pillow-jxl-plugin"
