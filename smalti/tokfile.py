"""`.tok`: the tokens of one image in as few bytes as they can take, and 17 more. Byte by byte: docs/tok-format.md.

    F5 74 6B   magic
    01         version
    8 bytes    the first half of the tokenizer's fingerprint, which implies image size, codebook size and depth
    varint     k, the tokens kept
    payload    the k·q indices as one number in base v, little-endian: exactly ⌈k·q·log2(v) / 8⌉ bytes
    4 bytes    CRC-32 of all that precedes, little-endian

No torch here: a damaged or foreign file is refused before a model is loaded.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smalti.errors import UserError

SUFFIX = ".tok"
MAGIC = b"\xf5tk"  # F5 occurs in no UTF-8 text
VERSION = 1
FINGERPRINT_BYTES, CHECKSUM_BYTES = 8, 4
LONGEST_VARINT = 4  # 7 bits a byte: up to 2²⁸ - 1 tokens


@dataclass(frozen=True)
class TokFile:
    """What a file holds. Which indices the payload stands for, only its tokenizer's codebook says.

    fingerprint: 16 hex digits, the first half of the tokenizer's. length: k ≥ 1, the tokens kept. payload: see `pack`.
    """

    fingerprint: str
    length: int
    payload: bytes

    @classmethod
    def of(cls, indices: Sequence[Sequence[int]], codebook_size: int, fingerprint: str) -> TokFile:
        """indices: (k, q) in [0, v). fingerprint: of the tokenizer, 32 hex digits. Raises ValueError for no token."""
        if not indices:
            raise ValueError("a .tok file holds at least one token")
        digits = [index for token in indices for index in token]
        return cls(shortened(fingerprint), len(indices), pack(digits, codebook_size))

    def indices(self, codebook_size: int, depth: int, most: int, name: str) -> list[list[int]]:
        """(k, q) indices in [0, v). most: n, the tokens of a full sequence. `name` is the file's in messages.

        Raises UserError for more tokens than that, another number of bytes, and a number that k tokens do not give.
        """
        count = self.length * depth
        try:
            if self.length > most:
                raise ValueError(f"an image has {most} at most")
            digits = unpack(self.payload, count, codebook_size)
        except ValueError as error:
            raise UserError(
                f"{name} does not hold {self.length} tokens of this tokenizer: {error}; {_AGAIN}"
            ) from error
        return [digits[start : start + depth] for start in range(0, count, depth)]

    def to_bytes(self) -> bytes:
        head = MAGIC + bytes([VERSION]) + bytes.fromhex(self.fingerprint) + _varint(self.length)
        body = head + self.payload
        return body + zlib.crc32(body).to_bytes(CHECKSUM_BYTES, "little")

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> TokFile:
        """The inverse of `to_bytes`. `name` is the file's in messages. Raises UserError for anything else.

        A CRC-32 differs for any change within 32 consecutive bits, so for any one byte; of other changes it misses one
        in 2³². Bytes that are missing or too many are found by `indices`, too, which knows how many there must be.
        """
        if not data.startswith(MAGIC):
            why = "is empty" if not data else "is not a .tok file: it does not begin with F5 74 6B"
            raise UserError(f"{name} {why}; give a file that encode.py wrote")
        if len(data) > len(MAGIC) and data[len(MAGIC)] != VERSION:
            raise UserError(
                f"{name} has version {data[len(MAGIC)]} of the format, or is damaged; this smalti reads version "
                f"{VERSION}: use a newer one, or copy the file again"
            )
        body, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
        start = len(MAGIC) + 1 + FINGERPRINT_BYTES
        if len(body) <= start:
            raise UserError(f"{name} is cut off after {len(data)} bytes; {_AGAIN}")
        if zlib.crc32(body) != int.from_bytes(checksum, "little"):
            raise UserError(f"{name} is damaged: its checksum does not fit, it was cut off or changed; {_AGAIN}")
        try:
            length, end = _read_varint(body, start)
        except ValueError as error:
            raise UserError(f"{name} is damaged: {error}; {_AGAIN}") from error
        return cls(body[len(MAGIC) + 1 : start].hex(), length, body[end:])


_AGAIN = "copy it again, or encode the image again"


def read(path: Path, name: str) -> TokFile:
    """The file at `path`; `name` is what messages call it, such as `decode=photo.tok`. Raises UserError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); check the path and its permissions") from error
    return TokFile.from_bytes(data, name)


def write(file: TokFile, path: Path) -> int:
    """Write under a temporary name, then rename. Returns the number of bytes. Raises OSError."""
    data = file.to_bytes()
    partial = path.with_name(path.name + ".tmp")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return len(data)


def shortened(fingerprint: str) -> str:
    """The part of a tokenizer's fingerprint that files hold: 16 hex digits."""
    return fingerprint[: 2 * FINGERPRINT_BYTES]


def payload_bytes(count: int, codebook_size: int) -> int:
    """⌈count·log2(v) / 8⌉, in whole numbers: the bytes of the largest number of `count` digits in base v."""
    return ((codebook_size**count - 1).bit_length() + 7) // 8


def pack(digits: Sequence[int], codebook_size: int) -> bytes:
    """Σ digit i · vⁱ, little-endian, in `payload_bytes` bytes. Raises ValueError for a digit outside of [0, v)."""
    if digits and not 0 <= min(digits) <= max(digits) < codebook_size:
        raise ValueError(f"an index outside of 0 to {codebook_size - 1}")
    # Neighbours are joined pairwise: 4,096 digits take 12 multiplications of a size instead of 4,096 long ones.
    numbers, radix = list(digits) or [0], codebook_size
    while len(numbers) > 1:
        if len(numbers) % 2:
            numbers.append(0)
        numbers = [low + high * radix for low, high in zip(numbers[::2], numbers[1::2], strict=True)]
        radix *= radix
    return numbers[0].to_bytes(payload_bytes(len(digits), codebook_size), "little")


def unpack(payload: bytes, count: int, codebook_size: int) -> list[int]:
    """The inverse of `pack`: `count` digits in [0, v). Raises ValueError for bytes that `pack` does not give."""
    if len(payload) != (needed := payload_bytes(count, codebook_size)):
        raise ValueError(f"{len(payload)} bytes of tokens instead of {needed}")
    number = int.from_bytes(payload, "little")
    if number >= codebook_size**count:
        raise ValueError("its number is larger than any of these tokens")
    radices = [codebook_size]
    while 2 ** len(radices) < count:
        radices.append(radices[-1] ** 2)
    blocks = [number]
    for radix in reversed(radices):
        blocks = [part for block in blocks for part in reversed(divmod(block, radix))]
    return blocks[:count]


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the high bit says that more follow (LEB128)."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _read_varint(data: bytes, start: int) -> tuple[int, int]:
    """A number ≥ 1 and where it ends. Raises ValueError unless `_varint` writes it so."""
    number = 0
    for place, byte in enumerate(data[start : start + LONGEST_VARINT]):
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            if byte == 0:
                break
            return number, start + place + 1
    raise ValueError("no number of tokens stands behind its fingerprint")
