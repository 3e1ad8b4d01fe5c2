"""A report of an evaluation as JSON, as a Markdown table that says how each figure was obtained, and as plain lines.

report: {"figures": {name: number}, "left_out": {name: why}, "protocol": {…}}, as smalti/evaluation/run.py makes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from smalti.evaluation.protocol import how

DECIBELS = ("psnr", "colour")


def to_json(report: Mapping[str, Any]) -> str:
    """Indented JSON; what is not a finite number is null, since JSON has no NaN."""
    return json.dumps(_finite(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_markdown(report: Mapping[str, Any]) -> str:
    """The table of figures, then what was measured and with which versions and weights."""
    rows = [(name, shown(name, value), how(name)) for name, value in report["figures"].items()]
    rows += [(name, "–", f"left out: {why}") for name, why in report["left_out"].items()]
    protocol = report["protocol"]
    lines = [f"# {protocol['model']['path']}", "", sentence(protocol), "", *table(("figure", "value", "how"), rows), ""]
    for name, value in protocol.items():
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
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, the second column to the right."""
    lines = [header, [("---:" if i == 1 else "---") for i in range(len(header))], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def sentence(protocol: Mapping[str, Any]) -> str:
    """Which images were measured, at what size."""
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
