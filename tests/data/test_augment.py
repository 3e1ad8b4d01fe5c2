"""Transforms against torchvision and Pillow, which the published recipes use."""

import numpy as np
import pytest
from PIL import Image
from sample_images import picture
from torchvision.transforms import functional as published

from smalti.data import augment

SIZES = [(61, 83), (90, 50), (40, 40), (25, 30), (201, 64)]


@pytest.mark.parametrize("size", SIZES)
def test_resize_and_centre_crop_are_torchvisions_on_pillow_images(size):
    image = picture(1, *size)
    resized = published.resize(Image.fromarray(image), 32, published.InterpolationMode.BICUBIC, antialias=True)
    assert np.array_equal(augment.resize_shorter(image, 32), np.asarray(resized))
    assert np.array_equal(
        augment.center_crop(augment.resize_shorter(image, 32), 32), np.asarray(published.center_crop(resized, 32))
    )


def test_an_odd_margin_rounds_as_torchvision_does():
    for width in range(8, 16):
        image = picture(2, 9, width)
        assert np.array_equal(
            augment.center_crop(image, 8), np.asarray(published.center_crop(Image.fromarray(image), 8))
        )


def test_a_random_crop_reaches_every_position_equally():
    image = np.stack([*np.meshgrid(np.arange(10), np.arange(7)), np.zeros((7, 10), int)], axis=-1)
    corners = [tuple(augment.random_crop(image, 5, augment.draw(0, 0, n))[0, 0, :2]) for n in range(3000)]
    counts = [corners.count((left, top)) for left in range(6) for top in range(3)]
    assert sum(counts) == 3000
    assert min(counts) > 110  # 167 expected; six standard deviations below is 91


def test_draws_depend_on_seed_epoch_and_sample_alone():
    assert augment.draw(1, 2, 3) == augment.draw(1, 2, 3)
    assert len({augment.draw(*key) for key in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (3, 2, 1)]}) == 5


def test_half_of_the_images_are_flipped():
    flips = np.array([augment.draw(0, epoch, n).flip for epoch in range(20) for n in range(100)])
    assert abs((flips < 0.5).mean() - 0.5) < 0.05


@pytest.mark.parametrize("size", [24, 64, 256])
def test_adms_random_crop_shows_at_least_four_fifths_of_the_shorter_side(size):
    low, high = augment.adm_lengths(size)
    assert low == size and size / (high - 1) >= 0.8 - 0.5 / size
    image = picture(3, 90, 120)
    draws = [augment.draw(0, 0, n) for n in range(2000)]
    lengths = {low + int(one.scale * (high - low)) for one in draws}
    assert lengths >= set(range(low, high)) or high - low > 50
    assert min(lengths) >= low and max(lengths) < high
    assert augment.adm_random_crop(image, size, draws[0]).shape == (size, size, 3)


def test_ten_crops_are_torchvisions():
    image = picture(4, 30, 41)
    theirs = published.ten_crop(Image.fromarray(image), 20)
    for ours, crop in zip(augment.ten_crops(image, 20), theirs, strict=True):
        assert np.array_equal(ours, np.asarray(crop))
