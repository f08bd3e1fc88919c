"""Whether the peer answers on a stream, and how fast: empty packets that it gives back, and the time between.

Only the peer's own process can give one back. TCP, and gRPC's keepalive, answer for a process that is stopped or hangs.

Rule 1: an answer belongs to the oldest packet without one: a stream keeps the order.
Rule 2: late is later than `patience_s` and than round trips on this way ever need (RFC 6298's timeout): a long way is no dead one.
A process that stands still for a moment is late on all its ways, so who has several asks for a proof that it does not: it has
given back, on another way, what was sent later.
Overdue is much later than that: not even a busy peer needs so long.

Invariants:
- At most `UNANSWERED_MAX` packets are out; while there are so many no more are due.
- Times are the caller's monotonic seconds. Thread-safe.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from typing import Final

UNANSWERED_MAX: Final = 8

LATEST: Final = 8

OVERDUE_FACTOR: Final = 4.0
"""What is overdue takes so many times as long as what is late. Processes on a busy machine answer unevenly."""


class Pulse:
    """That of one stream at a time.

    Parameters
    ----------
    interval_s
        Between two packets that are to be given back.
    patience_s
        An answer that takes longer, and longer than usual, is late.
    """

    def __init__(self, interval_s: float, patience_s: float) -> None:
        self._interval_s = interval_s
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._out: deque[float] = deque()
        self._next_at: float | None = None
        self._smoothed_s: float | None = None
        self._latest: deque[float] = deque(maxlen=LATEST)
        self._variation_s = 0.0
        self._proved_at = -math.inf

    @property
    def proved_at(self) -> float:
        """When the latest packet that came back was sent, on any stream: then, at least, the peer's process was there."""
        return self._proved_at

    @property
    def round_trip_s(self) -> float | None:
        """Smoothed, as TCP does it; of earlier streams, too. None before the first answer."""
        return self._smoothed_s

    @property
    def least_s(self) -> float:
        """The shortest of the latest `LATEST` round trips, in seconds; 0 before there are so many. What TCP had to send again is
        not what the way takes.
        """
        with self._lock:
            return min(self._latest) if len(self._latest) == LATEST else 0.0

    def begin(self, now: float) -> None:
        """A stream has opened, at whose other end is somebody who gives packets back."""
        with self._lock:
            self._out.clear()
            self._next_at = now

    def end(self) -> None:
        """It is gone: nothing is expected."""
        with self._lock:
            self._out.clear()
            self._next_at = None

    def due_in(self, now: float) -> float | None:
        """Seconds until the next packet; 0 if it is due, None if none will be."""
        with self._lock:
            if self._next_at is None:
                return None
            return self._interval_s if len(self._out) >= UNANSWERED_MAX else max(0.0, self._next_at - now)

    def sent(self, now: float) -> None:
        """A packet is being written."""
        with self._lock:
            if self._next_at is not None:
                self._out.append(now)
                self._next_at = now + self._interval_s

    def answered(self, now: float) -> float | None:
        """A packet came back: its round trip in seconds, or None if none is out."""
        with self._lock:
            if not self._out:
                return None
            self._proved_at = self._out.popleft()
            taken_s = now - self._proved_at
            self._latest.append(taken_s)
            if self._smoothed_s is None:
                self._smoothed_s, self._variation_s = taken_s, taken_s / 2
            else:
                self._variation_s += (abs(self._smoothed_s - taken_s) - self._variation_s) / 4
                self._smoothed_s += (taken_s - self._smoothed_s) / 8
            return taken_s

    def waited_s(self, now: float) -> float:
        """How long the oldest packet has waited for its answer."""
        # Without the lock, for senders ask this with each message: whoever takes the packet away answers it.
        try:
            return now - self._out[0]
        except IndexError:
            return 0.0

    def late(self, now: float, proof_at: float = math.inf) -> bool:
        """Whether an answer takes longer than it ever should, though at `proof_at`, seconds, the peer's process was there."""
        waited_s = self.waited_s(now)
        return waited_s > max(self._patience_s, self._usual_s) and now - waited_s < proof_at

    def overdue(self, now: float, least_s: float, most_s: float) -> bool:
        """Whether an answer takes so long that none is to be expected on this stream: `least_s` to `most_s` seconds, by what is
        usual on this way.
        """
        return self.waited_s(now) > min(max(least_s, OVERDUE_FACTOR * self._usual_s), most_s)

    @property
    def _usual_s(self) -> float:
        return 0.0 if self._smoothed_s is None else self._smoothed_s + 4 * self._variation_s
