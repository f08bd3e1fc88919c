"""How fast files are written beside the log.

The pace spares the log's syncs on the same disk. It is for quiet times: the more waits to be written, the less it holds back, since
writers who are refused have lost more than those who wait for a slower sync.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from marble.errors import UnavailableError

UNHURRIED: Final = 1 / 8
"""Up to this part of what may wait at most, files are written at the pace that is set."""

UNBRIDLED: Final = 3 / 8
"""From this part on they are written as fast as the disk takes them. Between the two, the pauses shrink evenly."""


class Pacer:
    """Makes who writes files wait: a `marble.machine.Pace`. Any thread.

    Parameters
    ----------
    bytes_per_s
        How fast files are written at most, in quiet times.
    pressure
        How much waits to be written, as a part of what may wait before writers are refused.
    stopped
        Set when the node stops: ends all waiting.
    """

    def __init__(self, bytes_per_s: int, pressure: Callable[[], float], stopped: threading.Event) -> None:
        self._bytes_per_s = bytes_per_s
        self._pressure = pressure
        self._stopped = stopped

    def pause_s(self, nbytes: int) -> float:
        """How long to wait after `nbytes` were written."""
        hurry = (self._pressure() - UNHURRIED) / (UNBRIDLED - UNHURRIED)
        return nbytes / self._bytes_per_s * (1 - min(1.0, max(0.0, hurry)))

    def __call__(self, nbytes: int) -> None:
        """Wait until more than `nbytes` may be written. Raises UnavailableError if the node stops."""
        if self._stopped.wait(self.pause_s(nbytes)):
            raise UnavailableError("the node stops")
