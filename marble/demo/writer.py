"""Keeps a window of writes under way, and repeats those whose outcome is not known.

Rule 1: a batch counts as written only when its own acknowledgement has arrived. Whatever else happens to it, it is
offered again until it is acknowledged or its deadline passes.

Repeating is safe here and not in general: each key stands in one batch only and nobody else writes, so an upsert that
took effect twice leaves what it left once, in whatever order repeats and other batches arrive.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa

from marble.errors import NotLeaderError, OutcomeUnknownError, UnavailableError

WINDOW: Final = 8
"""Writes under way at once: enough that the cluster gathers several under one sync, few enough to show a latency."""

WRITE_TIMEOUT_S: Final = 60.0
"""How long one batch may remain without an acknowledgement, its repeats included."""

RETRY_PAUSE_S: Final = 0.05
"""Before a refused batch is offered again: the cluster may need an election first."""

_WATCH_INTERVAL_S: Final = 0.2

_ANSWER_GRACE_S: Final = 60.0
"""What a client may add to our own timeout when its last try begins just before it."""

RETRIED: Final = (OutcomeUnknownError, UnavailableError, NotLeaderError)


@dataclass(slots=True)
class WriteStats:
    """What the writes came to.

    - ``latencies_s``: from the first offer of a batch to its acknowledgement, repeats included, for each batch that the
      failover did not touch; ``failover_latencies_s`` for those that were under way in it.
    - ``failover_s``: from `Writer.mark_failure` to the first acknowledgement of a write that was offered after it.
    """

    latencies_s: list[float] = field(default_factory=list)
    failover_latencies_s: list[float] = field(default_factory=list)
    rows: int = 0
    nbytes: int = 0
    repeats: int = 0
    last_index: int = 0
    window: int = 0
    seconds: float = 0.0
    failover_s: float | None = None

    def latency_s(self, share: float) -> float:
        """What a `share` of ``latencies_s`` did not exceed (nearest rank); 0.0 if there are none."""
        ranked = sorted(self.latencies_s)
        return ranked[max(0, -int(-share * len(ranked) // 1) - 1)] if ranked else 0.0


@dataclass(slots=True, eq=False)
class _Write:
    batch: pa.RecordBatch
    begun_s: float
    offered_s: float = 0.0


class Writer:
    """Writes batches through `write`, several at once. Its methods and callbacks all run on the caller's thread.

    Parameters
    ----------
    write
        Offers one batch; gives a future of the index at which it is committed.
    watch
        Called several times a second while nothing arrives; raises to end the writing.
    window, timeout_s
        Batches under way at once; seconds that one may take.
    """

    def __init__(
        self,
        write: Callable[[pa.RecordBatch], Future[int]],
        watch: Callable[[], None],
        window: int = WINDOW,
        timeout_s: float = WRITE_TIMEOUT_S,
    ) -> None:
        self.stats = WriteStats(window=window)
        self._write = write
        self._watch = watch
        self._window = window
        self._timeout_s = timeout_s
        self._under_way: set[_Write] = set()
        self._answers: queue.SimpleQueue[tuple[_Write, Future[int], float]] = queue.SimpleQueue()
        self._repeats: list[tuple[float, _Write]] = []
        self._failed_at_s: float | None = None

    def mark_failure(self) -> None:
        """Note that the leader dies now. The next batch is offered at once, whether or not the window is full."""
        self._failed_at_s = time.monotonic()

    def run(self, batches: Iterable[pa.RecordBatch], acknowledged: Callable[[], None]) -> WriteStats:
        """Write all `batches`; call `acknowledged` after each acknowledgement, when `stats` counts it.

        Raises
        ------
        UnavailableError
            If a batch is not acknowledged in time; with its last error.
        MarbleError
            Any other error of a write, or what the watch raises.
        """
        begun = time.monotonic()
        waiting = iter(batches)
        more = True
        while more or self._under_way or self._repeats:
            # Only a write offered after the failure, not one that was on its way, tells when it is over.
            probing = self._failed_at_s is not None and self.stats.failover_s is None
            while more and len(self._under_way) + len(self._repeats) < self._window + probing:
                batch = next(waiting, None)
                more = batch is not None
                if batch is not None:
                    self._offer(_Write(batch, time.monotonic()))
            self._offer_repeats()
            if self._under_way or self._repeats:
                self._take_answer(acknowledged)
        self.stats.seconds = time.monotonic() - begun
        return self.stats

    def _offer(self, write: _Write) -> None:
        write.offered_s = time.monotonic()
        self._under_way.add(write)
        try:
            future = self._write(write.batch)
        except RETRIED as error:
            future = Future()
            future.set_exception(error)
        future.add_done_callback(lambda done: self._answers.put((write, done, time.monotonic())))

    def _offer_repeats(self) -> None:
        now = time.monotonic()
        due = [write for due_s, write in self._repeats if due_s <= now]
        self._repeats = [(due_s, write) for due_s, write in self._repeats if due_s > now]
        for write in due:
            self.stats.repeats += 1
            self._offer(write)

    def _take_answer(self, acknowledged: Callable[[], None]) -> None:
        due_s = min((due_s for due_s, _ in self._repeats), default=float("inf"))
        try:
            write, future, at_s = self._answers.get(timeout=min(_WATCH_INTERVAL_S, max(0.0, due_s - time.monotonic())))
        except queue.Empty:
            self._watch()
            self._check_overdue()
            return
        self._under_way.remove(write)
        try:
            index = future.result()
        except RETRIED as error:
            if at_s - write.begun_s > self._timeout_s:
                raise self._overdue(str(error)) from error
            self._repeats.append((at_s + RETRY_PAUSE_S, write))
            return
        stats = self.stats
        stats.last_index = max(stats.last_index, index)
        stats.rows += write.batch.num_rows
        stats.nbytes += write.batch.nbytes
        failed_s = self._failed_at_s
        if failed_s is not None and stats.failover_s is None and write.offered_s >= failed_s:
            stats.failover_s = at_s - failed_s
        over_s = float("inf") if failed_s is None or stats.failover_s is None else failed_s + stats.failover_s
        touched = failed_s is not None and at_s >= failed_s and write.begun_s < over_s
        (stats.failover_latencies_s if touched else stats.latencies_s).append(at_s - write.begun_s)
        acknowledged()

    def _check_overdue(self) -> None:
        # The client answers every write by its own deadline; this holds even if it should not.
        limit_s = time.monotonic() - self._timeout_s - _ANSWER_GRACE_S
        if any(write.begun_s < limit_s for write in self._under_way):
            raise self._overdue("no answer at all")

    def _overdue(self, why: str) -> UnavailableError:
        return UnavailableError(f"a batch was not acknowledged within {self._timeout_s:g} s: {why}")
