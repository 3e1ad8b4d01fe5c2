"""Attention masks over sequences that are made of several parts (patches, then registers); true: may attend to."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

MODES = ("full", "causal", "causal_last")


def attention_mask(sizes: tuple[int, ...], mode: str, device: torch.device) -> Tensor | None:
    """(n, n) bool for parts of the given sizes, n their sum; None where all see all. Made once for a shape.

    mode: "full"; "causal": tokens see themselves and what precedes them; "causal_last": all parts but the last see each
    other and nothing of the last, whose tokens see all of them, themselves and what precedes them (FlexTok's encoder).
    """
    if mode not in MODES:
        raise ValueError(f"mask={mode!r} is not known; use one of {', '.join(MODES)}")
    if mode == "full":
        return None
    return (_make if torch.compiler.is_compiling() else _made)(sizes, mode, device)


def _make(sizes: tuple[int, ...], mode: str, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a mask made while encoding serves training later
        n, before_last = sum(sizes), sum(sizes[:-1])
        mask = torch.ones(n, n, dtype=torch.bool, device=device).tril_()
        if mode == "causal_last":
            mask[:, :before_last] = True
        return mask


_made = lru_cache(maxsize=64)(_make)


def among_present(mask: Tensor | None, present: Tensor) -> Tensor:
    """`mask` (n, n), without the tokens that a sample does not have; present: (b, n) bool. Returns (b, 1, m, n).

    Rows of absent tokens attend to the present ones like any other (an empty row has no softmax); nobody reads them.
    """
    keys = present[:, None, None]
    return keys if mask is None else mask & keys
