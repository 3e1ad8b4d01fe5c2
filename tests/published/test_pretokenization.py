"""Crops of the published pretokenization of MaskGIT and RAR."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smalti.data import augment


@pytest.mark.family("maskgit-pretokenization")
def test_crops_are_the_published_ones(case: Any) -> None:
    image, size = case.inputs["image"].numpy(), case.config["img_size"]
    centre, larger = augment.adm_crop(image, size), augment.adm_crop(image, int(1.1 * size))
    ten = np.stack(augment.ten_crops(larger, size))
    both = np.stack([centre, augment.flip(centre)])
    for name, crops in {
        "center_crop": centre,
        "center_crop_1p1": larger,
        "ten_crop": ten.transpose(0, 3, 1, 2),
        "center_and_flip": both.transpose(0, 3, 1, 2),
    }.items():
        case.compare(name, np.array(crops))
