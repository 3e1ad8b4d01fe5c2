"""Every kind of image file becomes (h, w, 3) uint8 RGB, and nothing else is decoded."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image
from sample_images import encoded, picture

from smalti.data import decode
from smalti.data.decode import decodable, decode_image, decode_member

RGB = picture(1, 15, 21)


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def pillow_alone(monkeypatch):
    monkeypatch.setattr(decode, "_exact_jpeg_decoder", lambda: None)


def test_grey_is_repeated():
    assert np.array_equal(decode_image(encoded(RGB[..., 0])), np.repeat(RGB[..., :1], 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_cut_to_the_high_byte(kind):
    wide = np.arange(15 * 21, dtype=np.uint16).reshape(15, 21) * 200
    assert np.array_equal(decode_image(encoded(wide, kind))[..., 1], (wide >> 8).astype(np.uint8))


def test_cmyk_is_converted_as_pillow_does():
    data = saved(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=100)
    assert np.array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_palette_is_looked_up():
    image = Image.fromarray(RGB).quantize(8)
    assert np.array_equal(decode_image(saved(image)), np.asarray(image.convert("RGB")))


def test_transparency_is_laid_on_white():
    image = np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])
    image[:, :10, 3] = 0
    assert (decode_image(encoded(image))[:, :10] == 255).all()
    assert np.array_equal(decode_image(encoded(image))[:, 10:], RGB[:, 10:])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_cameras_rotation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.fromarray(np.repeat(np.repeat(RGB, 8, 0), 8, 1))
    turns = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the operation that undoes what the tag says
    stored = upright if turns[orientation] is None else upright.transpose(Image.Transpose(turns[orientation]))
    data = saved(stored, "JPEG", quality=95, exif=exif)
    assert decode_image(data).shape == np.asarray(upright).shape
    assert np.abs(decode_image(data).astype(int) - np.asarray(upright)).mean() < 12


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"quality": 20}])
def test_jpeg_pixels_do_not_depend_on_the_fast_decoder(options, monkeypatch):
    data = encoded(picture(3, 45, 61), "JPEG", **options)
    fast = decode_image(data)
    monkeypatch.setattr(decode, "_exact_jpeg_decoder", lambda: None)
    assert np.array_equal(fast, decode_image(data))


def test_a_fast_decoder_that_differs_is_not_used(monkeypatch):
    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg", lambda data, colorspace: np.zeros((37, 51, 3), np.uint8))
    assert decode._exact_jpeg_decoder.__wrapped__() is None


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_file_that_is_cut_off_is_refused(kind, part):
    data = encoded(picture(4, 60, 60), kind)
    with pytest.raises(ValueError):
        decode_image(data[: int(len(data) * part)])


def test_damage_is_judged_by_pillow_alone(pillow_alone):
    data = encoded(picture(4, 60, 60), "JPEG")
    with pytest.raises(ValueError, match="truncated"):
        decode_image(data[: len(data) // 2])


def test_pickles_are_never_decoded():
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("a pickle was executed",)

    data = pickle.dumps(Trap())
    for kind in ("pyd", "pkl", "pickle", "pth", "ten", "x.pyd"):
        assert not decodable(kind)
        with pytest.raises(ValueError, match="not decoded"):
            decode_member(kind, data)


def test_arrays_of_numbers_are_decoded_and_arrays_of_objects_are_not():
    file = io.BytesIO()
    np.save(file, np.arange(6, dtype=np.uint16).reshape(2, 3))
    assert np.array_equal(decode_member("npy", file.getvalue()), [[0, 1, 2], [3, 4, 5]])
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}]), allow_pickle=True)
    for data in (file.getvalue(), pickle.dumps({"a": 1})):
        with pytest.raises(ValueError, match=r"[Pp]ickle"):
            decode_member("npy", data)


def test_text_numbers_and_json_are_decoded():
    assert decode_member("txt", "späte Rose".encode()) == "späte Rose"
    assert decode_member("cls", b"7\n") == 7
    assert decode_member("json", b'{"a": [1]}') == {"a": [1]}
    assert np.array_equal(decode_member("masks.png", encoded(RGB[..., 0])), RGB[..., 0])
