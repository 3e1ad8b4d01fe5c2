"""What a tokenizer must beat."""

import pytest
import torch

from smalti.evaluation.baselines import Baselines, compress, mean_colour
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


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_the_best_file_fits_the_budget_and_more_bytes_are_no_worse(codec):
    image = smooth()[1]
    small, large = compress(image, codec, 400), compress(image, codec, 900)
    assert small.size <= 400
    assert large.size <= 900
    assert psnr(image[None], large.image[None]) >= psnr(image[None], small.image[None])


def test_a_budget_below_every_file_has_none():
    assert compress(smooth()[0], "jpeg", 96) is None  # the tables of a JPEG alone take more


def test_at_few_bytes_a_smaller_image_may_be_the_best_file():
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert compress(noise, "webp", 200).shrink > 1


def test_the_tokenizer_is_compared_on_the_images_that_the_codec_can_store():
    images = torch.cat([smooth(1), torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))])
    budget = compress(images[0], "webp", 60).size
    baselines = Baselines(budget)
    baselines.update(images, images)
    figures = baselines.compute(psnr(images, images).mean().item())
    assert figures["jpeg_images"] == 0
    assert "jpeg_psnr" not in figures
    assert figures["webp_images"] >= 1
    assert figures["webp_bytes"] <= budget
    assert figures["psnr_on_webp_images"] == pytest.approx(58.92, abs=0.01)
    assert figures["gain_over_mean_colour"] == pytest.approx(58.92 - figures["mean_colour_psnr"], abs=0.01)


def test_tokens_without_a_size_are_compared_with_the_mean_colour_only():
    baselines = Baselines(None)
    baselines.update(smooth(), smooth())
    assert baselines.compute(50.0).keys() == {"mean_colour_psnr", "gain_over_mean_colour"}
