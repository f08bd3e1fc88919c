"""Where the entries of one group are: in memory until they are synced, then in a frame of a segment.

Rule 1: this file alone maps an index to a place. A later row for an index hides every earlier row from that index on.
Rule 2: `OnDisk` says what a start would find, everything else what the log's user has been told. The former runs after
        the latter, and only a sync that succeeded moves it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa

from marble.errors import check
from marble.types import HardState


@dataclass(slots=True)
class Pending:
    """Entries ``[first, end)`` that no sync has covered yet: rows of `batch` from 0 on. Empty once all were
    truncated or are in a snapshot."""

    first: int
    end: int
    batch: pa.RecordBatch


class Place(NamedTuple):
    """Entries ``[first, end)`` lie in the frame at ``offset`` of ``segment``, ``length`` bytes long, from row ``row``
    on."""

    first: int
    end: int
    segment: int
    offset: int
    length: int
    row: int


class Start(NamedTuple):
    """A SNAPSHOT row: everything up to ``purged_index``, whose term is ``purged_term``, is in a snapshot, and of the
    entries that stand before the row in the log, those in ``(purged_index, last_index]`` stay."""

    group: int
    purged_index: int
    purged_term: int
    last_index: int


@dataclass(slots=True)
class OnDisk:
    """What is durable of a group. ``purged_index <= last_index``.

    Its entries lie in segments from ``oldest_segment`` on, or it has none there and that is 0. (It may say an older
    segment than is needed, never a younger one.)
    """

    hard_state: HardState = field(default_factory=HardState)
    purged_index: int = 0
    purged_term: int = 0
    last_index: int = 0
    oldest_segment: int = 0
    known: bool = False
    """Whether there is any row of the group on disk."""

    def start(self, start: Start) -> None:
        """The SNAPSHOT row `start` is durable."""
        self.purged_index, self.purged_term, self.last_index = start[1:]


def term_runs(rows: pa.RecordBatch, first: int, first_term: int, last_term: int) -> list[tuple[int, int]]:
    """Where in `rows`, entries from index `first` on, the term changes: ``(index, term)``, the first one included.

    Terms do not fall, so that the ends tell whether it is worth looking between them.
    """
    runs = [(first, first_term)]
    if first_term != last_term:
        for index, term in enumerate(rows.column(2).to_pylist(), start=first):
            if term != runs[-1][1]:
                runs.append((index, term))
    return runs


class Extents:
    """The log of one group. Not thread-safe: the Log's lock guards it.

    - ``purged_index <= last_index``; entries up to ``purged_index`` are in a snapshot and forgotten here.
    - Settled and pending extents are contiguous and ascending: ``purged_index < settled_first <= ... <
      pending[0].first <= ... <= last_index``.
    - A settled extent ends where the next one starts, so only starts are stored: 40 bytes for each frame and group.
    - Terms are stored where they change.
    """

    def __init__(self) -> None:
        self.hard_state = HardState()
        self.on_disk = OnDisk()
        self.purged_index = 0
        self.purged_term = 0
        self.last_index = 0
        self.pending: list[Pending] = []
        self._firsts = array("Q")
        self._segments = array("L")
        self._offsets = array("Q")
        self._lengths = array("Q")
        self._rows = array("L")
        self._columns = (self._firsts, self._segments, self._offsets, self._lengths, self._rows)
        self._term_firsts: list[int] = []
        self._terms: list[int] = []

    @property
    def first_index(self) -> int:
        """Index of the first entry that is there, or that would be."""
        return self.purged_index + 1

    @property
    def last_term(self) -> int:
        """Term of entry `last_index`."""
        return self._terms[-1] if self._terms else self.purged_term

    @property
    def settled_last(self) -> int:
        """The last entry that is on disk and counts; `purged_index` if there is none."""
        return self.pending[0].first - 1 if self.pending else self.last_index

    @property
    def settled_segment(self) -> int:
        """The segment of the first entry that is on disk and counts; 0 if there is none."""
        return self._segments[0] if self._firsts else 0

    def term_at(self, index: int) -> int:
        """Term of entry `index`, which lies within ``[purged_index, last_index]``."""
        if index == self.purged_index:
            return self.purged_term
        return self._terms[bisect_right(self._term_firsts, index) - 1]

    def truncate(self, first: int) -> None:
        """Forget entries from `first` on."""
        while self.pending and self.pending[-1].end > first:
            last = self.pending[-1]
            last.end = max(first, last.first)
            if last.end > last.first:
                break
            self.pending.pop()
        if not self.pending:
            keep = bisect_left(self._firsts, first)
            for column in self._columns:
                del column[keep:]
        keep = bisect_left(self._term_firsts, first)
        del self._term_firsts[keep:], self._terms[keep:]
        self.last_index = first - 1

    def start_after(self, index: int, term: int) -> None:
        """Everything up to `index`, whose term is `term`, is in a snapshot. If that entry is here, those after it
        stay; otherwise all go."""
        if index <= self.last_index and self.term_at(index) == term:
            self._purge_settled(index)
            while self.pending and self.pending[0].first <= index:
                first = self.pending[0]
                start = min(first.end, index + 1)
                # What a sync is writing right now settles later, and then only from here on.
                first.batch = first.batch.slice(start - first.first)
                first.first = start
                if first.first < first.end:
                    break
                self.pending.pop(0)
            self._purge_terms(index)
        else:
            for pending in self.pending:
                pending.end = pending.first
            self.pending.clear()
            for column in (*self._columns, self._term_firsts, self._terms):
                del column[:]
            self.last_index = index
        self.purged_index, self.purged_term = index, term

    def _purge_settled(self, index: int) -> None:
        if index >= self.settled_last:
            for column in self._columns:
                del column[:]
            return
        at = bisect_right(self._firsts, index + 1) - 1
        for column in self._columns:
            del column[:at]
        self._rows[0] += index + 1 - self._firsts[0]
        self._firsts[0] = index + 1

    def _purge_terms(self, index: int) -> None:
        if index >= self.last_index:
            self._term_firsts.clear()
            self._terms.clear()
            return
        at = bisect_right(self._term_firsts, index + 1) - 1
        del self._term_firsts[:at], self._terms[:at]
        self._term_firsts[0] = index + 1

    def add(self, first: int, end: int, runs: Sequence[tuple[int, int]], batch: pa.RecordBatch) -> Pending:
        """Take entries in that are not yet on disk. They replace everything from `first` on."""
        self._extend(first, end, runs)
        pending = Pending(first, end, batch)
        self.pending.append(pending)
        return pending

    def settle(self, pending: Pending, place: Place) -> None:
        """The entries of `place`, which began as `pending`, are durable now; what was truncated or purged meanwhile
        stays forgotten.

        A pending extent that was split over several frames settles from its front, in order.
        """
        first = max(place.first, pending.first)
        if min(place.end, pending.end) <= first:
            return
        check(self.pending and self.pending[0] is pending, "extents settle in another order than they came")
        if first > place.first:
            place = place._replace(first=first, row=place.row + first - place.first)
        self._push(place)
        if pending.end <= place.end:
            self.pending.pop(0)
        else:
            pending.batch = pending.batch.slice(place.end - pending.first)
            pending.first = place.end

    def recover(self, place: Place, runs: Sequence[tuple[int, int]]) -> None:
        """Take in what a scan found: as `add` and `settle` did when it was written."""
        self._extend(place.first, place.end, runs)
        self._push(place)

    def _extend(self, first: int, end: int, runs: Sequence[tuple[int, int]]) -> None:
        if first <= self.last_index:
            self.truncate(first)
        check(first == self.last_index + 1, f"entries from {first} on do not follow {self.last_index}")
        for index, term in runs:
            if not self._terms or self._terms[-1] != term:
                self._term_firsts.append(index)
                self._terms.append(term)
        self.last_index = end - 1

    def _push(self, place: Place) -> None:
        same_frame = self._firsts and self._segments[-1] == place.segment and self._offsets[-1] == place.offset
        if same_frame and place.first - self._firsts[-1] == place.row - self._rows[-1]:
            # Rows of one frame that follow each other in it and in the log are one extent.
            return
        self._firsts.append(place.first)
        self._segments.append(place.segment)
        self._offsets.append(place.offset)
        self._lengths.append(place.length)
        self._rows.append(place.row)

    def find(self, index: int, end: int) -> Place | pa.RecordBatch:
        """Where entry `index` is, with the entries behind it in the same place and before `end`.

        Either a place on disk, or the rows themselves. `index` is in the log.
        """
        if self.pending and index >= self.pending[0].first:
            pending = self.pending[bisect_right(self.pending, index, key=lambda extent: extent.first) - 1]
            end = min(end, pending.end)
            return pending.batch.slice(index - pending.first, end - index)
        at = bisect_right(self._firsts, index) - 1
        if at + 1 < len(self._firsts):
            end = min(end, self._firsts[at + 1])
        elif self.pending:
            end = min(end, self.pending[0].first)
        row = self._rows[at] + index - self._firsts[at]
        return Place(index, end, self._segments[at], self._offsets[at], self._lengths[at], row)
