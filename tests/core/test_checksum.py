"""XXH3-64 at once and piece by piece."""

from __future__ import annotations

import pytest

from marble._core.checksum import Xxh3, Xxh3Name, xxh3_64
from marble.env import SystemRandom


def test_known_values() -> None:
    """As ``xxhsum -H3`` prints them."""
    assert xxh3_64(b"") == Xxh3().digest() == 0x2D06800538D394C2
    assert xxh3_64(b"a") == 0xE6C632B61E964E1F


@pytest.mark.parametrize("seed", range(5))
def test_pieces_make_the_whole(seed: int) -> None:
    random = SystemRandom(seed)
    data = bytes(random.randrange(0, 256) for _ in range(5000))
    total, at = Xxh3(), 0
    while at < len(data):
        size = random.randrange(0, 700)
        total.update(memoryview(data)[at : at + size])
        at += size
        assert total.digest() == xxh3_64(data[:at])


def test_only_bytes_are_taken() -> None:
    with pytest.raises(TypeError):
        Xxh3().update("text")  # type: ignore[arg-type]


def test_names_are_of_the_content_alone() -> None:
    """As ``xxhsum -H2`` prints them."""
    name = Xxh3Name()
    assert name.name() == "99aa06d3014798d86001c324468d497f"
    name.update(b"a")
    assert name.name() == "a96faf705af16834e6c632b61e964e1f"
    for pieces in ([b"ab", b"", b"c"], [b"abc"]):
        name = Xxh3Name()
        for piece in pieces:
            name.update(piece)
        assert name.name() == "06b05ab6733a618578af5f94892f3950"
