"""Pictures: where images stand, and that their pixels are kept."""

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.evaluation import pictures


def test_image_i_of_every_row_stands_in_the_same_column_enlarged_by_whole_pixels():
    rows = [torch.rand(3, 3, 32, 32) for _ in range(2)]
    picture = np.asarray(pictures.grid(rows))
    m, step = pictures.MARGIN, 96 + pictures.GAP
    for r, row in enumerate(rows):
        for i, image in enumerate(row):
            cell = picture[m + r * step :, m + i * step :][:96, :96]
            expected = pictures.to_uint8(image).permute(1, 2, 0).numpy().repeat(3, 0).repeat(3, 1)
            assert np.array_equal(cell, expected)


def test_more_images_than_columns_go_on_in_further_bands():
    one, two = (pictures.grid([torch.rand(n, 3, 96, 96)], columns=4) for n in (4, 5))
    assert one.width == two.width
    assert two.height == one.height + 96 + pictures.BAND_GAP


def test_titles_and_labels_that_are_wider_than_the_images_fit():
    picture = pictures.grid([torch.rand(1, 3, 16, 16)], ["original"], title="a title that is wider than one image")
    assert picture.width > 250


def test_rows_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="rows of one shape"):
        pictures.grid([torch.rand(2, 3, 8, 8), torch.rand(3, 3, 8, 8)])


def test_images_are_rounded_not_cut_off_and_clamped():
    assert pictures.to_uint8(torch.tensor([-1.0, 0.9999, 2.0])).tolist() == [0, 255, 255]


def test_side_by_side_keeps_both_images_and_captions_them():
    picture = pictures.side_by_side([("original", torch.zeros(3, 32, 32)), ("tokens", torch.ones(3, 32, 32))], note="x")
    assert picture.width == 3 * pictures.MARGIN + 2 * 192
    assert picture.getpixel((pictures.MARGIN, pictures.MARGIN)) == (0, 0, 0)


def test_a_png_is_written_in_one_move(tmp_path):
    path = pictures.save_png(Image.new("RGB", (4, 4)), tmp_path / "deep" / "a.png")
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
