"""The numbers of tokens at which an image is looked at, 1, 2, 4, … and all of them, and how many bytes these take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from smalti.errors import UserError, did_you_mean
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.spec import Tokens, TokenSpec


def lengths_of(n: int) -> list[int]:
    """1, 2, 4, … as far as n tokens go, and n itself: [1, 2, 4, 6] for 6. Raises ValueError below 1."""
    if n < 1:
        raise ValueError(f"{n} tokens have no prefix")
    return sorted({*(2**power for power in range(n.bit_length())), n})


def chosen_lengths(
    given: int | str | Sequence[int] | None, spec: TokenSpec, key: str = "lengths", every: str = "all"
) -> list[int]:
    """What a config asks for, as rising numbers of tokens, each once.

    given: null (the full length only), a number, a list of numbers, or the word `every` (`lengths_of` all tokens). key:
    its place in the config, for messages. Raises UserError for lengths that these tokens do not have or cannot be
    decoded at.
    """
    n = spec.length
    if given is None:
        return [n]
    if isinstance(given, str) and given != every:
        hint = did_you_mean(given, [every]) or ";"
        raise UserError(f"{key}={given} is unknown{hint} use {every}, or a list such as [1,2,{n}]")
    asked = lengths_of(n) if isinstance(given, str) else [given] if isinstance(given, int) else list(given)
    shown = given if isinstance(given, str) else f"[{','.join(map(str, asked))}]"
    if not asked:
        raise UserError(f"{key}=[] names no length; use {every}, or a list such as [1,2,{n}]")
    for length in asked:
        if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= n:
            raise UserError(f"{key}={shown}: {length} is not a number of tokens; this tokenizer has 1 to {n} an image")
    if not spec.prefix_decodable and set(asked) != {n}:
        raise UserError(
            f"{key}={shown}, but this tokenizer decodes all of its {n} tokens only: it was trained without "
            f"tokenizer/regularizer=nested_dropout or tail_drop; use {key}=null"
        )
    return sorted(set(asked))


def decode_prefixes(
    tokenizer: Tokenizer, tokens: Tokens, lengths: Sequence[int], *, seed: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """(k, images (b, 3, h, w) in [0, 1]) for each of `lengths`: one encoding, and the same `seed`, so that images of
    decoders that sample differ by their tokens alone. One length is in memory at a time.
    """
    for length in lengths:
        yield length, tokenizer.decode(tokens.prefix(length), seed=seed)


def bits_of(spec: TokenSpec, length: int) -> float | None:
    """Bits of `length` tokens as codes of fixed length, None for continuous tokens."""
    return None if spec.bits is None else length * spec.bits


def bytes_of(spec: TokenSpec, length: int) -> int | None:
    """The fewest whole bytes that hold `length` tokens, packed as one number; None for continuous tokens."""
    if spec.codebook_size is None:
        return None
    return ((spec.codebook_size ** (spec.depth * length) - 1).bit_length() + 7) // 8
