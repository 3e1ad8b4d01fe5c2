"""Pictures to look at: originals over reconstructions, one photo beside its reconstruction, images by number of tokens.

Every function takes images (b, 3, h, w) in [0, 1] and gives a PIL image; `save_png` writes it in one move.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER, INK, FAINT = (250, 249, 246), (38, 40, 46), (132, 134, 140)
MARGIN, GAP, BAND_GAP, LINE = 16, 4, 14, 15
SMALLEST_CELL = 96  # pixels: smaller images are enlarged by a whole factor, pixels staying square


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] (clamped), rounded to 8 bits, on the CPU."""
    return images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


def to_pil(image: Tensor) -> Image.Image:
    """One image (3, h, w) in [0, 1], float or uint8, as it is stored: rounded to 8 bits."""
    pixels = image.cpu() if image.dtype == torch.uint8 else to_uint8(image)
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def grid(
    rows: Sequence[Tensor], labels: Sequence[str] = (), *, columns: int = 8, title: str = "", note: str = ""
) -> Image.Image:
    """Rows of images under one another: image i of every row stands in the same column.

    rows: tensors (b, 3, h, w) in [0, 1] of equal shape, such as originals and reconstructions. labels: a name a row, at
    its left. More than `columns` images go on in further bands. title: above; note: small and faint, below.
    """
    if not rows or len({tuple(row.shape) for row in rows}) != 1 or rows[0].ndim != 4:
        raise ValueError(f"grid needs rows of one shape (b, 3, h, w), got {[tuple(row.shape) for row in rows]}")
    if labels and len(labels) != len(rows):
        raise ValueError(f"grid got {len(labels)} labels for {len(rows)} rows")
    count, _, h, w = rows[0].shape
    columns = max(1, min(columns, count))
    factor = max(1, -(-SMALLEST_CELL // max(h, w)))
    cell_h, cell_w = h * factor, w * factor
    small, large = _font(11), _font(14)
    left = MARGIN + (max(_width(label, small) for label in labels) + 10 if labels else 0)
    top = MARGIN + (30 if title else 0)
    bands = -(-count // columns)
    band_h = len(rows) * cell_h + (len(rows) - 1) * GAP
    width = left + columns * cell_w + (columns - 1) * GAP + MARGIN
    width = max(width, MARGIN * 2 + _width(title, large), MARGIN * 2 + _width(note, small))
    height = top + bands * band_h + (bands - 1) * BAND_GAP + MARGIN + (22 if note else 0)

    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((MARGIN, MARGIN - 2), title, fill=INK, font=large)
    for band in range(bands):
        for r, row in enumerate(rows):
            y = top + band * (band_h + BAND_GAP) + r * (cell_h + GAP)
            if labels:
                draw.text((left - 10, y + cell_h / 2), labels[r], fill=INK, font=small, anchor="rm")
            for column, image in enumerate(row[band * columns : (band + 1) * columns]):
                cell = to_pil(image).resize((cell_w, cell_h), Image.Resampling.NEAREST)
                picture.paste(cell, (left + column * (cell_w + GAP), y))
    if note:
        draw.text((MARGIN, height - MARGIN - 2), note, fill=FAINT, font=small, anchor="ls")
    return picture


def reconstructions(
    images: Tensor, reconstructed: Tensor, *, columns: int = 8, title: str = "", note: str = ""
) -> Image.Image:
    """Originals over their reconstructions; both (b, 3, h, w) in [0, 1]."""
    return grid([images, reconstructed], ["original", "reconstruction"], columns=columns, title=title, note=note)


def side_by_side(pictures: Sequence[tuple[str, Tensor]], *, note: str = "") -> Image.Image:
    """Captioned images (3, h, w) of equal height in one row, each caption under its image; `note` below all."""
    small = _font(12)
    factor = max(1, -(-192 // max(image.shape[-1] for _, image in pictures)))
    cells = [(caption, to_pil(image)) for caption, image in pictures]
    cells = [(c, i.resize((i.width * factor, i.height * factor), Image.Resampling.NEAREST)) for c, i in cells]
    widths = [max(image.width, _width(caption, small)) for caption, image in cells]
    tallest = max(image.height for _, image in cells)
    width = max(2 * MARGIN + sum(widths) + MARGIN * (len(cells) - 1), 2 * MARGIN + _width(note, small))
    picture = Image.new("RGB", (width, MARGIN + tallest + 24 + MARGIN // 2 + (20 if note else 0)), PAPER)
    draw = ImageDraw.Draw(picture)
    x = MARGIN
    for (caption, image), cell_width in zip(cells, widths, strict=True):
        picture.paste(image, (x, MARGIN))
        draw.text((x, MARGIN + tallest + 6), caption, fill=INK, font=small)
        x += cell_width + MARGIN
    if note:
        draw.text((MARGIN, picture.height - MARGIN + 2), note, fill=FAINT, font=small, anchor="ls")
    return picture


def strip(columns: Sequence[tuple[str, Tensor]], *, title: str = "", note: str = "") -> Image.Image:
    """The same images at several numbers of tokens: image i of every column stands in row i.

    columns: a caption, which stands above and may have several lines, and images (b, 3, h, w) in [0, 1] of equal shape.
    """
    if not columns or len({tuple(images.shape) for _, images in columns}) != 1 or columns[0][1].ndim != 4:
        raise ValueError(f"strip needs images of one shape (b, 3, h, w), got {[tuple(i.shape) for _, i in columns]}")
    count, _, h, w = columns[0][1].shape
    factor = max(1, -(-SMALLEST_CELL // max(h, w)))
    cell_h, cell_w = h * factor, w * factor
    small, large = _font(11), _font(14)
    step = GAP + max(cell_w, *(_width(line, small) for caption, _ in columns for line in caption.split("\n")))
    lines = max(caption.count("\n") + 1 for caption, _ in columns)
    top = MARGIN + (30 if title else 0) + LINE * lines + 4
    width = max(2 * MARGIN + len(columns) * step - GAP, 2 * MARGIN + max(_width(title, large), _width(note, small)))
    height = top + count * (cell_h + GAP) - GAP + MARGIN + (22 if note else 0)
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((MARGIN, MARGIN - 2), title, fill=INK, font=large)
    for column, (caption, images) in enumerate(columns):
        x = MARGIN + column * step
        for line, words in enumerate(caption.split("\n")):
            y = top - 4 - LINE * (lines - line)
            draw.text((x + cell_w / 2, y), words, fill=FAINT if line else INK, font=small, anchor="ma")
        for row, image in enumerate(images):
            cell = to_pil(image).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            picture.paste(cell, (x, top + row * (cell_h + GAP)))
    if note:
        draw.text((MARGIN, height - MARGIN - 2), note, fill=FAINT, font=small, anchor="ls")
    return picture


def tokens_in_words(length: int, size: int | None) -> str:
    """The caption of an image of `length` tokens, and of their bytes where they have any."""
    tokens = f"{length:,} token{'s' if length > 1 else ''}"
    return tokens if size is None else f"{tokens}\n{size:,} byte{'s' if size > 1 else ''}"


def save_png(picture: Image.Image, path: Path) -> Path:
    """Write a PNG under a temporary name, then rename it: a reader never sees half a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    picture.save(partial, format="PNG", optimize=True)
    os.replace(partial, path)
    return path


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships: Pillow's own font has no ×."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _width(text: str, font: ImageFont.FreeTypeFont) -> int:
    return int(font.getlength(text)) + 1 if text else 0
