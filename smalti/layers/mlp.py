"""The feed-forward half of a transformer block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear, exact GELU, Linear. x: (…, width)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, hidden)
        self.proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x)))


class ProjectionHead(nn.Module):
    """Features (…, width) to (…, out): norm, then `layers` linear layers with SiLU between them.

    ratio: width of the hidden layers over that of the input. As in REPA (Yu et al. 2024, arXiv:2410.06940), and in
    FlexTok's published heads, whose norm has no weights.
    """

    def __init__(
        self, width: int, out: int, *, layers: int = 3, ratio: float = 4.0, norm: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers={layers} is not positive")
        hidden = [int(ratio * width)] * (layers - 1)
        self.norm = norm
        self.layers = nn.ModuleList(
            nn.Linear(before, after, bias=bias) for before, after in zip([width, *hidden], [*hidden, out], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.norm:
            x = F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype)
        *hidden, last = self.layers
        for layer in hidden:
            x = F.silu(layer(x))
        return last(x)
