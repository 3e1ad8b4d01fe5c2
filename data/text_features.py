"""Samples of LlamaGen's text-to-image recipe: an image and features of its caption, made beforehand.

A caption has the states of a text encoder, (l, c) with l up to the caption's length; a model takes a fixed number of
them. Short captions stand in for long ones in a part of the draws. What cannot be used weighs 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from smalti.data import augment

SHORT = 0.3  # how often the short caption is taken, as published


def choose_features(long: np.ndarray | None, short: np.ndarray | None, draw: float) -> np.ndarray | None:
    """The short caption's features where the uniform `draw` is below 0.3, else the long one's."""
    return short if draw < SHORT else long


def pad_left(features: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `length` states (length, c) behind zeros where they are fewer; and which are real, (length,) bool."""
    features = features[:length]
    front = length - len(features)
    return np.pad(features, ((front, 0), (0, 0))), np.arange(length) >= front


def text_sample(
    image: np.ndarray, features: np.ndarray | None, *, image_size: int, length: int, dim: int
) -> dict[str, Any]:
    """image (image_size, image_size, 3) uint8, features (length, dim) float32, mask (length,) bool, weight 1.0 or 0.0.

    image: (h, w, 3) uint8, cut as ADM does. Without features, or where the image's shorter side is below `image_size`,
    the sample weighs 0: a grey picture, features of 0 that all count as real.
    """
    if features is None or min(image.shape[:2]) < image_size:
        return {
            "image": np.full((image_size, image_size, 3), 128, np.uint8),
            "features": np.zeros((length, dim), np.float32),
            "mask": np.ones(length, bool),
            "weight": 0.0,
        }
    padded, mask = pad_left(features, length)
    return {"image": augment.adm_crop(image, image_size), "features": padded, "mask": mask, "weight": 1.0}
