"""Nested dropout under the names of FlexTok's configurations (apple/ml-flextok, apple/ml-videoflextok)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smalti.errors import UserError
from smalti.tokenizers.regularizers import NestedDropout

MODES = {  # published, ours; the last four are of the video release
    "uniform": "uniform",
    "pow2": "powers_of_two",
    "uniform_pow2": "uniform_powers_of_two",
    "zipf": "zipf",
    "pow2_roundup": "powers_of_two_rounded_up",
    "halved": "halvings",
    "uniform_halved": "uniform_halvings",
}


def nested_dropout(config: Mapping[str, Any]) -> NestedDropout:
    """The regularizer of a published MaskedNestedDropout module; its mask vector belongs to the tokenizer."""
    mode = config.get("size_sampling_mode", "uniform")
    if mode not in MODES:
        raise UserError(f"size_sampling_mode={mode} of nested dropout is not known; known: {', '.join(MODES)}")
    return NestedDropout(mode=MODES[mode], exponent=config.get("zipf_a", 0.5))
