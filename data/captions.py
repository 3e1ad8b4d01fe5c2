"""What the published text recipe (TA-TiTok and MaskGen, arXiv:2501.07730) does to samples with captions."""

from __future__ import annotations

_OPENINGS = tuple(f"The image {verb}" for verb in ("depicts", "displays", "showcases", "features", "shows"))


def keeps_resolution(height: int, width: int, longer_side: int = 256, aspect: float = 2.0) -> bool:
    """The published filter: longer side at least `longer_side`, height / width within [1 / aspect, aspect]."""
    return max(height, width) >= longer_side and 1 / aspect <= height / width <= aspect


def choose_caption(original: str, recaption: str, draw: float, probability: float = 0.95) -> str:
    """The cleaned re-caption where the uniform `draw` is below `probability`, else the original caption."""
    return clean_recaption(recaption) if draw < probability else original


def clean_recaption(text: str) -> str:
    """A re-caption without its "The image shows …" opening and outer spaces, its first letter a capital."""
    text = text.strip()
    for opening in _OPENINGS:
        text = text.removeprefix(opening)
    text = text.strip()
    return text[:1].upper() + text[1:]
