"""The embedded set: coloured shapes on textured backgrounds, drawn when first asked for and kept as shards.

One to three shapes, anti-aliased by their distance to the edge, so that any size is drawn in one pass. A sample has the
image (`jpg`), the class of its largest shape (`cls`), a caption (`txt`) such as "a large red circle left of a small
blue square on a striped background", and the visible part of each shape (`masks.png`: grey, 0 background, k the k-th
shape that the caption names). Sample n of a seed is the same whatever else is drawn.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smalti.data.shards import write_index, write_shard
from smalti.data.textures import background, grid
from smalti.errors import UserError

Array = np.ndarray
Job = tuple[str, int, int, int, int, int]  # shard, then the arguments of `samples`
SAMPLES_PER_SHARD = 1000
COLOURS = {
    "red": (0.84, 0.15, 0.16),
    "orange": (0.96, 0.52, 0.10),
    "yellow": (0.98, 0.81, 0.17),
    "green": (0.18, 0.62, 0.28),
    "teal": (0.09, 0.62, 0.63),
    "blue": (0.15, 0.38, 0.85),
    "purple": (0.50, 0.22, 0.69),
    "pink": (0.95, 0.47, 0.68),
    "brown": (0.48, 0.29, 0.15),
    "black": (0.10, 0.10, 0.12),
    "white": (0.97, 0.96, 0.94),
}


@dataclass(frozen=True)
class Drawing:
    """image (side, side, 3) uint8; masks (side, side) uint8, k where the k-th shape is seen; label into CLASSES."""

    image: Array
    masks: Array
    label: int
    caption: str


@dataclass(frozen=True)
class Shape:
    """A shape to be drawn: centre and radius in sides of the image, angle in radians, y downwards."""

    kind: str
    colour: str
    rgb: Array
    x: float
    y: float
    radius: float
    angle: float

    @property
    def phrase(self) -> str:
        size = "small " if self.radius < 0.135 else "large " if self.radius > 0.215 else ""
        words = f"{size}{self.colour} {self.kind}"
        return ("an " if words[0] in "aeiou" else "a ") + words

    def relation_to(self, other: Shape) -> str:
        dx, dy = self.x - other.x, self.y - other.y
        if abs(dx) > abs(dy):
            return "left of" if dx < 0 else "right of"
        return "above" if dy < 0 else "below"


def draw(seed: int, index: int, side: int = 64, split: int = 0) -> Drawing:
    """Picture `index` of a seed and split."""
    rng = np.random.default_rng([seed, split, index])
    ground, tones, texture = background(rng, side)
    shapes = _arrange(rng, tones)
    masks = np.zeros((side, side), dtype=np.uint8)
    for number, shape in enumerate(shapes, start=1):
        masks[_paint(rng, ground, shape)] = number
    image = (ground.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    first, *others = shapes
    relations = " and ".join(f"{first.relation_to(other)} {other.phrase}" for other in others)
    caption = " ".join(filter(None, (first.phrase, relations, f"on a {texture} background")))
    return Drawing(image, masks, CLASSES.index(first.kind), caption)


# Shapes: signed distances (negative inside) on local coordinates x, y (…), where the shape has radius about 1.


def _circle(x: Array, y: Array, radius: float = 0.92) -> Array:
    return np.hypot(x, y) - radius


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _polygon(x: Array, y: Array, corners: Array) -> Array:
    """Distance to the nearest edge; inside where a ray to the right crosses the edges an odd number of times."""
    nearest = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners.tolist(), np.roll(corners, -1, axis=0).tolist(), strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = x - ax, y - ay
        along = ((wx * ex + wy * ey) * (1 / (ex * ex + ey * ey))).clip(0, 1)
        nearest = np.minimum(nearest, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        if ey:
            inside ^= ((ay > y) != (by > y)) & (wx < wy * (ex / ey))
    return np.sqrt(nearest) * np.where(inside, -1, 1).astype(np.float32)


def _corners(count: int, outer: float = 1.0, inner: float | None = None) -> Array:
    """A regular polygon with a corner on top; with `inner`, a star of that inner radius."""
    angles = np.arange(count * (1 if inner is None else 2)) * (2 * math.pi / (count * (1 if inner is None else 2)))
    radii = np.where(np.arange(len(angles)) % 2, outer if inner is None else inner, outer)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def _heart(x: Array, y: Array) -> Array:
    turned = (x + y - 0.06) * math.sqrt(0.5), (y - x - 0.06) * math.sqrt(0.5)
    lobes = np.hypot(np.abs(x) - 0.42, y + 0.36) - 0.594
    return np.minimum(_box(*turned, 0.594, 0.594), lobes)


def _drop(x: Array, y: Array) -> Array:
    r, apex, centre = 0.62, -1.05, 0.32
    sine = r / (centre - apex)
    touch = (r * math.sqrt(1 - sine * sine), centre - r * sine)
    tip = _polygon(x, y, np.array([(0, apex), touch, (-touch[0], touch[1])]))
    return np.minimum(np.hypot(x, y - centre) - r, tip)


def _flower(x: Array, y: Array) -> Array:
    sector = 2 * math.pi / 6
    angle = (np.arctan2(y, x) + sector / 2) % sector - sector / 2
    radius = np.hypot(x, y)
    petals = np.hypot(radius * np.cos(angle) - 0.62, radius * np.sin(angle)) - 0.36
    return np.minimum(petals, radius - 0.5)


_TRIANGLE, _HEXAGON, _STAR = _corners(3, 1.1), _corners(6, 0.96), _corners(5, 1.08, 0.5)
_ARROW = np.array([(1, 0), (0.15, 0.78), (0.15, 0.3), (-0.95, 0.3), (-0.95, -0.3), (0.15, -0.3), (0.15, -0.78)])

_DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": lambda x, y: _box(x, y, 0.76, 0.76),
    "triangle": lambda x, y: _polygon(x, y - 0.15, _TRIANGLE),
    "star": lambda x, y: _polygon(x, y, _STAR),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.7) - 0.24,
    "cross": lambda x, y: np.minimum(_box(x, y, 0.94, 0.31), _box(x, y, 0.31, 0.94)),
    "hexagon": lambda x, y: _polygon(x, y, _HEXAGON),
    "heart": _heart,
    "crescent": lambda x, y: np.maximum(_circle(x, y, 0.95), 0.76 - np.hypot(x - 0.42, y)),
    "flower": _flower,
    "arrow": lambda x, y: _polygon(x, y, _ARROW),
    "drop": _drop,
}
CLASSES = tuple(_DISTANCES)
_UPRIGHT = ("heart", "drop", "triangle")  # turned by less than others: upside down they are hard to name


def _arrange(rng: np.random.Generator, tones: list[Array]) -> list[Shape]:
    """One to three shapes that hardly overlap, the largest first, in colours that stand off their background."""
    count = int(rng.choice(3, p=[0.35, 0.4, 0.25])) + 1
    sizes = [(0.22, 0.36), (0.15, 0.2), (0.09, 0.13)] if count == 1 else [(0.22, 0.3), (0.14, 0.2), (0.09, 0.13)]
    radii = sorted((rng.uniform(*sizes[int(rng.choice(3, p=[0.4, 0.35, 0.25]))]) for _ in range(count)), reverse=True)
    shapes: list[Shape] = []
    for radius in radii:
        kind = CLASSES[int(rng.integers(len(CLASSES)))]
        free = _standing_off(np.stack(tones + [shape.rgb for shape in shapes]))
        colour = free[int(rng.integers(len(free)))] if free else "white"
        rgb = (np.array(COLOURS[colour]) * rng.uniform(0.93, 1.05) + rng.uniform(-0.025, 0.025, 3)).clip(0.03, 0.98)
        angle = rng.uniform(-0.6, 0.6) if kind in _UPRIGHT else rng.uniform(-math.pi, math.pi)
        margin = radius * 0.9 + 0.02
        for closeness in np.linspace(1.05, 0.0, 40).tolist():  # touching less and less strictly
            x, y = rng.uniform(margin, 1 - margin, 2).tolist()
            if all(math.hypot(x - one.x, y - one.y) > closeness * (radius + one.radius) for one in shapes):
                break
        shapes.append(Shape(kind, colour, rgb.astype(np.float32), x, y, radius, angle))
    return shapes


def _standing_off(taken: Array) -> list[str]:
    """The names of the colours that differ from all of `taken` (n, 3), in colour and in brightness."""
    differences = np.array(list(COLOURS.values()))[:, None] - taken
    colour, brightness = (differences**2).sum(-1), np.abs(differences @ (0.3, 0.59, 0.11))
    clear = ((colour > 0.1) & (brightness > 0.07)).all(axis=1)
    return [name for name, is_clear in zip(COLOURS, clear.tolist(), strict=True) if is_clear]


def _paint(rng: np.random.Generator, ground: Array, shape: Shape) -> Array:
    """Draw a shape into `ground` (side, side, 3) float32, in place; returns where at least half a pixel is covered."""
    side = len(ground)
    x, y = grid(side)
    cosine, sine = math.cos(shape.angle), math.sin(shape.angle)
    dx, dy = (x - shape.x) / shape.radius, (y - shape.y) / shape.radius
    rounding = rng.uniform(0, 0.12)

    def distance(dx: Array, dy: Array) -> Array:
        """In pixels, with corners rounded: the distance to a smaller shape, less what it is smaller by."""
        u, v = (cosine * dx + sine * dy) / (1 - rounding), (cosine * dy - sine * dx) / (1 - rounding)
        return (_DISTANCES[shape.kind](u, v) * (1 - rounding) - rounding) * (shape.radius * side)

    edge = distance(dx, dy)
    fill = np.broadcast_to(shape.rgb, ground.shape)
    if rng.random() < 0.6:  # lit from a side
        light = rng.uniform(0, 2 * math.pi)
        fill = (
            fill * (1 + rng.uniform(0.08, 0.22) * (math.cos(light) * dx + math.sin(light) * dy).clip(-1, 1))[..., None]
        )
    if rng.random() < 0.35:  # a soft shadow on what lies below
        blur = rng.uniform(0.1, 0.35) * shape.radius * side
        shadow = distance(dx - rng.uniform(-0.2, 0.2), dy - rng.uniform(0.08, 0.25))
        ground *= 1 - rng.uniform(0.25, 0.5) * ((0.5 - 0.5 * shadow / blur).clip(0, 1) ** 2)[..., None]
    if rng.random() < 0.3:  # an outline
        width = max(rng.uniform(0.05, 0.12) * shape.radius * side, 0.9)
        outline = shape.rgb * np.float32(0.45) if shape.rgb.mean() > 0.25 else shape.rgb + np.float32(0.45)
        fill = fill + (edge + width + 0.5).clip(0, 1)[..., None] * (outline - fill)
    covered = (0.5 - edge).clip(0, 1)
    ground += covered[..., None] * (fill - ground)
    return covered >= 0.5


# The set: shards in the cache folder, written by as many processes as there are cores.


def samples(seed: int, split: int, start: int, stop: int, side: int) -> Iterator[dict[str, Any]]:
    """Pictures start … stop − 1 as samples of a shard."""
    for index in range(start, stop):
        drawing = draw(seed, index, side, split)
        image, masks = io.BytesIO(), io.BytesIO()
        Image.fromarray(drawing.image).save(image, "JPEG", quality=95, subsampling=0)
        Image.fromarray(drawing.masks).save(masks, "PNG")
        yield {
            "__key__": f"{index:08d}",
            "jpg": image.getvalue(),
            "cls": drawing.label,
            "txt": drawing.caption,
            "masks.png": masks.getvalue(),
        }


def prepare(cache: Path, *, side: int = 64, count: int = 20_000, seed: int = 0) -> Path:
    """The folder of the set: `train` (`count` pictures) and `validation` (a twentieth as many others); drawn if absent.

    Its name holds a hash of the code that draws and of the arguments. It appears whole or not at all; a second process
    waits for the first. Raises UserError when the cache folder cannot be written.
    """
    digest = hashlib.sha256(json.dumps([side, count, seed]).encode())
    for file in ("shapes.py", "textures.py"):
        digest.update((Path(__file__).parent / file).read_bytes())
    name = f"shapes-{side}px-{count}-{digest.hexdigest()[:12]}"
    folder = cache / "shapes" / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent / f".{name}.lock"):
            if not folder.is_dir():
                for left in folder.parent.glob(f".{name}.part-*"):  # of a process that was killed: the lock is ours
                    shutil.rmtree(left, ignore_errors=True)
                part = folder.with_name(f".{name}.part-{os.getpid()}")
                _write(part, side, count, seed)
                os.rename(part, folder)
    except OSError as error:
        raise UserError(f"data.cache={cache} cannot hold the embedded shapes ({error}); name another folder") from error
    return folder


def _write(folder: Path, side: int, count: int, seed: int) -> None:
    """Both splits in a folder, shard by shard, by one process a core."""
    jobs = []
    for split, (name, pictures) in enumerate((("train", count), ("validation", -(-count // 20)))):
        (folder / name).mkdir(parents=True)
        for start in range(0, pictures, SAMPLES_PER_SHARD):
            file = folder / name / f"shapes-{start // SAMPLES_PER_SHARD:06d}.tar"
            jobs.append((str(file), seed, split, start, min(start + SAMPLES_PER_SHARD, pictures), side))
    print(
        f"drawing the embedded shapes, once: {count:,} of {side} px, into {folder.parent}", file=sys.stderr, flush=True
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    entries = _in_processes(jobs, cores) if cores > 1 and len(jobs) > 4 else _run(jobs)
    for name in ("train", "validation"):
        written = [entry for file, entry in sorted(entries.items()) if Path(file).parent.name == name]
        write_index(folder / name, written, CLASSES)


def _run(jobs: list[Job]) -> dict[str, dict[str, Any]]:
    """Write the shards; index entries by file."""
    return {file: write_shard(Path(file), samples(*arguments)) for file, *arguments in jobs}


def _in_processes(jobs: list[Job], count: int) -> dict[str, dict[str, Any]]:
    """`_run` shared among processes of their own. Not multiprocessing: that asks the user's script for a main guard or
    forks beside torch's threads, and refuses to start anything from a loader's worker."""
    command = [sys.executable, "-c", "from smalti.data.shapes import _serve; _serve()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    processes = []
    entries: dict[str, dict[str, Any]] = {}
    try:
        for _ in range(count):
            pipe = subprocess.PIPE
            processes.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True))
        with ThreadPoolExecutor(count) as threads:
            shares = [json.dumps(jobs[number::count]) for number in range(count)]
            outputs = list(threads.map(lambda process, share: process.communicate(share)[0], processes, shares))
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"a process that drew the embedded shapes ended with exit code {process.returncode}")
        entries |= json.loads(output)
    return entries


def _serve() -> None:
    json.dump(_run(json.load(sys.stdin)), sys.stdout)


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    """One process at a time; where the file system has no locks, several may draw and the first to finish wins."""
    with open(file, "w") as handle:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
