"""Counts of what happens inside a node, for status pages and tests.

A `Metrics` hands out one instrument per name and labels; the same ones give the same instrument. All of it may be used from
any thread. Nothing here has a clock: whoever measures a duration passes the seconds in.

Rule 1: whoever counts often asks for the instrument once and keeps it. A count is then a lock and an addition, whatever the
labels: ``sent = metrics.counter("transport_messages_sent", peer=2)`` when a peer comes, ``sent.add()`` per message.
Rule 2: labels come from a small set that no stranger can enlarge. Beyond `LABELS_MAX` they share one instrument, "other".
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, TypeVar

from marble.errors import UsageError

LABELS_MAX: Final = 256
"""Instruments of one name that differ by their labels: more than eight for each of the largest cluster's nodes."""

OTHER: Final = "other"
"""The label of all that came after `LABELS_MAX`."""

_STEPS: Final = (1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.3, 3.9, 4.7, 5.6, 6.8, 8.2)
EDGES: Final = tuple(float(f"{step}e{decade}") for decade in range(-7, 13) for step in _STEPS)
"""Upper ends, inclusive, of a histogram's buckets: twelve to a decade, from a tenth of a microsecond to a terabyte."""

Labels = tuple[tuple[str, str], ...]
"""Names and values of labels, in the order of names."""


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


class Spread(NamedTuple):
    """What a histogram has taken in: ``counts[i]`` values were at most ``EDGES[i]`` and above the edge before it; the last
    entry counts those above all edges.

    Spreads of the same histogram can be subtracted (what came in between), those of different ones added.
    """

    counts: tuple[int, ...]
    sum: float

    @property
    def total(self) -> int:
        """How many values."""
        return sum(self.counts)

    def __sub__(self, older: Spread) -> Spread:
        return Spread(tuple(n - o for n, o in zip(self.counts, older.counts, strict=True)), self.sum - older.sum)

    def __or__(self, other: Spread) -> Spread:
        return Spread(tuple(n + o for n, o in zip(self.counts, other.counts, strict=True)), self.sum + other.sum)

    def quantile(self, share: float) -> float:
        """The upper end of the bucket that holds the value at `share` (0 to 1); 0.0 if there are none."""
        rank = math.ceil(share * self.total)
        for slot, count in enumerate(self.counts):
            rank -= count
            if count and rank <= 0:
                return EDGES[min(slot, len(EDGES) - 1)]
        return 0.0

    def buckets(self) -> dict[str, int]:
        """The buckets that are not empty, by their places: for JSON. See `spread_of`."""
        return {str(slot): count for slot, count in enumerate(self.counts) if count}


NOTHING: Final = Spread((0,) * (len(EDGES) + 1), 0.0)
"""No values."""


def spread_of(snapshot: object) -> Spread:
    """The spread in what `Histogram.snapshot` gave, perhaps in another process; what is not that counts as empty."""
    if not isinstance(snapshot, Mapping) or not isinstance(snapshot.get("buckets"), Mapping):
        return NOTHING
    counts = list(NOTHING.counts)
    for slot, count in snapshot["buckets"].items():
        # It may be what another node said.
        if isinstance(slot, str) and slot.isascii() and slot.isdigit() and len(slot) <= 4 and int(slot) < len(counts):
            counts[int(slot)] = count if isinstance(count, int) and count > 0 else 0
    total = snapshot.get("sum")
    return Spread(tuple(counts), float(total) if isinstance(total, int | float) else 0.0)


