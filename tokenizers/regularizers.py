"""How many leading tokens of an image a decoder sees in training, so that any prefix can be decoded afterwards.

Nested dropout (Rippel et al. 2014, arXiv:1402.0915) as in FlexTok (arXiv:2502.13967) and its later video release, tail
token drop as in One-D-Piece (arXiv:2501.10064), and null dropout, which hides all tokens, for guidance.

A draw is an index into a table of lengths (`keep_lengths`), of which the published code has one a mode.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from smalti.registry import Described
from smalti.tokenizers.quantizers.base import Draws

MODES = (
    "uniform",
    "powers_of_two",
    "uniform_powers_of_two",
    "zipf",
    "powers_of_two_rounded_up",
    "halvings",
    "uniform_halvings",
)


class Regularizer(nn.Module, metaclass=Described):
    """Draws keep lengths: a tokenizer trained with one is `prefix_decodable`. The tokenizer hides what is not kept."""

    @abstractmethod
    def draw(self, batch_size: int, length: int, generator: torch.Generator) -> Draws:
        """{"lengths": (b,) int64 in 1…length} on the CPU, for one training forward."""

    def check(self, length: int) -> None:
        """Raises ValueError when sequences of `length` tokens cannot be shortened this way."""


class NestedDropout(Regularizer):
    """A keep length for each sample, from a distribution that FlexTok or its video release has.

    mode: "uniform": 1…n. "powers_of_two": 1, 2, 4, …, n alike (n must be one). "uniform_powers_of_two": uniform,
    rounded up to a power of two, so that half of the samples keep all. "zipf": k with probability ∝ k^−exponent.
    "powers_of_two_rounded_up": 1, 2, 4, …, up to the first one not below n. "halvings": n, n // 2, …, 1 alike.
    "uniform_halvings": uniform, rounded up to one of those.
    """

    def __init__(self, *, mode: str = "uniform", exponent: float = 0.5) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not known; use one of {', '.join(MODES)}")
        self.mode, self.exponent = mode, exponent

    def draw(self, batch_size: int, length: int, generator: torch.Generator) -> Draws:
        lengths, chances = keep_lengths(self.mode, length), probabilities(self.mode, length, self.exponent)
        # At least one is drawn: multinomial takes no 0.
        chosen = torch.multinomial(chances, max(batch_size, 1), replacement=True, generator=generator)[:batch_size]
        return {"lengths": lengths[chosen].clamp(max=length)}  # rounding up may pass the end

    def check(self, length: int) -> None:
        keep_lengths(self.mode, length)


class TailDrop(Regularizer):
    """A keep length uniform in 1…n: one for all samples of a micro-batch, as One-D-Piece has it, or one for each.

    per: "batch" (published) or "sample", which makes the loss vary less from step to step.
    """

    def __init__(self, *, per: str = "batch") -> None:
        super().__init__()
        if per not in ("batch", "sample"):
            raise ValueError(f"per={per!r} is not known; use 'batch' (published) or 'sample'")
        self.per = per

    def draw(self, batch_size: int, length: int, generator: torch.Generator) -> Draws:
        count = 1 if self.per == "batch" else batch_size
        drawn = torch.randint(1, length + 1, (count,), generator=generator)
        return {"lengths": drawn.expand(batch_size).clone()}


def keep_lengths(mode: str, n: int) -> Tensor:
    """The lengths that a mode of `NestedDropout` can give for n tokens, (m,) int64; a draw is an index into them.

    They may exceed n where a mode rounds up. Raises ValueError for an n that the mode does not take.
    """
    if mode in ("uniform", "zipf"):
        return torch.arange(1, n + 1)
    if mode == "powers_of_two":
        if n & (n - 1):
            below = 1 << (n.bit_length() - 1)
            raise ValueError(
                f"mode=powers_of_two with {n} tokens, no power of two; use {below} or {2 * below} tokens, or "
                "mode=powers_of_two_rounded_up"
            )
        return 2 ** torch.arange(n.bit_length())
    if mode == "powers_of_two_rounded_up":
        return 2 ** torch.arange((n - 1).bit_length() + 1)
    if mode == "uniform_powers_of_two":
        return torch.tensor([1 << (k - 1).bit_length() for k in range(1, n + 1)])
    if mode == "halvings":
        return torch.tensor([n >> i for i in range(n.bit_length())])
    # "uniform_halvings": the smallest halving that is not below k
    return torch.tensor([n >> ((n // k).bit_length() - 1) for k in range(1, n + 1)])


def probabilities(mode: str, n: int, exponent: float = 0.5) -> Tensor:
    """How likely each of `keep_lengths(mode, n)` is, (m,) float64: all alike, but for mode "zipf"."""
    lengths = keep_lengths(mode, n).double()
    weights = lengths**-exponent if mode == "zipf" else torch.ones_like(lengths)
    return weights / weights.sum()


def draw_null(batch_size: int, probability: float, generator: torch.Generator) -> Tensor:
    """(b,) bool on the CPU: samples of which a decoder sees no token at all, so that guidance has its other side."""
    return torch.rand(batch_size, generator=generator) < probability


def kept_mask(lengths: Tensor, n: int, device: torch.device) -> Tensor:
    """(b, n) bool on `device`, true at the first `lengths` (b,) of n positions. A length may be 0, or exceed n."""
    return torch.arange(n, device=device) < lengths.to(device, non_blocking=True)[:, None]


def hide(tokens: Tensor, lengths: Tensor, vector: Tensor) -> Tensor:
    """Tokens (b, n, d) with `vector` (d,) at every position from `lengths` (b,) on; no gradient reaches what it hides.

    lengths: on any device; 0 hides all tokens, more than n hides none.
    """
    return torch.where(kept_mask(lengths, tokens.shape[1], tokens.device)[..., None], tokens, vector.to(tokens.dtype))
