"""Backgrounds of the embedded shapes: each texture gives a value in [0, 1] at every pixel, which mixes two tones."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image

Array = np.ndarray


@cache
def grid(side: int) -> tuple[Array, Array]:
    """x and y of pixel centres, in sides of the image: (side, side) float32 each."""
    centres = ((np.arange(side) + 0.5) / side).astype(np.float32)
    x, y = np.meshgrid(centres, centres)
    return x, y


def background(rng: np.random.Generator, side: int) -> tuple[Array, list[Array], str]:
    """(side, side, 3) float32, the tones it is mixed of, and the word for its texture."""
    word = str(rng.choice(list(_TEXTURES)))
    hue, saturation = rng.random(), rng.uniform(0.1, 0.68)
    value = rng.choice([rng.uniform(0.8, 0.97), rng.uniform(0.5, 0.75), rng.uniform(0.16, 0.34)], p=[0.5, 0.25, 0.25])
    contrast = rng.uniform(0.08, 0.26) * (1 if value < 0.5 else -1)
    near = rng.choice([rng.normal(0, 0.04), 0.5 + rng.normal(0, 0.06)], p=[0.7, 0.3])
    tones = [
        _rgb(hue, saturation, value),
        _rgb(hue + near, saturation * rng.uniform(0.4, 1.3), value + contrast),
    ]
    mixture = _TEXTURES[word](rng, side)[..., None]
    ground = tones[0] + mixture * (tones[1] - tones[0])
    x, y = grid(side)
    direction = rng.uniform(0, 2 * math.pi)
    light = 1 + rng.uniform(0, 0.12) * (math.cos(direction) * (2 * x - 1) + math.sin(direction) * (2 * y - 1))
    ground *= light[..., None]
    if rng.random() < 0.3:  # paper
        # From a generator of its own: how much it draws depends on the size, which nothing else may.
        grain = np.random.default_rng(rng.integers(2**63)).standard_normal((side, side, 1), dtype=np.float32)
        ground += rng.uniform(0.008, 0.025) * grain
    return ground, tones, word


def _rgb(hue: float, saturation: float, value: float) -> Array:
    """HSV to RGB, float32."""
    channels = (np.array([5.0, 3.0, 1.0]) + 6 * hue) % 6
    wheel = np.minimum(channels, 4 - channels).clip(0, 1)
    return (value * (1 - min(saturation, 1.0) * wheel)).clip(0, 1).astype(np.float32)


def _turned(rng: np.random.Generator, side: int) -> tuple[Array, Array]:
    """Coordinates about a random point, turned by a random angle."""
    x, y = grid(side)
    angle, (cx, cy) = rng.uniform(0, 2 * math.pi), rng.uniform(0, 1, 2).tolist()
    cosine, sine = math.cos(angle), math.sin(angle)
    return cosine * (x - cx) + sine * (y - cy), cosine * (y - cy) - sine * (x - cx)


def _bands(position: Array, width: float, period: float, pixel: float) -> Array:
    """1 inside bands of `width` that repeat with `period`, anti-aliased over a pixel."""
    across = np.abs((position % period) - period / 2)
    return (0.5 + (width / 2 - across) / pixel).clip(0, 1)


def _noise(rng: np.random.Generator, side: int, octaves: int, coarsest: int) -> Array:
    """Smooth noise in about [0, 1]: random grids, each twice as fine and half as strong, enlarged bicubically."""
    total = np.zeros((side, side), dtype=np.float32)
    for octave in range(octaves):
        cells = coarsest * 2**octave
        grid = Image.fromarray(rng.standard_normal((cells + 1, cells + 1)).astype(np.float32))
        total += np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC)) * 0.5**octave
    low, high = total.min(), total.max()
    return (total - low) / (high - low)


def _smooth(rng: np.random.Generator, side: int) -> Array:
    x, y = _turned(rng, side)
    if rng.random() < 0.5:
        return (0.5 + x * rng.uniform(0.6, 1.2)).clip(0, 1)
    return (np.hypot(x, y) * rng.uniform(0.8, 1.4)).clip(0, 1)


def _cloudy(rng: np.random.Generator, side: int) -> Array:
    return _noise(rng, side, octaves=int(rng.integers(2, 5)), coarsest=int(rng.integers(2, 5)))


def _marbled(rng: np.random.Generator, side: int) -> Array:
    x, _ = _turned(rng, side)
    veins = np.sin((x * rng.uniform(2, 5) + _noise(rng, side, 3, 2) * rng.uniform(1, 2)) * 2 * math.pi)
    return 1 - np.abs(veins) ** np.float32(rng.uniform(0.4, 0.9))


def _striped(rng: np.random.Generator, side: int) -> Array:
    x, _ = _turned(rng, side)
    period = rng.uniform(0.09, 0.3)
    return _bands(x, period * rng.uniform(0.3, 0.7), period, 1 / side)


def _wavy(rng: np.random.Generator, side: int) -> Array:
    x, y = _turned(rng, side)
    period = rng.uniform(0.1, 0.25)
    bent = x + rng.uniform(0.03, 0.09) * np.sin(y * rng.uniform(1, 3) * 2 * math.pi)
    return _bands(bent, period / 2, period, 1.3 / side)


def _checkered(rng: np.random.Generator, side: int) -> Array:
    x, y = _turned(rng, side)
    period = rng.uniform(0.14, 0.45)
    one, other = (_bands(axis, period / 2, period, 1 / side) for axis in (x, y))
    return one + other - 2 * one * other


def _dotted(rng: np.random.Generator, side: int) -> Array:
    x, y = _turned(rng, side)
    period = rng.uniform(0.1, 0.26)
    row = np.floor(y / period)
    dx, dy = (x / period + row / 2) % 1 - 0.5, y / period - row - 0.5
    return (0.5 + (rng.uniform(0.2, 0.36) - np.hypot(dx, dy)) * period * side).clip(0, 1)


def _ringed(rng: np.random.Generator, side: int) -> Array:
    x, y = _turned(rng, side)
    period = rng.uniform(0.1, 0.25)
    return _bands(np.hypot(x, y), period * rng.uniform(0.35, 0.65), period, 1 / side)


def _rayed(rng: np.random.Generator, side: int) -> Array:
    x, y = _turned(rng, side)
    radius, rays = np.hypot(x, y) + 1e-4, int(rng.integers(6, 15))
    sector = 2 * math.pi / rays
    return _bands(np.arctan2(y, x), sector / 2, sector, 1 / (side * radius))


def _bricked(rng: np.random.Generator, side: int) -> Array:
    x, y = _turned(rng, side)
    height = rng.uniform(0.09, 0.18)
    row = np.floor(y / height)
    column = x / (2.1 * height) + row / 2
    pixels = height * side
    gap = np.minimum((0.5 - np.abs(column % 1 - 0.5)) * 2.1, 0.5 - np.abs(y / height - row - 0.5)) * pixels
    shade = 0.4 * rng.random((64, 64), dtype=np.float32)[row.astype(int) % 64, np.floor(column).astype(int) % 64]
    joint = (rng.uniform(0.6, 1.1) + 0.04 * pixels - gap).clip(0, 1)
    return shade + joint * (1 - shade)


def _plaid(rng: np.random.Generator, side: int) -> Array:
    x, y = _turned(rng, side)
    period = rng.uniform(0.18, 0.4)
    total = np.zeros_like(x)
    for axis in (x, y):
        total += 0.4 * _bands(axis, period * 0.45, period, 1 / side)
        total += 0.2 * _bands(axis + period * 0.3, period * 0.12, period, 1 / side)
    return total.clip(0, 1)


def _mosaic(rng: np.random.Generator, side: int) -> Array:
    """Stones laid in rows, each a little out of place and of its own shade, with joints between them: smalti."""
    stones = int(rng.integers(5, 10))
    x, y = (axis * stones for axis in grid(side))
    across, down = rng.uniform(-0.35, 0.35, (2, stones + 2, stones + 2)).astype(np.float32)
    shades = rng.random((stones + 2, stones + 2), dtype=np.float32)
    nearest, second, shade = np.full_like(x, np.inf), np.full_like(x, np.inf), np.zeros_like(x)
    for step_y in (0, 1, 2):
        for step_x in (0, 1, 2):
            row, column = y.astype(int) + step_y, x.astype(int) + step_x
            distance = np.hypot(x - column + 0.5 - across[row, column], y - row + 0.5 - down[row, column])
            closer = distance < nearest
            second = np.where(closer, nearest, np.minimum(second, distance))
            shade = np.where(closer, shades[row, column], shade)
            nearest = np.minimum(nearest, distance)
    pixels = side / stones
    joint = (0.5 + 0.06 * pixels - (second - nearest) * 0.5 * pixels).clip(0, 1)
    return 0.75 * shade + joint * (1 - 0.75 * shade)


_TEXTURES = {
    "smooth": _smooth,
    "cloudy": _cloudy,
    "marbled": _marbled,
    "striped": _striped,
    "wavy": _wavy,
    "checkered": _checkered,
    "dotted": _dotted,
    "ringed": _ringed,
    "rayed": _rayed,
    "bricked": _bricked,
    "plaid": _plaid,
    "mosaic": _mosaic,
}
