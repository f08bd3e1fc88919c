"""A clock that goes when a test says so."""

from __future__ import annotations


class HandClock:
    """A `marble.env.Clock` that stands at `now`, in seconds, until somebody sets it."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now

    def wall_us(self) -> int:
        return 0
