"""How long callers wait: for a majority, for their writes to take effect here, for their reads to be confirmed, for any answer.

Rule 1: the cost is per batch that the core took, never per write: the writes of one batch share their times.
Rule 2: what a leader had under way when it lost its post is not measured: its callers are told elsewhere, if at all.

A `Stopwatch` is the engine thread's; `Calls` may be used on any.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple

from marble.metrics import Counter, Histogram, Metrics
from marble.promises import Offer

STREAMS: Final = frozenset({"do_put", "do_exchange"})
"""Calls that last as long as their client likes."""


class _Batch(NamedTuple):
    last: int
    came: float
    taken: float
    writes: int
    nbytes: int


class Stopwatch:
    """Measures the writes and reads of one group; times are of the engine's monotonic clock, in seconds."""

    def __init__(self, metrics: Metrics) -> None:
        self._write_seconds = metrics.histogram("write_seconds")
        self._commit_seconds = metrics.histogram("commit_seconds")
        self._read_seconds = metrics.histogram("read_index_seconds")
        self._writes = metrics.counter("writes_committed")
        self._bytes = metrics.counter("write_bytes_committed")
        self._reads = metrics.counter("reads_confirmed")
        self._committing: deque[_Batch] = deque()
        self._applying: deque[_Batch] = deque()

    @property
    def any(self) -> bool:
        """Whether a batch is under way."""
        return bool(self._applying)

    def took(self, first: int, offers: list[Offer], now: float) -> None:
        """The core took `offers`, which are not none, at `first` and the indexes after it."""
        # All count from when the first of them came: the others came in the same turn, or waited behind it.
        came = now if offers[0].came is None else offers[0].came
        nbytes = sum(offer.proposal.nbytes for offer in offers)
        batch = _Batch(first + len(offers) - 1, came, now, len(offers), nbytes)
        self._committing.append(batch)
        self._applying.append(batch)

    def reached(self, commit_index: int, applied_index: int, now: float) -> None:
        """A majority has the log up to `commit_index`, and up to `applied_index` it has taken effect here."""
        while self._committing and self._committing[0].last <= commit_index:
            batch = self._committing.popleft()
            self._commit_seconds.observe(now - batch.taken, batch.writes)
        while self._applying and self._applying[0].last <= applied_index:
            batch = self._applying.popleft()
            self._write_seconds.observe(now - batch.came, batch.writes)
            self._writes.add(batch.writes)
            self._bytes.add(batch.nbytes)

    def confirmed(self, begun: Iterable[float], now: float) -> None:
        """Reads that were asked for at the times `begun` may be answered."""
        for each in begun:
            self._read_seconds.observe(now - each)
            self._reads.add()

    def lost(self) -> None:
        """This node leads no longer: what is under way may be replaced by other entries."""
        self._committing.clear()
        self._applying.clear()


class Calls:
    """Calls of clients at a node's port, by method and by what became of them."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._known: dict[tuple[str, str], tuple[Counter, Histogram | None]] = {}
        """Both are of few words, so that there are few of these."""

    def ended(self, method: str, outcome: str, seconds: float) -> None:
        """A call of `method`, one of few, ended after `seconds` in `outcome`: "ok", or the name of an error's class."""
        known = self._known.get((method, outcome))
        if known is None:
            count = self._metrics.counter("requests", method=method, outcome=outcome)
            took = None if method in STREAMS else self._metrics.histogram("request_seconds", method=method)
            # Two threads may make it at once: the instruments are the same.
            known = self._known[method, outcome] = (count, took)
        known[0].add()
        if known[1] is not None:
            known[1].observe(seconds)
