"""Counts of what happens inside a node, for status pages and tests.

A `Metrics` hands out one instrument per name; the same name gives the same instrument. All of it may be used from any
thread. Nothing here has a clock: whoever measures a duration passes the seconds in.
"""

from __future__ import annotations

import math
import threading
from typing import Final, TypeVar

from marble.errors import UsageError

_STEPS_PER_OCTAVE: Final = 4


class Counter:
    """A number that only grows."""

    __slots__ = ("_lock", "_value")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value = 0

    def add(self, amount: int = 1) -> None:
        """Grow by `amount`, which is not negative."""
        if amount < 0:
            raise UsageError(f"a counter cannot grow by {amount}")
        with self._lock:
            self._value += amount

    @property
    def value(self) -> int:
        return self._value

    def snapshot(self) -> int:
        return self._value


class Gauge:
    """A number as it is now."""

    __slots__ = ("_lock", "_value")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value = 0.0

    def set(self, value: float) -> None:
        with self._lock:
            self._value = value

    def add(self, amount: float) -> None:
        with self._lock:
            self._value += amount

    @property
    def value(self) -> float:
        return self._value

    def snapshot(self) -> float:
        return self._value


class Histogram:
    """How values are spread, in buckets four to an octave: quantiles are right to about a fifth.

    - Bounded: at most one bucket per quarter octave of a double, however many values come.
    """

    __slots__ = ("_buckets", "_count", "_lock", "_max", "_min", "_sum")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buckets: dict[int, int] = {}
        self._count = 0
        self._sum = 0.0
        self._min = math.inf
        self._max = -math.inf

    def observe(self, value: float) -> None:
        """Take one finite value in; what is not above zero counts as the smallest."""
        if not math.isfinite(value):
            raise UsageError(f"{value} cannot be counted in a histogram")
        bucket = math.floor(math.log2(value) * _STEPS_PER_OCTAVE) if value > 0 else -(2**31)
        with self._lock:
            self._buckets[bucket] = self._buckets.get(bucket, 0) + 1
            self._count += 1
            self._sum += value
            self._min = min(self._min, value)
            self._max = max(self._max, value)

    def snapshot(self) -> dict[str, float]:
        """``count``, ``sum`` and, unless empty, ``min``, ``max``, ``p50``, ``p99`` (upper ends of their buckets)."""
        with self._lock:
            if self._count == 0:
                return {"count": 0, "sum": 0.0}
            spread = {"count": self._count, "sum": self._sum, "min": self._min, "max": self._max}
            return spread | {"p50": self._quantile(0.50), "p99": self._quantile(0.99)}

    def _quantile(self, share: float) -> float:
        rank = math.ceil(share * self._count)
        for bucket in sorted(self._buckets):
            rank -= self._buckets[bucket]
            if rank <= 0:
                return max(self._min, min(self._max, math.exp2((bucket + 1) / _STEPS_PER_OCTAVE)))
        return self._max


Instrument = Counter | Gauge | Histogram
_Kind = TypeVar("_Kind", Counter, Gauge, Histogram)


class Metrics:
    """All instruments of one node, by name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._instruments: dict[str, Instrument] = {}

    def counter(self, name: str) -> Counter:
        """The counter `name`, made at the first call. Raises UsageError if the name is of another kind."""
        return self._get(name, Counter)

    def gauge(self, name: str) -> Gauge:
        """The gauge `name`, likewise."""
        return self._get(name, Gauge)

    def histogram(self, name: str) -> Histogram:
        """The histogram `name`, likewise."""
        return self._get(name, Histogram)

    def snapshot(self) -> dict[str, float | dict[str, float]]:
        """Every instrument's value by name, in the order of names."""
        with self._lock:
            instruments = sorted(self._instruments.items())
        return {name: instrument.snapshot() for name, instrument in instruments}

    def _get(self, name: str, kind: type[_Kind]) -> _Kind:
        with self._lock:
            instrument = self._instruments.setdefault(name, kind())
        if not isinstance(instrument, kind):
            raise UsageError(f"{name!r} is a {type(instrument).__name__}, not a {kind.__name__}")
        return instrument
