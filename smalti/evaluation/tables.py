"""A report of an evaluation as JSON, as a Markdown table that says how each figure was obtained, and as plain lines.

report: {"figures": {name: number}, "left_out": {name: why}, "protocol": {…}}, of samples also {"notes": [line]}, and
of an evaluation by prefix length {"by_length": [figures of each], "rate_distortion": {…}}, as run.py and samples.py
beside this file make it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

from smalti.evaluation.protocol import how

DECIBELS = ("psnr", "colour")


def to_json(report: Mapping[str, Any]) -> str:
    """Indented JSON; what is not a finite number is null, since JSON has no NaN."""
    return json.dumps(_finite(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_markdown(report: Mapping[str, Any]) -> str:
    """The table of figures, then what was measured and with which versions and weights."""
    protocol = report["protocol"]
    samples = "reference" in protocol
    rows = [(name, shown(name, value), how(name, samples=samples)) for name, value in report["figures"].items()]
    rows += [(name, "–", f"left out: {why}") for name, why in report["left_out"].items()]
    lines = [f"# {protocol['model']['path']}", "", sentence(protocol), "", *table(("figure", "value", "how"), rows), ""]
    for note in report.get("notes", ()):
        lines += [f"{note}.", ""]
    if "by_length" in report:
        header, *body = by_length(report["by_length"])
        lines += ["## By prefix length", "", *table(header, body, right=range(len(header))), ""]
    if "rate_distortion" in report:
        header, *body = rate_distortion(report["rate_distortion"]["curves"])
        words = "the codecs' mean PSNR, and in how many images' files of so many bytes there are"
        lines += [
            f"## At equal bytes, on {report['rate_distortion']['images']} images",
            "",
            f"Budgets in bytes; {words}.",
            "",
        ]
        lines += [*table(header, body, right=range(len(header))), ""]
    for name, value in protocol.items():
        if value is None:
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {item}" for key, item in value.items() if item is not None) or "none"
        lines.append(f"- {name.replace('_', ' ')}: {value}")
    return "\n".join(lines) + "\n"


def to_text(report: Mapping[str, Any]) -> str:
    """Aligned lines for the terminal."""
    figures = {name: shown(name, value) for name, value in report["figures"].items()}
    names = [*figures, *report["left_out"]]
    width = max(map(len, names), default=0)
    lines = [sentence(report["protocol"])]
    lines += [f"  {name:{width}}  {value}" for name, value in figures.items()]
    lines += [f"  {name:{width}}  left out: {why}" for name, why in report["left_out"].items()]
    lines += [f"  {note}" for note in report.get("notes", ())]
    if "by_length" in report:
        rows = by_length(report["by_length"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def by_length(rows: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """Cells of a table of the tokenizer's figures at each number of tokens, the header first."""
    names = {"tokens": "tokens", "bits_per_image": "bits", "bytes_per_image": "bytes", "bits_per_pixel": "bits a pixel"}
    names |= {name: name for name in ("psnr", "ssim", "lpips", "rfid")}
    there = [name for name in names if name in rows[0]]
    return [[names[name] for name in there], *([shown(name, row[name]) for name in there] for row in rows)]


def rate_distortion(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> list[list[str]]:
    """Cells of a table of the tokenizer's PSNR and the codecs' at each budget of bytes, the header first."""
    codecs = [name for name in curves if name != "tokens"]
    ours = {point["bytes"]: point["psnr"] for point in curves["tokens"]}
    points = {name: {point["budget"]: point for point in curves[name]} for name in codecs}
    rows = [["bytes", "tokens", *codecs]]
    for budget in sorted({*ours, *(budget for found in points.values() for budget in found)}):
        row = [f"{budget:,.0f}", shown("psnr", ours[budget]) if budget in ours else ""]
        for name in codecs:
            point = points[name].get(budget)
            row.append(f"{shown('psnr', point['psnr'])} ({point['images']:.0f})" if point else "–")
        rows.append(row)
    return rows


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Container[int] = (1,)) -> list[str]:
    """Lines of a Markdown table; `right` names the columns that stand to the right."""
    lines = [header, [("---:" if i in right else "---") for i in range(len(header))], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def sentence(protocol: Mapping[str, Any]) -> str:
    """Which images were measured, at what size, and samples against what."""
    if "reference" in protocol:
        reference = protocol["reference"]
        real = f"{reference['images']:,} images" if reference["images"] else "statistics"
        against = f"{real} of {reference['name']} ({reference['split']})"
        return f"{protocol['images']:,} samples against {against}, {protocol['resolution']} pixels"
    data = protocol["data"]
    return f"{protocol['images']} images of {data['name']} ({data['split']}), {protocol['resolution']} pixels"


def shown(name: str, value: float) -> str:
    """A figure with as many digits as it is worth, and its unit."""
    if not math.isfinite(value):
        return "not a number"
    if name.endswith("usage"):
        return f"{100 * value:.1f} %"
    if any(part in name for part in DECIBELS):
        return f"{value:.2f} dB"
    if float(value).is_integer():
        return f"{value:.0f}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
