"""Which rows of what waits for a sync go into which frame.

Rule 1: the order of what waits is kept, and hard states and SNAPSHOT rows come first, in the same frame: a crash keeps a
        prefix of it, and never a commit index that a snapshot brought without the snapshot's position.
Rule 2: it is one frame as long as it fits: a crash keeps all or nothing of one frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from marble._core import frame
from marble.logstore.extents import Extents, Pending, Start
from marble.types import HardState


class Item:
    """Entries on their way to disk: what a `Pending` was when the sync began, since truncation may shrink it meanwhile.

    ``nbytes`` is at least the size of their payloads.
    """

    __slots__ = ("batch", "extents", "first", "nbytes", "pending", "rows")

    def __init__(self, extents: Extents, pending: Pending, nbytes: int) -> None:
        self.extents = extents
        self.pending = pending
        self.first = pending.first
        self.rows = pending.end - pending.first
        self.batch: pa.RecordBatch = pending.batch
        self.nbytes = nbytes


class Plan:
    """One frame to be: hard states as (group, term, vote, commit), SNAPSHOT rows, entries as (item, row, end); at most
    ``nbytes`` long."""

    __slots__ = ("nbytes", "ranges", "starts", "states")

    def __init__(self) -> None:
        self.states: list[tuple[int, int, int, int]] = []
        self.starts: list[Start] = []
        self.ranges: list[tuple[Item, int, int]] = []
        self.nbytes = frame.OVERHEAD_BYTES_MAX


@dataclass(slots=True)
class Work:
    """What one sync writes.

    ``touched``: the groups of which it changes what entries are on disk, each with the segment of the first entry there
    that still counts, or 0.
    """

    states: dict[int, HardState]
    starts: list[Start]
    items: list[Item]
    touched: dict[Extents, int]

    def note_durable(self, groups: Mapping[int, Extents], segment: int) -> None:
        """All of it has been written to `segment` and synced."""
        for group, state in self.states.items():
            on_disk = groups[group].on_disk
            on_disk.hard_state, on_disk.known = state, True
        for start in self.starts:
            on_disk = groups[start.group].on_disk
            on_disk.start(start)
            on_disk.known = True
        for item in self.items:
            on_disk = item.extents.on_disk
            on_disk.last_index, on_disk.known = item.first + item.rows - 1, True
        for extents, oldest in self.touched.items():
            on_disk = extents.on_disk
            # What was written now is in `segment`, and nothing older counts unless it did before.
            on_disk.oldest_segment = (oldest or segment) if on_disk.last_index > on_disk.purged_index else 0


def gather(
    states: dict[int, HardState],
    starts: Iterable[int],
    queue: Sequence[tuple[Extents, Pending, int]],
    groups: Mapping[int, Extents],
) -> Work:
    """What waits for a sync, and what it will say.

    No other sync is under way, so whatever counts of the settled entries now is what counts of those on disk when this one
    has succeeded.
    """
    begun = [(group, groups[group]) for group in sorted(starts)]
    rows = [Start(group, e.purged_index, e.purged_term, e.settled_last) for group, e in begun]
    items = [Item(*waiting) for waiting in queue if waiting[1].end > waiting[1].first]
    touched = {item.extents: item.extents.settled_segment for item in items}
    touched |= {extents: extents.settled_segment for _, extents in begun}
    return Work(states, rows, items, touched)


def plan_frames(
    states: dict[int, HardState], starts: list[Start], items: Sequence[Item], frame_bytes_max: int
) -> list[Plan]:
    """Distribute the rows of a sync over frames of at most `frame_bytes_max` bytes. There is at least one row.

    Every single entry fits a frame, as `marble.logstore.log.Log.append` has made sure.
    """
    row_bytes = frame.ROW_BYTES_MAX
    space = frame_bytes_max - frame.OVERHEAD_BYTES_MAX
    current = Plan()
    current.states = [(group, state.term, state.vote, state.commit) for group, state in states.items()]
    current.starts = starts
    current.nbytes += row_bytes * (len(states) + len(starts))
    plans = [current]
    for item in items:
        row = 0
        while row < item.rows:
            end, nbytes = item.rows, item.nbytes
            if row or nbytes + row_bytes * item.rows > space:
                # Half of the space for payloads and half for rows is never too much, and one entry goes in any case.
                end = min(item.rows, row + max(1, space // 2 // row_bytes))
                end, nbytes = frame.clip(item.batch, row, end, space // 2)
            nbytes += row_bytes * (end - row)
            if current.nbytes + nbytes > frame_bytes_max:
                current = Plan()
                plans.append(current)
            current.ranges.append((item, row, end))
            current.nbytes += nbytes
            row = end
    return plans if plans[0].states or starts or plans[0].ranges else plans[1:]
