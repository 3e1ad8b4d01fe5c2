"""What a tokenizer promises (`TokenSpec`) and what it gives (`Tokens`): the contract with generators and evaluators."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSpec:
    """The shape and meaning of a tokenizer's tokens.

    kind: "discrete" (indices into a codebook) or "continuous" (latents).
    length: n, tokens of a full sequence. codebook_size: v (discrete only). depth: q, codes a token.
    dim: d, channels of one latent token. grid: (h, w) of raster-ordered tokens, None for 1-D ones.
    prefix_decodable: whether the first k tokens alone can be decoded. image_size: side in pixels.
    condition: what `decode` needs beside tokens, "none" or "text".
    levels: (v,) the numbers that codes stand for where each of a token's q = d codes is one channel, brought to mean 0
    and deviation 1 (BridgedTokenizer), and order: (q,) which channel each is; None: codes are anything else.
    """

    kind: str
    length: int
    dim: int
    image_size: int
    codebook_size: int | None = None
    depth: int = 1
    grid: tuple[int, int] | None = None
    prefix_decodable: bool = False
    condition: str = "none"
    levels: tuple[float, ...] | None = None
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("discrete", "continuous"):
            raise ValueError(f"kind={self.kind!r}: use 'discrete' or 'continuous'")
        if (self.kind == "discrete") != (self.codebook_size is not None):
            raise ValueError(f"kind={self.kind} with codebook_size={self.codebook_size}: only discrete tokens have one")
        if self.condition not in ("none", "text"):
            raise ValueError(f"condition={self.condition!r}: use 'none' or 'text'")
        if self.grid is not None:
            object.__setattr__(self, "grid", tuple(self.grid))
            if math.prod(self.grid) != self.length:
                raise ValueError(f"grid={self.grid} does not hold length={self.length} tokens")
        if self.levels is not None:
            object.__setattr__(self, "levels", tuple(self.levels))
            object.__setattr__(self, "order", tuple(range(self.dim) if self.order is None else self.order))
            if len(self.levels) != self.codebook_size or not self.depth == self.dim == len(self.order or ()):
                raise ValueError(
                    f"{len(self.levels)} levels of codebook_size={self.codebook_size}, depth={self.depth} of "
                    f"dim={self.dim}, order={self.order}: give one level a code, and one code a channel"
                )

    @property
    def bits(self) -> float | None:
        """Bits a token: q · log2 v for discrete tokens, None for continuous ones."""
        return None if self.codebook_size is None else self.depth * math.log2(self.codebook_size)

    def words(self, length: int | None = None) -> str:
        """Number (None: all) and kind of the tokens, for messages."""
        length = self.length if length is None else length
        if self.codebook_size is None:
            return f"{length} continuous tokens of {self.dim} channels"
        return f"{length} tokens of {'' if self.depth == 1 else f'{self.depth} × '}{self.codebook_size:,} codes"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `TokenSpec.from_dict` reads them back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TokenSpec:
        return cls(**values)


@dataclass(frozen=True)
class Tokens:
    """Images as tokens, always padded to the full length.

    latents: (b, n, d) quantised (discrete) or sampled/mean (continuous) latents; None for discrete tokens that no
    tokenizer looked up yet, such as a generator's.
    lengths: (b,) int64, how many leading tokens of each sample are kept (n unless a prefix was asked for).
    indices: (b, n) int64, (b, n, q) when depth > 1; None for continuous tokens.
    """

    latents: Tensor | None
    lengths: Tensor
    indices: Tensor | None = None

    def __post_init__(self) -> None:
        if self.latents is None and self.indices is None:
            raise ValueError("tokens without latents and without indices")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: slice | Tensor) -> Tokens:
        """The tokens of some of the images."""
        latents, indices = (None if part is None else part[rows] for part in (self.latents, self.indices))
        return Tokens(latents, self.lengths[rows], indices)

    @property
    def values(self) -> Tensor:
        """What they are written as: indices of discrete tokens, latents of continuous ones."""
        values = self.latents if self.indices is None else self.indices
        assert values is not None
        return values

    @classmethod
    def full(cls, latents: Tensor | None, indices: Tensor | None = None) -> Tokens:
        """Tokens of which every one is kept."""
        one = latents if indices is None else indices
        if one is None:
            raise ValueError("tokens without latents and without indices")
        b, n = one.shape[:2]
        return cls(latents, torch.full((b,), n, dtype=torch.int64, device=one.device), indices)

    def prefix(self, length: int) -> Tokens:
        """The same tokens, of which only the first `length` are kept (fewer where fewer were kept before).

        Raises ValueError unless 1 ≤ length ≤ n. Decoding needs a tokenizer whose spec says `prefix_decodable`.
        """
        n = self.values.shape[1]
        if not 1 <= length <= n:
            raise ValueError(f"a prefix of {length} tokens: these images have 1 to {n}")
        return replace(self, lengths=self.lengths.clamp(max=length))
