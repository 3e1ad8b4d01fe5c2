"""The feed-forward half of a transformer block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear, GELU, Linear. x: (…, width); returns (…, out), by default as wide as x.

    gelu: "none", exact, or "tanh", its approximation. dropout: behind it.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        out: int | None = None,
        *,
        bias: bool = True,
        gelu: str = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.gelu, self.dropout = gelu, dropout
        self.fc = nn.Linear(width, hidden, bias=bias)
        self.proj = nn.Linear(hidden, out or width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc(x), approximate=self.gelu)
        return self.proj(F.dropout(x, self.dropout, self.training) if self.dropout else x)


class FeedForward(nn.Module):
    """fc2(silu(fc1 x) · fc3 x), a third narrower than `ratio` says so that three matrices cost as much as two (SwiGLU,
    Shazeer 2020, arXiv:2002.05202); or, not gated, fc2(silu(fc1 x)).

    hidden: width between the two, by default what `ratio` says.
    """

    def __init__(
        self, width: int, *, gated: bool = True, ratio: float = 4.0, bias: bool = False, hidden: int | None = None
    ) -> None:
        super().__init__()
        self.gated = gated
        hidden = hidden or (int(2 * int(ratio * width) / 3) if gated else int(ratio * width))
        self.fc = nn.Linear(width, 2 * hidden if gated else hidden, bias=bias)  # fc1 over fc3
        self.proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, width)."""
        x = self.fc(x)
        if not self.gated:
            return self.proj(F.silu(x))
        x, factor = x.chunk(2, dim=-1)
        return self.proj(F.silu(x) * factor)


def llama_hidden(width: int, ratio: float = 4.0, multiple: int = 256, factor: float | None = None) -> int:
    """The hidden width of a gated `FeedForward` in Llama's models: two thirds of `ratio` · width, times `factor`,
    rounded up to a multiple."""
    hidden = int(2 * int(ratio * width) / 3)
    hidden = hidden if factor is None else int(factor * hidden)
    return -(-hidden // multiple) * multiple


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
