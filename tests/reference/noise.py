"""Bytes that no codec makes shorter, the same ones each time."""

from __future__ import annotations

import random


def noise(size: int) -> bytes:
    return random.Random(1).randbytes(size)
