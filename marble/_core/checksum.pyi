"""XXH3. Layout, ownership and thread safety: head of ``checksum.pyx``."""

from typing import final

from typing_extensions import Buffer

def xxh3_64(data: Buffer, seed: int = 0) -> int:
    """XXH3-64 of the bytes of `data`, with `seed`."""

@final
class Xxh3:
    """XXH3-64 of bytes that come piece by piece. One thread at a time."""

    def update(self, data: Buffer) -> None:
        """Take in the bytes of `data`, behind all before them."""
    def digest(self) -> int:
        """`xxh3_64` of everything so far; more may follow."""

@final
class Xxh3Name:
    """XXH3-128 of bytes that come piece by piece: a name that no other content has. One thread at a time."""

    def update(self, data: Buffer) -> None:
        """Take in the bytes of `data`, behind all before them."""
    def name(self) -> str:
        """The hash of everything so far as 32 hexadecimal digits; more may follow."""
