"""`.tok` files: every token costs log2(codebook) bits, and nothing damaged or foreign is taken for tokens."""

from __future__ import annotations

import math
import random
import re
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti import tokfile
from smalti.errors import UserError
from smalti.tokfile import TokFile, pack, payload_bytes, unpack

DOCS = Path(__file__).resolve().parents[1] / "docs"
FINGERPRINT = "00112233445566778899aabbccddeeff"
CODEBOOKS = st.sampled_from([1, 2, 3, 10, 255, 256, 257, 1000, 4096, 64_000, 2**18])


@st.composite
def tokens(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    """(k, q) indices, v, q."""
    v, q, k = draw(CODEBOOKS), draw(st.integers(1, 3)), draw(st.integers(1, 150))
    seed = draw(st.integers(0, 2**32))  # a list of hypothesis' own for each index would be slow
    rng = random.Random(seed)
    return [[rng.randrange(v) for _ in range(q)] for _ in range(k)], v, q


def read(data: bytes, v: int, q: int, most: int = 200) -> list[list[int]]:
    return TokFile.from_bytes(data, "decode=a.tok").indices(v, q, most, "decode=a.tok")


def assert_refused(data: bytes, v: int, q: int, said: str | None = None) -> None:
    with pytest.raises(UserError, match=said) as refused:
        read(data, v, q)
    message = str(refused.value)
    assert message.startswith("decode=a.tok ") and "\n" not in message and ";" in message


@given(tokens())
def test_what_is_written_is_read(case: tuple[list[list[int]], int, int]) -> None:
    indices, v, q = case
    file = TokFile.of(indices, v, FINGERPRINT)
    assert read(file.to_bytes(), v, q) == indices
    assert TokFile.from_bytes(file.to_bytes(), "") == file
    assert file.fingerprint == FINGERPRINT[:16] and file.length == len(indices)


@given(tokens())
def test_tokens_cost_log2_of_the_codebook_each_and_the_rest_17_bytes(case: tuple[list[list[int]], int, int]) -> None:
    indices, v, q = case
    file = TokFile.of(indices, v, FINGERPRINT)
    count = len(indices) * q
    assert len(file.payload) == min(size for size in range(count * 3 + 1) if 256**size >= v**count)
    assert abs(len(file.payload) - count * math.log2(v) / 8) < 1 + 1e-9
    assert len(file.to_bytes()) == len(file.payload) + (17 if len(indices) < 128 else 18)


def test_a_photo_takes_some_40_bytes() -> None:
    assert len(TokFile.of([[1]] * 16, 4096, FINGERPRINT).to_bytes()) == 41


def test_the_bytes_are_those_of_the_documentation() -> None:
    file = TokFile.of([[1], [2], [3]], 1000, FINGERPRINT).to_bytes()
    number = 1 + 2 * 1000 + 3 * 1000**2
    body = bytes.fromhex("f5746b 01 0011223344556677 03") + number.to_bytes(4, "little")
    assert file == body + zlib.crc32(body).to_bytes(4, "little")
    assert file.hex(" ") in (DOCS / "tok-format.md").read_text()


@pytest.mark.parametrize("page", ["tok-format.md", "encoding.md"])
def test_the_python_of_the_documentation_runs(page: str) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.M | re.S)
    exec(code, {})


@given(st.integers(0, 70), CODEBOOKS)
def test_all_digits_at_their_largest_just_fit(count: int, v: int) -> None:
    packed = pack([v - 1] * count, v)
    assert len(packed) == payload_bytes(count, v) and unpack(packed, count, v) == [v - 1] * count
    over = v**count
    if over < 256 ** len(packed):
        with pytest.raises(ValueError, match="larger than any"):
            unpack(over.to_bytes(len(packed), "little"), count, v)


def test_thousands_of_tokens_round_trip() -> None:
    rng = random.Random(0)
    digits = [rng.randrange(64_000) for _ in range(16_384)]
    packed = pack(digits, 64_000)
    assert len(packed) == math.ceil(16_384 * math.log2(64_000) / 8) and unpack(packed, len(digits), 64_000) == digits


def test_an_index_outside_of_the_codebook_is_not_written() -> None:
    for index in (-1, 10):
        with pytest.raises(ValueError, match="outside of 0 to 9"):
            TokFile.of([[3], [index]], 10, FINGERPRINT)
    with pytest.raises(ValueError, match="at least one"):
        TokFile.of([], 10, FINGERPRINT)


