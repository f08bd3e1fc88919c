"""Clocks of simulated nodes: none shows the time, and all differ.

Rule 1: the monotonic clock of a node runs at its own rate, within the drift that the plan allows; it never goes back or jumps. That much
        leases may count on, and nothing else.
Rule 2: the wall clock is the monotonic one and an offset that jumps. Nothing that must be safe may depend on it.
"""

from __future__ import annotations

from typing import Final

from marble.testing.loop import SECOND, Loop

_EPOCH_US: Final = 1_700_000_000 * SECOND


class SimulatedClock:
    """A `marble.env.Clock` of one node. It outlives the node's crashes, as a real machine's does nearly enough.

    Parameters
    ----------
    loop
        Virtual time.
    drift
        The rate is drawn from 1 - drift to 1 + drift.
    """

    __slots__ = ("_loop", "_offset_us", "rate")

    def __init__(self, loop: Loop, drift: float) -> None:
        self._loop = loop
        self.rate = 1 + drift * (2 * loop.random.random() - 1)
        self._offset_us = _EPOCH_US + loop.between(-SECOND, SECOND)

    def monotonic(self) -> float:
        """Seconds on this node's clock."""
        return self._loop.now * self.rate / SECOND

    def monotonic_us(self) -> int:
        """The same in whole microseconds."""
        return int(self._loop.now * self.rate)

    def wall_us(self) -> int:
        """Microseconds since 1970, as far as this node knows."""
        return int(self._loop.now * self.rate) + self._offset_us

    def jump(self, by_us: int) -> None:
        """Somebody, or NTP, sets the wall clock."""
        self._offset_us += by_us

    def lasts(self, own_us: int) -> int:
        """How long, in virtual time, `own_us` on this clock take."""
        return max(1, int(own_us / self.rate))
