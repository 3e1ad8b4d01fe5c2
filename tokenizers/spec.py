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

    @property
    def bits(self) -> float | None:
        """Bits a token: q · log2 v for discrete tokens, None for continuous ones."""
        return None if self.codebook_size is None else self.depth * math.log2(self.codebook_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `TokenSpec.from_dict` reads them back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TokenSpec:
        return cls(**values)


@dataclass(frozen=True)
class Tokens:
    """Images as tokens, always padded to the full length.

    latents: (b, n, d) quantised (discrete) or sampled/mean (continuous) latents.
    lengths: (b,) int64, how many leading tokens of each sample are kept (n unless a prefix was asked for).
    indices: (b, n) int64, (b, n, q) when depth > 1; None for continuous tokens.
    """

    latents: Tensor
    lengths: Tensor
    indices: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    @classmethod
    def full(cls, latents: Tensor, indices: Tensor | None = None) -> Tokens:
        """Tokens of which every one is kept."""
        b, n = latents.shape[:2]
        return cls(latents, torch.full((b,), n, dtype=torch.int64, device=latents.device), indices)

    def prefix(self, length: int) -> Tokens:
        """The same tokens, of which only the first `length` are kept (fewer where fewer were kept before).

        Raises ValueError unless 1 ≤ length ≤ n. Decoding needs a tokenizer whose spec says `prefix_decodable`.
        """
        n = self.latents.shape[1]
        if not 1 <= length <= n:
            raise ValueError(f"a prefix of {length} tokens: these images have 1 to {n}")
        return replace(self, lengths=self.lengths.clamp(max=length))
