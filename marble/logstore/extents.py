"""Where the entries of one group are: in memory until they are synced, then in a frame of a segment.

Rule 1: this file alone maps an index to a place. A later row for an index hides every earlier row from that index on.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from marble.errors import check
from marble.types import HardState


@dataclass(slots=True)
class Pending:
    """Entries ``[first, end)`` that no sync has covered yet: rows of `batch` from 0 on. Empty once all were
    truncated."""

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


class Extents:
    """The log of one group. Not thread-safe: the Log's lock guards it.

    - Settled and pending extents are contiguous and ascending: ``settled_first <= ... < pending[0].first <= ... <=
      last_index``.
    - A settled extent ends where the next one starts, so only starts are stored: 40 bytes for each frame and group.
    """

    def __init__(self) -> None:
        self.hard_state = HardState()
        self.first_index = 1
        self.last_index = 0
        self.last_term = 0
        self.pending: list[Pending] = []
        self._firsts = array("Q")
        self._segments = array("L")
        self._offsets = array("Q")
        self._lengths = array("Q")
        self._rows = array("L")

    def truncate(self, first: int) -> None:
        """Forget entries from `first` on; the new last term is for the caller to set."""
        while self.pending and self.pending[-1].end > first:
            last = self.pending[-1]
            last.end = max(first, last.first)
            if last.end > last.first:
                break
            self.pending.pop()
        if not self.pending:
            while self._firsts and self._firsts[-1] >= first:
                for column in (self._firsts, self._segments, self._offsets, self._lengths, self._rows):
                    column.pop()
        self.last_index = first - 1

    def add(self, first: int, end: int, last_term: int, batch: pa.RecordBatch) -> Pending:
        """Take entries in that are not yet on disk. They replace everything from `first` on."""
        if first <= self.last_index:
            self.truncate(first)
        check(first == self.last_index + 1, f"entries from {first} on do not follow {self.last_index}")
        pending = Pending(first, end, batch)
        self.pending.append(pending)
        self.last_index, self.last_term = end - 1, last_term
        return pending

    def settle(self, pending: Pending, place: Place) -> None:
        """The entries of `place`, which began as `pending`, are durable now; what was truncated meanwhile stays
        forgotten.

        A pending extent that was split over several frames settles from its front, in order.
        """
        if pending.end <= place.first:
            return
        check(self.pending and self.pending[0] is pending, "extents settle in another order than they came")
        self._push(place)
        if pending.end <= place.end:
            self.pending.pop(0)
        else:
            pending.batch = pending.batch.slice(place.end - pending.first)
            pending.first = place.end

    def recover(self, place: Place, last_term: int) -> None:
        """Take in what a scan found: as `add` and `settle` did when it was written."""
        if place.first <= self.last_index:
            self.truncate(place.first)
        self._push(place)
        self.last_index, self.last_term = place.end - 1, last_term

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
