"""The rate–distortion plot: PSNR over bytes an image, the tokenizer's and those of image codecs."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from smalti.evaluation.baselines import CODECS
from smalti.evaluation.pictures import FAINT, INK, PAPER

OURS = "#1d4e89"
COLOURS = {"jpeg": "#c8553d", "webp": "#588157", "avif": "#b8860b", "jxl": "#8e5a9e"}
MARKERS = {"jpeg": "s", "webp": "D", "avif": "^", "jxl": "v"}


def rate_distortion(
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    *,
    lengths: Sequence[int],
    image_size: int,
    mean_colour: float | None = None,
    title: str = "",
    note: str = "",
) -> Figure:
    """PSNR over bytes an image (below) and bits a pixel (above), both logarithmic.

    curves: of `Baselines.rate_distortion()`: points {"bytes", "psnr", "images"} of "tokens", one for each of `lengths`,
    and of codecs. A codec's point that stands for some of the images only (the others have no such small file) is
    hollow.
    mean_colour: PSNR of no tokens at all, as a line.
    """
    figure = Figure(figsize=(8.4, 5.4), dpi=150, facecolor=_hex(PAPER), layout="constrained")
    axes = figure.add_subplot(facecolor=_hex(PAPER))
    axes.set_xscale("log", base=2)
    ours = curves["tokens"]
    most = max(point["images"] for point in ours)
    hollow = False
    for name, points in curves.items():
        if name == "tokens" or not points:
            continue
        x, y = [point["bytes"] for point in points], [point["psnr"] for point in points]
        axes.plot(x, y, color=COLOURS[name], linewidth=1.4, alpha=0.9, zorder=2)
        for whole in (True, False):
            part = [point for point in points if (point["images"] == most) is whole]
            hollow |= bool(part) and not whole
            axes.plot(
                [point["bytes"] for point in part], [point["psnr"] for point in part], linestyle="none",
                marker=MARKERS[name], markersize=5.5, color=COLOURS[name], zorder=3,
                markerfacecolor=COLOURS[name] if whole else _hex(PAPER),
            )  # fmt: skip
        axes.plot([], [], color=COLOURS[name], marker=MARKERS[name], markersize=5.5, label=CODECS[name].title)
    x, y = [point["bytes"] for point in ours], [point["psnr"] for point in ours]
    axes.plot(x, y, color=OURS, linewidth=2.4, marker="o", markersize=6.5, zorder=4, label="tokens")
    for length, point in zip(lengths, ours, strict=True):
        said = f"{length} token{'s' if length > 1 else ''}" if length in (lengths[0], lengths[-1]) else f"{length}"
        below = length == lengths[-1]  # where curves of codecs may pass above
        axes.annotate(
            said, (point["bytes"], point["psnr"]), xytext=(0, -17 if below else 9), textcoords="offset points",
            ha="center", color=OURS, fontsize=9, zorder=5,
            path_effects=[withStroke(linewidth=3, foreground=_hex(PAPER))],
        )  # fmt: skip
    if mean_colour is not None:
        axes.axhline(mean_colour, color=_hex(FAINT), linewidth=1, linestyle=(0, (5, 4)), zorder=1)
        axes.annotate(
            "each image's mean colour", (1, mean_colour), xycoords=("axes fraction", "data"), xytext=(-6, 4),
            textcoords="offset points", ha="right", color=_hex(FAINT), fontsize=9,
        )  # fmt: skip
    if hollow:
        axes.plot([], [], "o", color=_hex(FAINT), markerfacecolor=_hex(PAPER), label="hollow: some images do not fit")

    every = [point["bytes"] for points in curves.values() for point in points]
    low, high = min(every) / 1.5, max(every) * 1.5
    axes.set_xlim(low, high)
    axes.margins(y=0.12)
    axes.xaxis.set_major_locator(FixedLocator([2**power for power in range(-2, 30) if low <= 2**power <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ink: dict[str, Any] = {"color": _hex(INK), "fontsize": 10}
    axes.set_xlabel("bytes an image (codecs: the whole file; tokens: packed, without a header)", **ink)
    axes.set_ylabel("PSNR in dB", **ink)
    bits = 8 / image_size**2  # a pixel, for each byte
    above = axes.secondary_xaxis("top", functions=(lambda x: np.asarray(x) * bits, lambda x: np.asarray(x) / bits))
    above.set_xlabel("bits a pixel", labelpad=6, **ink)
    powers = [2.0**power for power in range(-24, 8)]
    above.xaxis.set_major_locator(FixedLocator([value for value in powers if low * bits <= value <= high * bits]))
    above.xaxis.set_minor_locator(NullLocator())
    above.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axes.grid(color=_hex(INK), alpha=0.08)
    for side in (axes, above):
        side.tick_params(colors=_hex(INK), labelsize=9)
        for spine in side.spines.values():
            spine.set_color(_hex(FAINT))
    drawn, labels = axes.get_legend_handles_labels()
    place = labels.index("tokens")  # first in the legend, though drawn last
    order = [place, *(number for number in range(len(labels)) if number != place)]
    axes.legend(
        [drawn[i] for i in order], [labels[i] for i in order], loc="upper left", frameon=False, fontsize=9,
        labelcolor=_hex(INK),
    )  # fmt: skip
    figure.suptitle(title, fontsize=11, color=_hex(INK))
    figure.supxlabel(note, fontsize=8, color=_hex(FAINT))
    return figure


def save(figure: Figure, png: Path, svg: Path) -> None:
    """Write both files, each in one move; equal figures give equal files."""
    png.parent.mkdir(parents=True, exist_ok=True)
    for path, metadata in ((png, {"Software": None}), (svg, {"Date": None})):
        drawn = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "smalti"}):
            options: dict[str, Any] = {"format": path.suffix[1:], "metadata": metadata}
            figure.savefig(drawn, facecolor=figure.get_facecolor(), **options)
        partial = path.with_name(path.name + ".tmp")
        partial.write_bytes(drawn.getvalue())
        os.replace(partial, path)


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