@settings(max_examples=30)
@given(tokens(), st.data())
def test_any_flipped_byte_is_refused(case: tuple[list[list[int]], int, int], data: st.DataObject) -> None:
    indices, v, q = case
    good = TokFile.of(indices, v, FINGERPRINT).to_bytes()
    place, mask = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(1, 255))
    assert_refused(bytes(byte ^ mask if at == place else byte for at, byte in enumerate(good)), v, q)


@settings(max_examples=15)
@given(tokens())
def test_every_truncation_is_refused(case: tuple[list[list[int]], int, int]) -> None:
    indices, v, q = case
    good = TokFile.of(indices, v, FINGERPRINT).to_bytes()
    for end in range(len(good)):
        assert_refused(good[:end], v, q)


@given(tokens(), st.binary(min_size=1, max_size=9))
def test_appended_bytes_are_refused(case: tuple[list[list[int]], int, int], more: bytes) -> None:
    indices, v, q = case
    assert_refused(TokFile.of(indices, v, FINGERPRINT).to_bytes() + more, v, q)


def test_of_1000_random_mutations_none_decodes_to_other_tokens() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        v, q, k = rng.choice([2, 1000, 4096, 64_000]), rng.choice([1, 1, 2]), rng.randint(1, 64)
        indices = [[rng.randrange(v) for _ in range(q)] for _ in range(k)]
        good = TokFile.of(indices, v, FINGERPRINT).to_bytes()
        bad = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(bad)) if bad else 0
            kind = rng.choice(["flip", "cut", "append", "insert", "delete", "swap", "zero"])
            if kind == "flip" and bad:
                bad[place] ^= rng.randrange(1, 256)
            elif kind == "cut":
                del bad[place:]
            elif kind == "append":
                bad += rng.randbytes(rng.randint(1, 4))
            elif kind == "insert":
                bad.insert(place, rng.randrange(256))
            elif kind == "delete":
                del bad[place : place + 1]
            elif kind == "swap" and len(bad) > 1:
                other = rng.randrange(len(bad))
                bad[place], bad[other] = bad[other], bad[place]
            elif bad:
                bad[place] = 0
        try:
            assert read(bytes(bad), v, q) == indices
        except UserError as refused:
            assert "\n" not in str(refused)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "is not a .tok file"),
        (tokfile.MAGIC, "is cut off after 3 bytes"),
        (tokfile.MAGIC + b"\x02" + bytes(40), "has version 2 of the format"),
        (tokfile.MAGIC + b"\x01" + bytes(12), "is cut off after 16 bytes"),
        (tokfile.MAGIC + b"\x01" + bytes(40), "its checksum does not fit"),
    ],
)
def test_a_foreign_file_is_refused_by_its_kind(data: bytes, said: str) -> None:
    assert_refused(data, 10, 1, said)


def test_a_file_that_was_made_to_mislead_is_refused() -> None:
    def made(head: bytes, payload: bytes) -> bytes:
        body = tokfile.MAGIC + bytes([tokfile.VERSION]) + bytes(8) + head + payload
        return body + zlib.crc32(body).to_bytes(4, "little")

    assert read(made(b"\x02", b"\x05\x00"), 256, 1) == [[5], [0]]
    for head in (b"\x00", b"\x80\x00", b"\x82\x00", b"\xff\xff\xff\xff\x7f"):
        assert_refused(made(head, b"\x05\x00"), 256, 1, "no number of tokens")
    assert_refused(made(b"\xff\xff\xff\x7f", b"\x05\x00"), 256, 1, "has 200 at most")  # at once, not after hours
    assert_refused(made(b"\x01", b"\x05\x00"), 256, 1, "2 bytes of tokens instead of 1")
    assert_refused(made(b"\x02", b"\xff\xff"), 255, 1, "larger than any")


def test_a_file_is_written_in_one_move(tmp_path: Path) -> None:
    file = TokFile.of([[1], [2]], 10, FINGERPRINT)
    assert tokfile.write(file, tmp_path / "a.tok") == len(file.to_bytes())
    assert tokfile.read(tmp_path / "a.tok", "decode=a.tok") == file
    assert [path.name for path in tmp_path.iterdir()] == ["a.tok"]


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"decode=a\.tok cannot be read \(No such file"):
        tokfile.read(tmp_path / "a.tok", "decode=a.tok")
