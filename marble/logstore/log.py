"""The durable log of a node: appended to, synced, read back, recovered.

Rule 1: an entry or a hard state is durable when the `Log.sync` that follows its `Log.append` has returned.
Rule 2: what one sync writes is one frame as long as it fits, hard states before entries, so that a crash keeps all or
        nothing of it; of several frames a crash keeps a prefix.
Rule 3: after a write or a sync failed, nothing works any more: what it covered may be gone although the next one
        succeeds.
Rule 4: a segment is started only when all before it is durable, and is used only when its opening and name are durable.
Rule 5: a segment is purged only when a start that finds nothing but the later ones finds the same log: no entry that
        counts on the disk is in it, and what it said otherwise is in the base that opens the next one
        (`marble.logstore.repair`). Segments go in order, and the next one only when the name of the last one is durably
        gone, so that what is left has no holes.

Threads: one may append and read while another one syncs, and a third one purge. `_lock` guards what is in memory and is
never held over I/O; `_sync_lock` is held over a sync and guards the end of the log, `_purge_lock` is held over a purge
and guards its beginning. Order: one of the latter two, then `_lock`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from marble._core import frame
from marble.env import AppendFile, Files
from marble.errors import CorruptionError, InvariantError, UsageError, check
from marble.logstore.cache import FrameCache
from marble.logstore.extents import Extents, OnDisk, Pending, Place, term_runs
from marble.logstore.plan import Plan, Work, gather, plan_frames
from marble.logstore.reader import Reader
from marble.logstore.repair import create_segment, prepare_directory, repair
from marble.logstore.replay import GroupState, Replay, check_hard_state
from marble.logstore.room import REST_BYTES, Room
from marble.logstore.scan import RecoveryReport, Scan, Tail
from marble.logstore.segment import FRAME_BYTES_LIMIT, WINDOW_BYTES, MarkFile, Still, segment_path
from marble.types import INDEX_MAX, HardState

_MIB = 1024 * 1024
_READ_BYTES_MAX = 1024 * _MIB
"""A batch has 32-bit offsets; no read makes a larger one, whatever it was asked for."""


@dataclass(frozen=True, slots=True)
class LogOptions:
    """Limits of a log.

    - ``segment_bytes_max``: a segment is continued while what comes next fits; at least one sync goes into each.
    - ``cache_bytes_max``: frames kept in memory after they were written or read.
    - ``frame_bytes_max``: no frame that is written is longer, so no entry either.
    - ``rest_bytes``: a log to which less is written in `marble.logstore.room.REST_S` keeps no spare segments.
    """

    segment_bytes_max: int = 64 * _MIB
    cache_bytes_max: int = 64 * _MIB
    frame_bytes_max: int = 64 * _MIB
    rest_bytes: int = REST_BYTES

    def __post_init__(self) -> None:
        if not _MIB <= self.frame_bytes_max <= FRAME_BYTES_LIMIT:
            raise UsageError(f"frame_bytes_max {self.frame_bytes_max} is not within 1 MiB to 1 GiB")
        for name, least in (("segment_bytes_max", 4096), ("cache_bytes_max", 0), ("rest_bytes", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} {getattr(self, name)} is below {least}")

    @property
    def entry_bytes_max(self) -> int:
        """The largest payload that fits a frame."""
        return self.frame_bytes_max - frame.OVERHEAD_BYTES_MAX - frame.ROW_BYTES_MAX


class Log:
    """See the head of this module. Made by `Log.open`."""

    def __init__(self, files: Files, options: LogOptions, scan: Scan, writable: bool) -> None:
        self._files = files
        self._options = options
        self._writable = writable
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._purge_lock = threading.Lock()
        self._states: dict[int, HardState] = {}
        self._starts: set[int] = set()
        self._queue: list[tuple[Extents, Pending, int]] = []
        self._cache = FrameCache(options.cache_bytes_max)
        self._failure: str | None = None
        self._closed = False
        self._file: AppendFile | None = None
        replay = Replay(files, scan)
        self._extents = replay.extents
        self._groups = replay.groups
        self._report = scan.report
        self._tail = scan.tail
        self._sealed = scan.sealed
        self._sealed_bytes = sum(scan.sealed.values())
        self._first_segment = scan.first_segment
        self._mark = MarkFile(files, scan.mark)
        self.room = Room(files, options.segment_bytes_max, options.rest_bytes)
        """Whoever opens the log writable asks `Room.rests` now and then, and calls `purge` if it does."""
        if writable and not self._report.lost_durable_bytes:
            self._continue()

    @classmethod
    def open(cls, files: Files, options: LogOptions | None = None, writable: bool = True) -> Log:
        """Read the log below ``log/`` of `files` from its beginning and get ready to continue it, or start one.

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
        """Bytes of the log on disk, without the room behind its end (`marble.logstore.room`)."""
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
            last, purged = (0, 0) if extents is None else (extents.last_index, extents.purged_index)
            end = last
            if entries is not None:
                first, first_term, last_term, nbytes, largest = frame.check_entries(entries, group)
                limit = self._options.entry_bytes_max
                if largest > limit:
                    raise UsageError(
                        f"an entry of {largest} bytes does not fit a frame: at most {limit}; write smaller batches"
                    )
                check(first <= last + 1, f"entries from {first} on would leave a gap behind {last} in group {group}")
                check(
                    first > max(min(old.commit, last), purged),
                    f"entries from {first} on would replace committed ones of group {group}",
                )
                if extents is not None:
                    check(first_term >= extents.term_at(first - 1), f"terms fall at entry {first} of group {group}")
                end = first + entries.num_rows - 1
            if hard_state is not None:
                check_hard_state(group, old, hard_state)
                # A crash may keep this and not what comes after it: it must not call an older log committed.
                check(
                    hard_state.commit <= end,
                    f"commit index {hard_state.commit} of group {group} passes the log, which ends at {end}",
                )
            if extents is None:
                extents = self._extents[group] = Extents()
            if hard_state is not None:
                extents.hard_state = self._states[group] = hard_state
            if entries is not None:
                runs = term_runs(entries, first, first_term, last_term)
                pending = extents.add(first, first + entries.num_rows, runs, entries)
                self._queue.append((extents, pending, nbytes))

    def start_after(self, group: int, index: int, term: int, hard_state: HardState | None = None) -> None:
        """Forget the entries of `group` up to `index`, whose term is `term`: a durable snapshot holds what they did.

        If entry `index` is in the log, those after it stay. Otherwise the snapshot comes from another node, all entries
        of the group go, and the log goes on behind `index`, which may be beyond its end. It takes effect at once and is
        durable after the next `sync`, before any entry appended since the last one. If the log goes on behind `index`
        already, that stays so.

        Parameters
        ----------
        group
            Number of the Raft group, a uint32.
        index, term
            Where the snapshot stands.
        hard_state
            Replaces the group's, as in `append`, in one step with the rest: the commit index that a snapshot brings must
            not be durable without it, and another thread may sync between two calls.

        Raises
        ------
        UsageError
            The log is closed or was not opened writable.
        InvariantError
            An earlier sync failed; or the log goes on behind a later entry already, or a committed entry has another
            term. Nothing was changed.
        """
        with self._lock:
            self._check_writable()
            check(0 < index <= INDEX_MAX and 0 < term <= INDEX_MAX, f"no entry is at {index} in term {term}")
            extents = self._extents.get(group) or Extents()
            purged, on_disk = extents.purged_index, extents.on_disk
            check(index >= purged, f"the log of group {group} begins behind {purged}, not {index}")
            if purged <= index <= min(max(purged, on_disk.hard_state.commit), extents.last_index):
                found = extents.term_at(index)
                check(found == term, f"committed entry {index} of group {group} has term {found}, not {term}")
            if hard_state is not None:
                check_hard_state(group, extents.hard_state, hard_state)
                end = max(index, extents.last_index)
                check(
                    hard_state.commit <= end,
                    f"commit index {hard_state.commit} of group {group} passes the log, which ends at {end}",
                )
            self._extents[group] = extents
            if index > purged:
                extents.start_after(index, term)
                self._starts.add(group)
            if hard_state is not None:
                extents.hard_state = self._states[group] = hard_state

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
                if not self._states and not self._starts and not self._queue:
                    return
                work = gather(self._states, self._starts, self._queue, self._extents)
                self._states, self._starts, self._queue = {}, set(), []
            try:
                self._write(work)
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
                        self._cut_room()
                        self._mark.write(self._tail.segment, self._tail.end, self._tail.chain, both_slots=True)
                        self.room.drop()
        except OSError as error:
            raise InvariantError(f"the log could not be closed in order: {error}") from error
        finally:
            with self._purge_lock:
                # A purge that went on after the files were given back would meet their next owner.
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

    def _write(self, work: Work) -> None:
        if self._file is None:
            self._continue()
        plans = plan_frames(work.states, work.starts, work.items, self._options.frame_bytes_max)
        end, estimate = self._tail.end, sum(plan.nbytes for plan in plans)
        if end > max(self._tail.opening, frame.METADATA_BYTES_MAX) and end + estimate > self._options.segment_bytes_max:
            self._roll()
        file, tail = self._file, self._tail
        assert file is not None
        segment, synced, end, chain = tail.segment, tail.end, tail.end, tail.chain
        written: list[tuple[Plan, int, pa.RecordBatch, int]] = []
        for plan in plans:
            ranges = [(item.batch, row, stop) for item, row, stop in plan.ranges]
            data, batch, chain = frame.encode(plan.states, ranges, segment, end, synced, chain, plan.starts)
            file.write(memoryview(data), self.room.behind(end, file.room, data.size))
            written.append((plan, end, batch, data.size))
            end += data.size
        file.sync()
        with self._lock:
            self._tail = Tail(segment, end, end, chain, end, tail.opening)
            for plan, offset, batch, length in written:
                at = len(plan.states) + len(plan.starts)
                for item, row, stop in plan.ranges:
                    place = Place(item.first + row, item.first + stop, segment, offset, length, at)
                    item.extents.settle(item.pending, place)
                    at += stop - row
                self._cache.remember(segment, offset, batch, length)
            work.note_durable(self._extents, segment)
        self._mark.write(segment, end, chain)

    def _groups_on_disk(self) -> dict[int, OnDisk]:
        with self._lock:
            found = {group: extents.on_disk for group, extents in self._extents.items() if extents.on_disk.known}
        return dict(sorted(found.items()))

    def _roll(self) -> None:
        """Go on in a new segment. All before it is durable: nothing has been written since the last sync."""
        tail, groups = self._tail, self._groups_on_disk()
        self._cut_room()
        assert self._file is not None  # `_write` has opened it; the line is for the type checker.
        self._file.close()
        self._file, new_tail = create_segment(self._files, tail.segment + 1, tail.chain, groups, self.room)
        with self._lock:
            self._sealed[tail.segment] = tail.end
            self._sealed_bytes += tail.end
            self._tail = new_tail
        self._mark.write(new_tail.segment, new_tail.end, new_tail.chain)

    def _cut_room(self) -> None:
        """Let the last segment end with its last frame, durably."""
        if self._file is not None and self._file.room:
            self._files.truncate(segment_path(self._tail.segment), self._tail.end)

    def _continue(self) -> None:
        """Repair the end that the scan found and open it. Put off to the first sync when durable bytes were lost."""
        lost = self._report.lost_durable_bytes > 0
        self._file, self._tail = repair(self._files, self._tail, self._groups_on_disk(), self.room, mark_is_ahead=lost)
        if lost:
            # Neither slot may speak of the lost bytes any more.
            self._mark = MarkFile(self._files, None)
        self._mark.write(self._tail.segment, self._tail.end, self._tail.chain)

    @contextlib.contextmanager
    def still(self) -> Iterator[Still]:
        """Keep the log's files as they are while this is entered: nothing is synced, nothing purged. Raises as `purge`."""
        with self._purge_lock, self._sync_lock:
            self._check_writable()
            check(self._file is not None, "the log has lost what had been durable, and waits for its first sync")
            yield Still.of(sorted(self._sealed), self._tail.segment, self._tail.end, self._tail.chain)

    def holders(self) -> tuple[int, ...]:
        """The groups of which something that is needed lies in the first segment, ascending: nothing can be purged before
        a snapshot lets each of them begin later."""
        with self._lock:
            first = self._first_segment
            return tuple(sorted(g for g, extents in self._extents.items() if extents.on_disk.oldest_segment == first))

    def purge(self) -> int:
        """Delete the first segments, up to one that holds something that is still needed, and return how many bytes
        of the log went.

        Needed is what the disk says is needed: what `start_after` or a truncation has made superfluous stays until a
        sync has covered that. The segment that is being written stays.

        Raises
        ------
        UsageError
            The log is closed or was not opened writable.
        InvariantError
            The disk failed, now or earlier. Whatever is left of the log is whole.
        """
        freed = 0
        with self._purge_lock:
            with self._lock:
                self._check_writable()
                if self._file is None:
                    return 0
                end = self._tail.segment
                for extents in self._extents.values():
                    end = min(end, extents.on_disk.oldest_segment or end)
            try:
                for segment in range(self._first_segment, end):
                    self.room.retire(segment, self._sealed[segment])
                    with self._lock:
                        self._cache.forget(segment)
                        self._first_segment = segment + 1
                        nbytes = self._sealed.pop(segment)
                        self._sealed_bytes -= nbytes
                    freed += nbytes
                self.room.tidy()
            except BaseException as error:
                self._failure = f"{type(error).__name__}: {error}"
                if not isinstance(error, Exception):
                    raise
                raise InvariantError(f"the log could not be purged ({self._failure}): this node must stop") from error
        return freed

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
        reader = Reader(self._files, group, bytes_max)
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
                    cached = self._cache.recall(found.segment, found.offset)
                    rows = None if cached is None else cached.slice(found.row, found.end - index)
            if rows is None:
                assert isinstance(found, Place)
                try:
                    rows, batch = reader.load(found)
                except (CorruptionError, OSError) as error:
                    with self._lock:
                        # Whoever reads what another thread purges, and perhaps writes over, asks for what is not there.
                        self._find(group, index, end)
                    if isinstance(error, CorruptionError):
                        raise
                    raise InvariantError(f"the log could not be read ({error}): mend the disk") from error
                with self._lock:
                    self._cache.remember(found.segment, found.offset, batch, found.length)
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
