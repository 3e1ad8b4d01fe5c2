"""What convolutional tokenizers share."""

from __future__ import annotations

from torch import nn


def group_norm(channels: int, groups: int = 32) -> nn.GroupNorm:
    """Over `groups` groups of channels, eps 1e-6, as VQGAN's networks have it; raises ValueError where they do not
    divide the channels."""
    if channels % groups:
        raise ValueError(
            f"{channels} channels cannot be normalised in {groups} groups; make channels a multiple of {groups}"
        )
    return nn.GroupNorm(groups, channels, eps=1e-6)
