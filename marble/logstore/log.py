"""The durable log of a node: appended to, synced, read back, recovered.

Rule 1: an entry or a hard state is durable when the `Log.sync` that follows its `Log.append` has returned, and not
        before.
Rule 2: what one sync writes is one frame as long as it fits, hard states before entries, so that a crash keeps all or
        nothing of it; of several frames a crash keeps a prefix.
Rule 3: after a write or a sync failed, nothing works any more: what it covered may be gone although the next one
        succeeds.
Rule 4: a segment is started only when all before it is durable, and is used only when its name is durable.

Threads: one may append and read while another one syncs. `_lock` guards what is in memory and is never held over I/O;
`_sync_lock` is held over a sync and guards the end of the log. Order: `_sync_lock`, then `_lock`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from marble._core import frame
from marble._core.term_index import EntrySpan, TermIndex
from marble.env import AppendFile, Files
from marble.errors import CorruptionError, InvariantError, ProtocolError, UsageError, check
from marble.logstore.extents import Extents, Pending, Place
from marble.logstore.plan import Item, Plan, plan_frames
from marble.logstore.repair import create_segment, prepare_directory, repair
from marble.logstore.scan import RecoveryReport, Scan, ScannedFrame, Tail
from marble.logstore.segment import FRAME_BYTES_LIMIT, WINDOW_BYTES, MarkFile, Window, segment_path
from marble.types import INDEX_MAX, NODE_ID_MAX, HardState

_MIB = 1024 * 1024
_READ_WINDOW_BYTES = 256 * 1024
_READ_BYTES_MAX = 1024 * _MIB
"""A batch has 32-bit offsets; no read makes a larger one, whatever it was asked for."""


@dataclass(frozen=True, slots=True)
class LogOptions:
    """Limits of a log.

    - ``segment_bytes_max``: a segment is continued while what comes next fits; at least one sync goes into each.
    - ``cache_bytes_max``: frames kept in memory after they were written or read.
    - ``frame_bytes_max``: no frame that is written is longer, so no entry either.
    """

    segment_bytes_max: int = 64 * _MIB
    cache_bytes_max: int = 64 * _MIB
    frame_bytes_max: int = 64 * _MIB

    def __post_init__(self) -> None:
        if not _MIB <= self.frame_bytes_max <= FRAME_BYTES_LIMIT:
            raise UsageError(f"frame_bytes_max {self.frame_bytes_max} is not within 1 MiB to 1 GiB")
        if self.segment_bytes_max < 4096:
            raise UsageError(f"segment_bytes_max {self.segment_bytes_max} is below 4096")
        if self.cache_bytes_max < 0:
            raise UsageError(f"cache_bytes_max {self.cache_bytes_max} is negative")

    @property
    def entry_bytes_max(self) -> int:
        """The largest payload that fits a frame."""
        return self.frame_bytes_max - frame.OVERHEAD_BYTES_MAX - frame.ROW_BYTES_MAX


@dataclass(frozen=True, slots=True)
class GroupState:
    """What the log held of one group when it was opened.

    - ``hard_state.commit <= last_index``: a commit index that outlived its entries is lowered.
    - ``term_index`` covers ``[first_index, last_index]``, sizes are payload bytes. It belongs to whoever takes it;
      the log has no other use for it.
    """

    hard_state: HardState
    first_index: int
    last_index: int
    last_term: int
    term_index: TermIndex


class Log:
    """See the head of this module. Made by `Log.open`."""

    def __init__(self, files: Files, options: LogOptions, scan: Scan, writable: bool) -> None:
        self._files = files
        self._options = options
        self._writable = writable
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._extents: dict[int, Extents] = {}
        self._states: dict[int, HardState] = {}
        self._queue: list[tuple[Extents, Pending, int]] = []
        self._cache: OrderedDict[tuple[int, int], tuple[pa.RecordBatch, int]] = OrderedDict()
        self._cache_bytes = 0
        self._failure: str | None = None
        self._closed = False
        self._file: AppendFile | None = None
        self._groups = self._recover(scan)
        self._report = scan.report
        self._tail = scan.tail
        self._sealed_bytes = scan.nbytes_before_tail
        self._mark = MarkFile(files, scan.mark)
        if writable and not self._report.lost_durable_bytes:
            self._continue()

    @classmethod
    def open(cls, files: Files, options: LogOptions | None = None, writable: bool = True) -> Log:
        """Read the log below ``log/`` of `files` from its beginning and get ready to continue it; without one, start
        one.

        Whoever opens a log writable holds the lock of the data directory. ``writable=False`` changes nothing on disk.

        Raises
        ------
        CorruptionError
            The log is damaged; path and offset of the frame are in the error. Nothing was changed.
        InvariantError
            The disk failed.
        """
        try:
            if writable:
                prepare_directory(files)
            return cls(files, LogOptions() if options is None else options, Scan(files), writable)
        except OSError as error:
            raise InvariantError(f"the log could not be opened ({error}): mend the disk") from error

    @property
    def report(self) -> RecoveryReport:
        """What `open` found."""
        return self._report

    @property
    def groups(self) -> dict[int, GroupState]:
        """What `open` found of each group, by its number, ascending."""
        return self._groups

    @property
    def nbytes(self) -> int:
        """Bytes of the log on disk."""
        return self._sealed_bytes + self._tail.end

    def last_index(self, group: int) -> int:
        """Index of the last entry appended to `group`, synced or not; 0 if there is none."""
        with self._lock:
            extents = self._extents.get(group)
            return 0 if extents is None else extents.last_index

    # -- writing -----------------------------------------------------------------------------------------------------

    def append(self, group: int, hard_state: HardState | None, entries: pa.RecordBatch | None) -> None:
        """Take over a hard state, or entries, or both. They can be read at once and are durable after the next `sync`.

        Parameters
        ----------
        group
            Number of the Raft group, a uint32.
        hard_state
            Replaces the group's; its term never goes back, its vote does not change within a term.
        entries
            Rows of `marble.schema.ENTRY_SCHEMA` with consecutive indexes. If the first index is in the log,
            everything from there on is replaced (truncated). The batch is kept, not copied, until it is synced.

        Raises
        ------
        UsageError
            An entry is larger than a frame may be, or the log is closed or was not opened writable. Nothing was taken
            over.
        InvariantError
            An earlier sync failed; or the arguments contradict the log: a gap, a term or a vote that changed its
            mind, a truncation below the commit index. Nothing was taken over.
        """
        with self._lock:
            self._check_writable()
            extents = self._extents.get(group)
            old = HardState() if extents is None else extents.hard_state
            if hard_state is not None:
                _check_hard_state(group, old, hard_state)
            if entries is not None:
                first, first_term, last_term, nbytes, largest = frame.check_entries(entries, group)
                limit = self._options.entry_bytes_max
                if largest > limit:
                    raise UsageError(
                        f"an entry of {largest} bytes does not fit a frame: at most {limit}; write smaller batches"
                    )
                last = 0 if extents is None else extents.last_index
                check(first <= last + 1, f"entries from {first} on would leave a gap behind {last} in group {group}")
                check(
                    first > min(old.commit, last),
                    f"entries from {first} on would replace committed ones of group {group}",
                )
                if extents is not None and first == last + 1:
                    check(first_term >= extents.last_term, f"terms fall at entry {first} of group {group}")
            if extents is None:
                extents = self._extents[group] = Extents()
            if hard_state is not None:
                extents.hard_state = self._states[group] = hard_state
            if entries is not None:
                pending = extents.add(first, first + entries.num_rows, last_term, entries)
                self._queue.append((extents, pending, nbytes))

    def sync(self) -> None:
        """Make everything appended so far durable. Returns at once if nothing is waiting.

        Raises
        ------
        InvariantError
            The disk failed, now or earlier. The log is of no use any more; what was appended since the last sync may
            or may not come back when it is opened again.
        """
        with self._sync_lock:
            with self._lock:
                self._check_writable()
                if not self._states and not self._queue:
                    return
                states, self._states = self._states, {}
                queue, self._queue = self._queue, []
                items = [Item(*waiting) for waiting in queue if waiting[1].end > waiting[1].first]
            try:
                self._write(plan_frames(states, items, self._options.frame_bytes_max))
            except BaseException as error:
                # Also when a signal's handler broke in: how far the writing came is not known.
                self._failure = f"{type(error).__name__}: {error}"
                if not isinstance(error, Exception):
                    raise
                raise InvariantError(f"the log could not be written ({self._failure}): this node must stop") from error

    def close(self) -> None:
        """Sync what is waiting, unless the log has failed, and give the files back. Idempotent.

        Raises InvariantError if that sync fails; the files are given back all the same.
        """
        if self._closed:
            return
        try:
            if self._writable and self._failure is None:
                self.sync()
                with self._sync_lock:
                    if self._file is not None:
                        self._mark.write(self._tail.segment, self._tail.end, self._tail.chain, both_slots=True)
        except OSError as error:
            raise InvariantError(f"the log's mark could not be written: {error}") from error
        finally:
            self._closed = True
            if self._file is not None:
                self._file.close()

    def _check_writable(self) -> None:
        self._check_usable()
        if not self._writable:
            raise UsageError("the log was opened for reading only")

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise InvariantError(f"the log has failed ({self._failure}): stop this node and mend its disk")
        if self._closed:
            raise UsageError("the log is closed")

    def _write(self, plans: list[Plan]) -> None:
        if self._file is None:
            self._continue()
        end, estimate = self._tail.end, sum(plan.nbytes for plan in plans)
        if end > frame.METADATA_BYTES_MAX and end + estimate > self._options.segment_bytes_max:
            self._roll()
        file, tail = self._file, self._tail
        assert file is not None
        segment, synced, end, chain = tail.segment, tail.end, tail.end, tail.chain
        written: list[tuple[Plan, int, pa.RecordBatch, int]] = []
        for plan in plans:
            ranges = [(item.batch, row, stop) for item, row, stop in plan.ranges]
            data, batch, chain = frame.encode(plan.states, ranges, segment, end, synced, chain)
            file.write(memoryview(data))
            written.append((plan, end, batch, data.size))
            end += data.size
        file.sync()
        with self._lock:
            self._tail = Tail(segment, end, end, chain, end)
            for plan, offset, batch, length in written:
                at = len(plan.states)
                for item, row, stop in plan.ranges:
                    place = Place(item.first + row, item.first + stop, segment, offset, length, at)
                    item.extents.settle(item.pending, place)
                    at += stop - row
                self._remember(segment, offset, batch, length)
        self._mark.write(segment, end, chain)

    def _roll(self) -> None:
        """Go on in a new segment. All before it is durable: nothing has been written since the last sync."""
        old, tail = self._file, self._tail
        self._file, new_tail = create_segment(self._files, tail.segment + 1, tail.chain)
        assert old is not None  # `_write` has opened it; the line is for the type checker.
        old.close()
        with self._lock:
            self._sealed_bytes += tail.end
            self._tail = new_tail
        self._mark.write(new_tail.segment, new_tail.end, new_tail.chain)

    def _continue(self) -> None:
        """Repair the end that the scan found and open it. Put off to the first sync when durable bytes were lost."""
        lost = self._report.lost_durable_bytes > 0
        self._file, self._tail = repair(self._files, self._tail, mark_is_ahead=lost)
        if lost:
            # Neither slot may speak of the lost bytes any more.
            self._mark = MarkFile(self._files, None)
        self._mark.write(self._tail.segment, self._tail.end, self._tail.chain)

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, group: int, first: int, end: int, bytes_max: int = INDEX_MAX) -> pa.RecordBatch:
        """Entries of `group` from `first` on: at least one, none at or beyond `end`, payloads of at most `bytes_max`
        bytes in all.

        A single entry may exceed `bytes_max`. With a large enough `bytes_max` all of ``[first, end)`` come, unless
        they are more than 1 GiB. Payloads keep their alignment of 64 bytes.

        Raises
        ------
        CorruptionError
            What is on disk is not what was written.
        InvariantError
            An index is not in the log, or a sync failed.
        """
        bytes_left = min(bytes_max, _READ_BYTES_MAX)
        window: tuple[int, Window] | None = None
        parts: list[pa.RecordBatch] = []
        index = first
        while index < end and (bytes_left > 0 or not parts):
            with self._lock:
                self._check_usable()
                found = self._find(group, index, end)
                rows: pa.RecordBatch | None = None
                if not isinstance(found, Place):
                    rows = found
                else:
                    cached = self._recall(found.segment, found.offset)
                    rows = None if cached is None else cached.slice(found.row, found.end - index)
            if rows is None:
                assert isinstance(found, Place)
                try:
                    if window is None or window[0] != found.segment:
                        window = found.segment, self._window(found.segment, bytes_max)
                    rows = self._load(window[1], group, found)
                except OSError as error:
                    raise InvariantError(f"the log could not be read ({error}): mend the disk") from error
            stop, nbytes = frame.clip(rows, 0, rows.num_rows, bytes_left)
            if nbytes > bytes_left and parts:
                break
            parts.append(rows if stop == rows.num_rows else rows.slice(0, stop))
            bytes_left -= nbytes
            index += stop
            if stop < rows.num_rows:
                break
        check(parts, f"a read of the empty range {first} to {end}")
        return parts[0] if len(parts) == 1 else pa.concat_batches(parts)

    def replay(self, group: int, first: int, end: int) -> Iterator[pa.RecordBatch]:
        """All entries ``[first, end)`` of `group` in order, some MiB at a time. Raises as `read` does."""
        while first < end:
            batch = self.read(group, first, end, WINDOW_BYTES)
            first += batch.num_rows
            yield batch

    def _find(self, group: int, index: int, end: int) -> Place | pa.RecordBatch:
        extents = self._extents.get(group)
        if extents is None or not extents.first_index <= index < end <= extents.last_index + 1:
            have = "nothing" if extents is None else f"{extents.first_index} to {extents.last_index}"
            raise InvariantError(f"entries {index} to {end - 1} of group {group} were asked for; the log has {have}")
        return extents.find(index, end)

    def _window(self, segment: int, bytes_max: int) -> Window:
        path = segment_path(segment)
        window_bytes = min(max(bytes_max, _READ_WINDOW_BYTES), WINDOW_BYTES)
        return Window(self._files, path, self._files.size(path), window_bytes)

    def _load(self, window: Window, group: int, place: Place) -> pa.RecordBatch:
        """The entries at `place`, verified as at recovery: the disk may have changed its mind since."""
        where = self._files.describe(segment_path(place.segment))
        seal = window.find_frame(place.segment, place.offset, place.length)
        if seal is None or seal.length != place.length:
            raise CorruptionError("the log was damaged after it had been opened", where, place.offset)
        data, at = window.view(place.offset, place.length)
        try:
            batch = frame.decode(data, at, seal)
            rows = batch.slice(place.row, place.end - place.first)
            check(frame.check_entries(rows, group)[0] == place.first, "entries of other indexes")
            check(rows.num_rows == place.end - place.first, "fewer entries")
        except (CorruptionError, InvariantError) as error:
            what = f"a frame does not hold the entries that it had held ({error})"
            raise CorruptionError(what, where, place.offset) from None
        with self._lock:
            self._remember(place.segment, place.offset, batch, place.length)
        return rows

    def _recall(self, segment: int, offset: int) -> pa.RecordBatch | None:
        found = self._cache.get((segment, offset))
        if found is None:
            return None
        self._cache.move_to_end((segment, offset))
        return found[0]

    def _remember(self, segment: int, offset: int, batch: pa.RecordBatch, length: int) -> None:
        if length > self._options.cache_bytes_max or (segment, offset) in self._cache:
            return
        self._cache[segment, offset] = batch, length
        self._cache_bytes += length
        while self._cache_bytes > self._options.cache_bytes_max:
            self._cache_bytes -= self._cache.popitem(last=False)[1][1]

    # -- recovery ----------------------------------------------------------------------------------------------------

    def _recover(self, scan: Scan) -> dict[int, GroupState]:
        """Take every frame in as it was written: hard states replace, entries truncate what they follow (pitfall:
        replay too)."""
        term_indexes: dict[int, TermIndex] = {}
        for scanned in scan.frames():
            try:
                self._recover_frame(scanned, term_indexes)
            except (InvariantError, ProtocolError, CorruptionError) as error:
                where = self._files.describe(segment_path(scanned.segment))
                raise CorruptionError(
                    f"a sound frame contradicts those before it: {error}", where, scanned.offset
                ) from None
        groups = {}
        for group, extents in sorted(self._extents.items()):
            state = extents.hard_state
            if state.commit > extents.last_index:
                state = extents.hard_state = HardState(state.term, state.vote, extents.last_index)
            terms = term_indexes.setdefault(group, TermIndex())
            groups[group] = GroupState(state, extents.first_index, extents.last_index, extents.last_term, terms)
        return groups

    def _recover_frame(self, scanned: ScannedFrame, term_indexes: dict[int, TermIndex]) -> None:
        batch, length = scanned.batch, scanned.seal.length
        for group, is_hard_state, row, end, index in frame.runs(batch):
            extents = self._extents.setdefault(group, Extents())
            if is_hard_state:
                term, vote = batch.column(2)[row].as_py(), batch.column(4)[row].as_py()
                _check_hard_state(group, extents.hard_state, state := HardState(term, vote, index))
                extents.hard_state = state
                continue
            check(index <= extents.last_index + 1, f"a gap in front of entry {index} of group {group}")
            terms = term_indexes.setdefault(group, TermIndex())
            if index <= terms.last_index:
                terms.truncate(index)
            terms.append(EntrySpan.from_buffers(index, *frame.terms_and_sizes(batch, row, end)))
            place = Place(index, index + end - row, scanned.segment, scanned.offset, length, row)
            extents.recover(place, terms.last_term)


def _check_hard_state(group: int, old: HardState, new: HardState) -> None:
    in_range = 0 <= new.term <= INDEX_MAX and 0 <= new.commit <= INDEX_MAX and 0 <= new.vote <= NODE_ID_MAX
    check(in_range, f"{new} of group {group} is out of range")
    check(new.term >= old.term, f"the term of group {group} went back from {old.term} to {new.term}")
    changed_vote = new.term == old.term and old.vote not in (0, new.vote)
    check(not changed_vote, f"the vote of group {group} in term {new.term} changed from {old.vote} to {new.vote}")