class Histogram:
    """How values are spread, in buckets twelve to a decade: quantiles are right to less than a quarter.

    - Bounded, and of one size, however many values come and whatever they are.
    """

    __slots__ = ("_counts", "_lock", "_max", "_min", "_sum")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * (len(EDGES) + 1)
        self._sum = 0.0
        self._min = math.inf
        self._max = -math.inf

    def observe(self, value: float, times: int = 1) -> None:
        """Take one finite value in, as often as `times` says; what is not above zero counts with the smallest."""
        if not math.isfinite(value):
            raise UsageError(f"{value} cannot be counted in a histogram")
        slot = bisect_left(EDGES, value)
        with self._lock:
            self._counts[slot] += times
            self._sum += value * times
            if value < self._min:
                self._min = value
            if value > self._max:
                self._max = value

    def spread(self) -> Spread:
        """All that came so far."""
        with self._lock:
            return Spread(tuple(self._counts), self._sum)

    def snapshot(self) -> dict[str, float | dict[str, int]]:
        """``count``, ``sum`` and, unless empty, ``min``, ``max``, ``p50``, ``p99`` (upper ends of their buckets), ``buckets``."""
        with self._lock:
            spread, least, most = Spread(tuple(self._counts), self._sum), self._min, self._max
        count = spread.total
        if not count:
            return {"count": 0, "sum": 0.0}
        quantiles = {
            name: max(least, min(most, spread.quantile(share))) for name, share in (("p50", 0.5), ("p99", 0.99))
        }
        return {"count": count, "sum": spread.sum, "min": least, "max": most, **quantiles, "buckets": spread.buckets()}


Instrument = Counter | Gauge | Histogram
_Kind = TypeVar("_Kind", Counter, Gauge, Histogram)


class Metrics:
    """All instruments of one node, by name and labels. The labels of a name are always the same ones, or none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._instruments: dict[str, dict[Labels, Instrument]] = {}

    def counter(self, name: str, **labels: str | int) -> Counter:
        """The counter `name`, made at the first call. Raises UsageError if the name is of another kind or has other labels."""
        return self._get(name, labels, Counter)

    def gauge(self, name: str, **labels: str | int) -> Gauge:
        """The gauge `name`, likewise."""
        return self._get(name, labels, Gauge)

    def histogram(self, name: str, **labels: str | int) -> Histogram:
        """The histogram `name`, likewise."""
        return self._get(name, labels, Histogram)

    def expect(self, *names: str) -> None:
        """There will be counters of these names, with labels that come later: until then a snapshot says 0."""
        with self._lock:
            for name in names:
                self._instruments.setdefault(name, {})

    def total(self, name: str) -> int:
        """What the counters `name` have counted, of all labels together; 0 if there are none."""
        with self._lock:
            family = list(self._instruments.get(name, {}).values())
        return sum(instrument.value for instrument in family if isinstance(instrument, Counter))

    def collect(self) -> list[tuple[str, list[tuple[Labels, Instrument]]]]:
        """Every instrument there is, by name and labels, in order."""
        with self._lock:
            return [
                (name, sorted(family.items(), key=_by_labels)) for name, family in sorted(self._instruments.items())
            ]

    def snapshot(self) -> dict[str, float | dict[str, float | dict[str, int]]]:
        """Every instrument's value by name, in the order of names.

        One with labels is named ``name{peer="2"}``; the counters of one name have their sum under the bare name.
        """
        values: dict[str, float | dict[str, float | dict[str, int]]] = {}
        for name, family in self.collect():
            counts = [instrument.value for _, instrument in family if isinstance(instrument, Counter)]
            if counts or not family:
                values[name] = sum(counts)
            values.update({f"{name}{shown(labels)}": instrument.snapshot() for labels, instrument in family})
        return values

    def _get(self, name: str, labels: Mapping[str, str | int], kind: type[_Kind]) -> _Kind:
        key = tuple(sorted((label, str(value)) for label, value in labels.items()))
        with self._lock:
            family = self._instruments.setdefault(name, {})
            known = next(iter(family), key)
            if [label for label, _ in known] != [label for label, _ in key]:
                raise UsageError(f"{name!r} has the labels {shown(known)}, not {shown(key)}")
            if key not in family and len(family) >= LABELS_MAX:
                key = tuple((label, OTHER) for label, _ in key)
            instrument = family.setdefault(key, kind())
        if not isinstance(instrument, kind):
            raise UsageError(f"{name!r} is a {type(instrument).__name__}, not a {kind.__name__}")
        return instrument


def shown(labels: Sequence[tuple[str, str]]) -> str:
    """``{peer="2"}``; nothing if there are none."""
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels) + "}" if labels else ""


def _by_labels(item: tuple[Labels, Instrument]) -> list[tuple[str, int, str]]:
    # Peer 10 comes after peer 2.
    return [(name, int(value) if value.isdigit() and len(value) < 20 else -1, value) for name, value in item[0]]
