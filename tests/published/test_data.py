"""Image transforms of the published loaders (families titok-data, mar-crop)."""

import numpy as np
import pytest
from torch import Tensor

from smalti.data import augment, captions


def tensor(image: np.ndarray) -> np.ndarray:
    """torchvision's ToTensor: (h, w, c) uint8 to (c, h, w) in [0, 1]."""
    return np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32) / 255


def images(case, prefix: str) -> dict[str, np.ndarray]:
    return {name[len(prefix) :]: value.numpy() for name, value in case.inputs.items() if name.startswith(prefix)}


@pytest.mark.family("titok-data")
def test_training_and_evaluation_transforms_are_titoks(case):
    settings = case.config["dataset"]["preprocessing"]
    size = settings["crop_size"]
    for name, image in images(case, "image_").items():
        resized = augment.resize_shorter(image, settings["resize_shorter_edge"])
        if f"resized_size/{name}" in case.outputs:
            case.compare(f"resized_size/{name}", np.array(resized.shape[:2]))
        if f"train/{name}" in case.outputs:
            top, left, flip = case.inputs[f"draw_{name}"].tolist()
            cut = (
                augment.crop(resized, int(top), int(left), size)
                if settings.get("random_crop", True)
                else augment.center_crop(resized, size)
            )
            flipped = flip and settings.get("random_flip", True)
            case.compare(f"train/{name}", tensor(augment.flip(cut) if flipped else cut))
        evaluated = augment.center_crop(augment.resize_shorter(image, size), size)
        case.compare(f"eval/{name}", tensor(evaluated))


@pytest.mark.family("titok-data")
def test_the_resolution_filter_is_tatitoks(case):
    if "height_width" not in case.inputs:
        pytest.skip("this case has no image sizes to filter")
    kept = [captions.keeps_resolution(*size) for size in case.inputs["height_width"].tolist()]
    case.compare("res_ratio_kept", np.array(kept, dtype=np.int64))


@pytest.mark.family("titok-data")
def test_recaptions_are_cleaned_as_published(case):
    given = zip(case.meta.get("recap_in", ()), case.meta.get("recap_draw", ()), strict=True)
    ours = [captions.choose_caption("original", text, draw) for text, draw in given]
    assert ours == list(case.meta.get("recap_out", ()))


@pytest.mark.family("mar-crop")
def test_the_centre_crop_is_adms(case):
    size = case.config["img_size"]
    for name, image in images(case, "image").items():
        cut = augment.adm_crop(image, size)
        published: Tensor = case.outputs[f"image{name}/crop"]
        assert np.array_equal(cut, published.numpy())  # exact with this Pillow, says the case
        case.compare(f"image{name}/tensor", tensor(cut) * 2 - 1)
        case.compare(f"image{name}/tensor_flip", tensor(augment.flip(cut)) * 2 - 1)
