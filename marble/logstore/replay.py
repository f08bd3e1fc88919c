"""What a log means: the rows that a scan found, taken in one after the other as they were written.

Rule 1: hard states replace, entries truncate what they follow (etcd#22442: replay too), SNAPSHOT rows purge. What a row
        says must be possible after the rows before it; otherwise the log is damaged, however sound its frames are.
Rule 2: the base of the first segment stands for the segments that were purged before it. Every other base repeats what
        the frames before it say, and must agree with them.
Rule 3: the base also names entries that lie in segments before it. If those are gone, the entries are *absent* until a
        later row makes them superfluous; a log at whose end any entry is absent has lost a segment that it needed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import pyarrow as pa

from marble._core import entry_batch, frame
from marble._core.term_index import EntrySpan, TermIndex
from marble.env import Files
from marble.errors import CorruptionError, InvariantError, ProtocolError, check
from marble.logstore.extents import Extents, Place, Start, term_runs
from marble.logstore.scan import Scan, ScannedFrame
from marble.logstore.segment import segment_path
from marble.types import INDEX_MAX, NODE_ID_MAX, EntryKind, HardState


@dataclass(frozen=True, slots=True)
class GroupState:
    """What the log held of one group when it was opened.

    - ``purged_index <= hard_state.commit <= last_index``: a commit index that outlived its entries is lowered.
    - ``term_index`` covers ``[first_index, last_index]``, sizes are payload bytes. It belongs to whoever takes it;
      the log has no other use for it.
    - Entries up to ``purged_index``, of term ``purged_term``, are in a snapshot: ``first_index == purged_index + 1``.
    - ``changes``: indexes of the MEMBERSHIP entries in ``[first_index, last_index]``, ascending.
    """

    hard_state: HardState
    first_index: int
    last_index: int
    last_term: int
    term_index: TermIndex
    purged_index: int
    purged_term: int
    changes: list[int]


class Replay:
    """One replay of a whole log. When it was made, look at `extents` and `groups`.

    Raises
    ------
    CorruptionError
        The log is damaged.
    """

    def __init__(self, files: Files, scan: Scan) -> None:
        self.extents: dict[int, Extents] = {}
        self.groups: dict[int, GroupState] = {}
        self._groups: dict[int, _Group] = {}
        for scanned in scan.frames():
            try:
                if scanned.base:
                    self._take_base(scanned, is_first=scanned.segment == scan.first_segment)
                else:
                    self._take(scanned)
            except (InvariantError, ProtocolError, CorruptionError) as error:
                where = files.describe(segment_path(scanned.segment))
                raise CorruptionError(
                    f"a sound frame contradicts those before it: {error}", where, scanned.offset
                ) from None
        for number, group in sorted(self._groups.items()):
            if group.absent_last > group.extents.purged_index:
                raise CorruptionError(
                    f"a segment is missing, and with it entries {group.extents.first_index} to {group.absent_last} of "
                    f"group {number}: this node must not go on with this log; keep its files as they are",
                    files.describe(segment_path(scan.first_segment - 1)),
                    0,
                )
            self.extents[number] = group.extents
            self.groups[number] = group.finish()

    def _group(self, number: int) -> _Group:
        group = self._groups.get(number)
        if group is None:
            group = self._groups[number] = _Group()
        return group

    def _take(self, scanned: ScannedFrame) -> None:
        batch = scanned.batch
        for number, kind, row, end, index in frame.runs(batch):
            group = self._group(number)
            if kind == EntryKind.HARD_STATE:
                group.take_hard_state(number, _hard_state(batch, row))
            elif kind == EntryKind.SNAPSHOT:
                group.take_start(_start(batch, row))
            else:
                place = Place(index, index + end - row, scanned.segment, scanned.offset, scanned.seal.length, row)
                group.take_entries(place, batch)

    def _take_base(self, scanned: ScannedFrame, *, is_first: bool) -> None:
        states: dict[int, HardState] = {}
        starts: dict[int, Start] = {}
        for number, kind, row, _, _ in frame.runs(scanned.batch):
            if kind == EntryKind.HARD_STATE:
                states[number] = _hard_state(scanned.batch, row)
            else:
                check(kind == EntryKind.SNAPSHOT, "the base of a segment holds entries")
                starts[number] = _start(scanned.batch, row)
        check(states.keys() == starts.keys(), "the base of a segment names a group by half")
        if is_first:
            for number, start in starts.items():
                check_hard_state(number, HardState(), states[number])
                self._groups[number] = _Group.behind(states[number], start)
            return
        check(states.keys() == self._groups.keys(), "the base of a segment names other groups")
        for number, start in starts.items():
            state, extents = states[number], self._groups[number].extents
            # The commit index is a hint: the base may have it as it was lowered or raised by a start.
            same_vote = (state.term, state.vote) == (extents.hard_state.term, extents.hard_state.vote)
            check(same_vote, f"the base of a segment has another vote of group {number}")
            check(
                start[1:] == (extents.purged_index, extents.purged_term, extents.last_index),
                f"the base of a segment has another log of group {number}",
            )


class _Group:
    """One group in the course of a replay.

    - ``absent_last``: entries up to it that are not purged lie in segments that are gone. Of no meaning once the purged
      index has reached it.
    - ``terms`` covers what is neither purged nor absent.
    """

    def __init__(self) -> None:
        self.extents = Extents()
        self.terms = TermIndex()
        self.changes: list[int] = []
        self.absent_last = 0

    @staticmethod
    def behind(state: HardState, start: Start) -> _Group:
        """What the first base knows of a group."""
        group = _Group()
        group.extents.hard_state = state
        _check_start(start)
        if start.purged_index:
            group.extents.start_after(start.purged_index, start.purged_term)
        group.extents.last_index = group.absent_last = start.last_index
        group._restart(start.last_index)
        return group

    def take_hard_state(self, number: int, state: HardState) -> None:
        check_hard_state(number, self.extents.hard_state, state)
        self.extents.hard_state = state

    def take_start(self, start: Start) -> None:
        extents = self.extents
        _check_start(start)
        check(start.purged_index > extents.purged_index, f"the log began behind {extents.purged_index} before")
        if start.last_index == start.purged_index:
            # No entry stays. Where there is one at this index, it is of another history.
            extents.truncate(extents.first_index)
            extents.start_after(start.purged_index, start.purged_term)
            self._restart(start.purged_index)
            self.changes.clear()
            return
        check(start.last_index <= extents.last_index, f"entries up to {start.last_index} stay of {extents.last_index}")
        self._truncate(start.last_index + 1)
        if start.purged_index <= self.absent_last:
            # The entry that would tell its own term is gone, and there is nothing else to purge.
            extents.purged_index, extents.purged_term = start.purged_index, start.purged_term
            if start.purged_index == self.absent_last:
                self._restart(start.purged_index, self.terms)
            return
        check(
            self.terms.term_at(start.purged_index) == start.purged_term, f"entry {start.purged_index} has another term"
        )
        self.terms.purge(start.purged_index + 1)
        extents.start_after(start.purged_index, start.purged_term)
        del self.changes[: bisect_right(self.changes, start.purged_index)]

    def take_entries(self, place: Place, batch: pa.RecordBatch) -> None:
        extents, end = self.extents, place.row + place.end - place.first
        check(place.first > extents.purged_index, f"entry {place.first} is in a snapshot")
        check(place.first <= extents.last_index + 1, f"a gap in front of entry {place.first}")
        self._truncate(place.first)
        span = EntrySpan.from_buffers(place.first, *frame.terms_and_sizes(batch, place.row, end))
        self.terms.append(span)
        rows = batch.slice(place.row, end - place.row)
        extents.recover(place, term_runs(rows, place.first, span.first_term, span.last_term))
        self.changes += entry_batch.changes(rows)

    def finish(self) -> GroupState:
        """What the whole log says of the group; what is on disk is what was read."""
        extents, on_disk = self.extents, self.extents.on_disk
        state = extents.hard_state
        commit = min(max(state.commit, extents.purged_index), extents.last_index)
        state = extents.hard_state = HardState(state.term, state.vote, commit)
        on_disk.hard_state, on_disk.last_index = state, extents.last_index
        on_disk.purged_index, on_disk.purged_term = extents.purged_index, extents.purged_term
        on_disk.oldest_segment, on_disk.known = extents.settled_segment, True
        return GroupState(
            hard_state=state,
            first_index=extents.first_index,
            last_index=extents.last_index,
            last_term=extents.last_term,
            term_index=self.terms,
            purged_index=extents.purged_index,
            purged_term=extents.purged_term,
            changes=self.changes,
        )

    def _truncate(self, first: int) -> None:
        if first > self.extents.last_index:
            return
        self.extents.truncate(first)
        del self.changes[bisect_left(self.changes, first) :]
        if first <= self.absent_last:
            self._restart(first - 1)
        else:
            self.terms.truncate(first)

    def _restart(self, index: int, kept: TermIndex | None = None) -> None:
        """Let `terms` begin behind `index`, before which entries are purged or absent, and go on with those of `kept`."""
        self.absent_last = index
        self.terms = TermIndex(index + 1, self.extents.purged_term if index == self.extents.purged_index else 0)
        if kept is not None and len(kept):
            self.terms.append(kept.span(index + 1, kept.last_index + 1))


def check_hard_state(group: int, old: HardState, new: HardState) -> None:
    """Raise InvariantError unless a node that had promised `old` may promise `new`."""
    in_range = 0 <= new.term <= INDEX_MAX and 0 <= new.commit <= INDEX_MAX and 0 <= new.vote <= NODE_ID_MAX
    check(in_range, f"term {new.term}, vote {new.vote} or commit index {new.commit} of group {group} is out of range")
    check(new.term >= old.term, f"the term of group {group} went back from {old.term} to {new.term}")
    changed_vote = new.term == old.term and old.vote not in (0, new.vote)
    check(not changed_vote, f"the vote of group {group} in term {new.term} changed from {old.vote} to {new.vote}")


def _hard_state(batch: pa.RecordBatch, row: int) -> HardState:
    return HardState(batch.column(2)[row].as_py(), batch.column(4)[row].as_py(), batch.column(1)[row].as_py())


def _start(batch: pa.RecordBatch, row: int) -> Start:
    return Start(*(batch.column(c)[row].as_py() for c in (0, 1, 2, 5)))


def _check_start(start: Start) -> None:
    in_range = (
        start.purged_index <= start.last_index <= INDEX_MAX
        and start.purged_term <= INDEX_MAX
        and (start.purged_term > 0) == (start.purged_index > 0)
    )
    check(in_range, f"{start} is out of range")
