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
