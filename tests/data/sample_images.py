"""Small images for the tests of the data part."""

import io

import numpy as np
from PIL import Image


def picture(number: int, height: int = 20, width: int = 24) -> np.ndarray:
    """(h, w, 3) uint8, another for each number; its top left pixel is the number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3)).astype(np.uint8)
    pixels[0, 0] = number
    return pixels


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def samples(count: int, start: int = 0):
    for number in range(start, start + count):
        png = encoded(picture(number))
        yield {"__key__": f"{number:04d}", "png": png, "cls": number % 3, "txt": f"picture {number}"}
