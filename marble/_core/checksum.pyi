"""XXH3-64. Layout, ownership and thread safety: head of ``checksum.pyx``."""

from typing_extensions import Buffer

def xxh3_64(data: Buffer, seed: int = 0) -> int:
    """XXH3-64 of the bytes of `data`, with `seed`."""
