"""Bytes that are nearly right: what valid ones become when they are flipped, cut, spliced, lengthened, or made to lie.

Rule 1: a change is a value (`Change`), so that what found something can be written down, repeated, and made smaller.
Rule 2: the result never has more than `BYTES_MAX` bytes, whatever the changes are.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

BYTES_MAX = 64 * 1024

INTERESTING = (
    0,
    1,
    2,
    3,
    7,
    8,
    63,
    64,
    65,
    127,
    128,
    255,
    256,
    0x7FFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
"""Lengths, offsets and counts that programs get wrong."""

WORDS = (
    *(
        b"null",
        b"true",
        b"-1",
        b"0",
        b"1e999",
        b"NaN",
        b"1.5",
        b'""',
        b"[]",
        b"{}",
        b'"\\ud800"',
        b'"\\u0000"',
        b'"../../x"',
    ),
    *(b"99999999999999999999", b"[" * 3000, b'{"a":' * 2000, b"9" * 5000, b"\xff\xfe", b"\xed\xa0\x80", b"A" * 300),
)
"""Tokens for what is text: JSON, TOML, addresses."""

_TOKEN = re.compile(rb'"[^"\n]*"|[-\w.]+|[\[\]{}]')
KINDS = ("flip", "byte", "number", "cut", "drop", "repeat", "insert", "splice", "token", "copy")


@dataclass(frozen=True)
class Change:
    """One change: of one of `KINDS`, at this part of the length (0 to 2**16), with two numbers that it uses as it likes."""

    kind: str
    place: int
    one: int
    two: int

    @staticmethod
    def drawn(chance: random.Random) -> Change:
        return Change(chance.choice(KINDS), chance.randrange(2**16), chance.randrange(2**16), chance.randrange(2**16))


def changed(data: bytes, changes: Sequence[Change], others: Sequence[bytes]) -> bytes:
    """`data` after all of `changes`; `others` are valid, too, and lend parts."""
    for change in changes:
        data = _change(data, change, others)[:BYTES_MAX]
    return data


def _change(data: bytes, change: Change, others: Sequence[bytes]) -> bytes:
    at = change.place * len(data) // 2**16
    if change.kind == "insert":
        word = WORDS[change.one % len(WORDS)] if change.two % 2 else bytes([change.one % 256]) * (change.two % 200)
        return data[:at] + word + data[at:]
    if change.kind == "splice":
        other = others[change.one % len(others)]
        start = change.two * len(other) // 2**16
        return data[:at] + other[start:]
    if not data:
        return bytes([change.one % 256])
    if change.kind == "flip":
        return _put(data, at, bytes([data[at] ^ 1 << change.one % 8]))
    if change.kind == "byte":
        return _put(data, at, bytes([change.one % 256]))
    if change.kind == "number":
        width = ("<B", "<H", "<I", "<Q")[change.one % 4]
        size = struct.calcsize(width)
        # Numbers stand at multiples of their size, mostly.
        at -= at % size if change.one % 8 < 6 else 0
        number = INTERESTING[change.two % len(INTERESTING)]
        if change.two % 3 == 0 and at + size <= len(data):
            number = struct.unpack_from(width, data, at)[0] + change.two % 7 - 3
        return _put(data, at, struct.pack(width, number % 2 ** (8 * size)))
    if change.kind == "cut":
        return data[:at]
    end = min(len(data), at + 1 + change.one % 100)
    if change.kind == "drop":
        return data[:at] + data[end:]
    if change.kind == "repeat":
        return data[:end] + data[at:end] * (1 + change.two % 20) + data[end:]
    if change.kind == "copy":
        target = change.two * len(data) // 2**16
        return _put(data, target, data[at:end])
    tokens = list(_TOKEN.finditer(data))
    if not tokens:
        return data
    token = tokens[change.place * len(tokens) // 2**16]
    word = WORDS[change.one % len(WORDS)] if change.two % 4 else tokens[change.two % len(tokens)][0]
    return data[: token.start()] + word + data[token.end() :]


def _put(data: bytes, at: int, piece: bytes) -> bytes:
    return (data[:at] + piece + data[at + len(piece) :])[: max(len(data), at + len(piece))]
