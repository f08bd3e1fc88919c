"""Room behind the log's end: zeros that were written ahead, and purged segments that are written over."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from logstore.recycling import KIB, OPTIONS, read_by_arrow, recycled, write_segments
from logstore.support import SEGMENT, SMALL, SYNCED, contents, disk, entries, frame_ends, reopened

from marble._core import frame
from marble.env import Files, SystemFiles
from marble.errors import CorruptionError, InvariantError
from marble.logstore.log import Log, LogOptions
from marble.logstore.room import TERMINATOR_BYTES, zeros_behind
from marble.logstore.segment import segment_numbers
from marble.logstore.show import rows as shown
from marble.testing.disk import SECTOR_BYTES, SimulatedFiles

# -- how much ----------------------------------------------------------------------------------------------------------


def test_small_frames_go_into_room_and_leave_the_size_of_the_file_alone() -> None:
    files = disk()
    log = Log.open(files)
    sizes = []
    for index in range(1, 201):
        log.append(1, None, entries(index, [1]))
        log.sync()
        sizes.append(files.size(SEGMENT(1)))
        assert read_by_arrow(files, 1) == list(range(1, index + 1))
    assert sizes[0] < 20 * KIB, "a log of one entry is a small file"
    assert len(set(sizes)) < 10, "the file grows seldom"
    assert log.nbytes == frame_ends(files, SEGMENT(1), 1)[-1] < sizes[-1]
    assert not any(files.read(SEGMENT(1), log.nbytes))
    log.close()
    assert files.size(SEGMENT(1)) == log.nbytes, "a closed log has no room"


def test_long_frames_have_no_zeros_written_ahead() -> None:
    files = disk()
    log = Log.open(files)
    for index in range(1, 4):
        log.append(1, None, entries(index, [1], size=50 * KIB))
        log.sync()
        assert files.size(SEGMENT(1)) == log.nbytes


@pytest.mark.parametrize("nbytes", [64, 832, 4096, 20 * KIB, 32 * KIB, 33 * KIB, 500 * KIB])
def test_zeros_end_what_is_written_and_stay_within_bounds(nbytes: int) -> None:
    for end, room, limit in itertools.product(
        (832, 4096, 70_016, 1 << 20), (0, 4096, 40 * KIB, 1 << 20), (8192, 1 << 21)
    ):
        zeros = zeros_behind(end, room, nbytes, limit)
        after = end + nbytes
        assert zeros == 0 or zeros >= TERMINATOR_BYTES
        assert zeros <= 256 * KIB
        if nbytes + TERMINATOR_BYTES + 4096 <= room:
            assert 0 < zeros < TERMINATOR_BYTES + 4096
            assert (after + zeros) % 4096 == 0
        elif nbytes + zeros > room:
            assert zeros == 0 or after + zeros <= limit
            assert zeros == 0 or nbytes <= 32 * KIB


def test_a_segment_that_is_followed_by_another_has_no_room() -> None:
    files = disk()
    log = Log.open(files, SMALL)
    for index in range(1, 31):
        log.append(1, None, entries(index, [1]))
        log.sync()
        numbers = segment_numbers(files)
        for number in numbers[:-1]:
            assert frame_ends(files, SEGMENT(number), number)[-1] == files.size(SEGMENT(number))
        assert files.size(SEGMENT(numbers[-1])) <= SMALL.segment_bytes_max
    assert numbers[-1] > 2


# -- what a crash leaves of a write over room --------------------------------------------------------------------------


def torn(files: SimulatedFiles, before: bytes, after: bytes, sectors: Sequence[int]) -> SimulatedFiles:
    """The disk with segment 4 as it was `before`, but for those `sectors` of what was written since."""
    data = bytearray(before)
    for sector in sectors:
        at = slice(sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES)
        data[at] = after[at]
    copy = files.copy()
    copy.put(SEGMENT(4), bytes(data))
    return copy


def last_write(size: int = 900) -> tuple[SimulatedFiles, bytes, bytes, bytes, list[int], int]:
    """A disk on which one more frame is written over room of old frames: disk, mark, and segment before it, segment with
    it, the sectors that it changed, and the index before it."""
    files = disk()
    log, following = recycled(files)
    # Where the room was of the former frame, old bytes have to be under this one, too.
    log.append(1, None, entries(following, [1], size=3000))
    log.sync()
    mark, before = files.read(SYNCED), files.read(SEGMENT(4))
    log.append(1, None, entries(following + 1, [1], size=size))
    log.sync()
    after = files.read(SEGMENT(4))
    assert len(before) == len(after)
    starts = range(0, len(after), SECTOR_BYTES)
    changed = [i // SECTOR_BYTES for i in starts if before[i : i + SECTOR_BYTES] != after[i : i + SECTOR_BYTES]]
    return files, mark, before, after, changed, following


def subsets(items: Sequence[int]) -> Iterator[Sequence[int]]:
    """All of the sectors at the front, where the frame is; the zeros behind it come or stay together."""
    front, zeros = items[:6], items[6:]
    for kept in itertools.chain.from_iterable(itertools.combinations(front, n) for n in range(len(front) + 1)):
        yield kept
        yield (*kept, *zeros)


def test_any_subset_of_the_sectors_of_the_last_write_is_the_write_or_a_torn_tail() -> None:
    files, mark, before, after, changed, last = last_write()
    assert len(changed) > 6
    files.put(SYNCED, mark)
    for kept in subsets(changed):
        left = torn(files, before, after, kept)
        log = Log.open(left, OPTIONS)
        assert log.report.lost_durable_bytes == 0
        whole = frame.check(left.read(SEGMENT(4)), (end := frame_ends(files, SEGMENT(4), 4)[-2]), 4, end, 1 << 20)
        assert log.last_index(1) == last + isinstance(whole, frame.Seal)
        assert len(contents(log)[1][1]) == log.last_index(1) - 2
        assert (log.report.cut_bytes > 0) == (bool(kept) and changed[0] in kept and log.last_index(1) == last)
        log.append(1, None, entries(log.last_index(1) + 1, [2]))
        log.close()
        assert len(reopened(left, OPTIONS)[1][1]) == log.last_index(1) - 2


def test_missing_sectors_of_what_was_synced_are_damage() -> None:
    """Zeros or old bytes where a durable frame has been: the mark tells, or a frame behind it."""
    files, _, before, after, changed, last = last_write()
    holes = bytes(len(after))
    for kept in subsets(changed):
        for old in (before, holes):
            data = bytearray(after)
            for sector in set(changed) - set(kept):
                at = slice(sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES)
                data[at] = old[at]
            if frame_is_whole(bytes(data), after):
                continue
            left = files.copy()
            left.put(SEGMENT(4), bytes(data))
            with pytest.raises(CorruptionError, match="had been synced"):
                Log.open(left, OPTIONS)
    log = Log.open(files, OPTIONS)
    log.append(1, None, entries(last + 2, [1]))
    log.sync()
    end = frame_ends(files, SEGMENT(4), 4)[-3]
    log.close()
    files.delete(SYNCED)
    for first in (end, end + 600, end + 700):
        data = bytearray(files.read(SEGMENT(4)))
        data[first : first + 64] = bytes(64)
        left = files.copy()
        left.put(SEGMENT(4), bytes(data))
        with pytest.raises(CorruptionError, match="sound frames behind it") as caught:
            Log.open(left, OPTIONS)
        assert caught.value.offset == end


def frame_is_whole(data: bytes, after: bytes) -> bool:
    end = len(after)
    while not any(after[end - TERMINATOR_BYTES : end]):
        end -= TERMINATOR_BYTES
    starts = [0]
    while (seal := frame.check(after, starts[-1], 4, starts[-1], 1 << 20)) and isinstance(seal, frame.Seal):
        starts.append(starts[-1] + seal.length)
    return data[: starts[-1]] == after[: starts[-1]]


def test_no_bit_of_the_room_counts() -> None:
    files = disk()
    recycled(files)
    before, end = reopened(files, OPTIONS), frame_ends(files, SEGMENT(4), 4)[-1]
    size = files.size(SEGMENT(4))
    for byte in (*range(end, end + 2 * TERMINATOR_BYTES), *range(end + 2 * TERMINATOR_BYTES, size, 997)):
        files.flip_bit(SEGMENT(4), 8 * byte + byte % 8)
        log = Log.open(files, OPTIONS, writable=False)
        assert log.report.lost_durable_bytes == 0
        assert (log.report.cut_bytes > 0) == (byte < end + TERMINATOR_BYTES)
        files.flip_bit(SEGMENT(4), 8 * byte + byte % 8)
    assert reopened(files, OPTIONS) == before


def test_a_frame_that_was_torn_away_does_not_come_back() -> None:
    """Two frames in one write; a crash keeps the second one only. Then the first one is written again, as it was."""
    options = LogOptions(frame_bytes_max=1 << 20)
    files = disk()
    log = Log.open(files, options)
    log.append(1, None, entries(1, [1]))
    log.sync()
    mark, start = files.read(SYNCED), log.nbytes
    first, second = entries(2, [1] * 11, size=90_000), entries(13, [1], size=90_000)
    log.append(1, None, first)
    log.append(1, None, second)
    log.sync()
    files.put(SYNCED, mark)
    ends = frame_ends(files, SEGMENT(1), 1)
    assert ends[2] == start
    assert len(ends) == 5
    files.flip_bit(SEGMENT(1), 8 * (start + 5000))
    log = Log.open(files, options)
    assert log.last_index(1) == 1
    log.append(1, None, first)
    log.sync()
    # The same bytes as before: were the second frame still there, it would follow them.
    assert frame_ends(files, SEGMENT(1), 1) == ends[:4]
    files.crash()
    assert len(reopened(files, options)[1][1]) == 12


# -- a full disk -------------------------------------------------------------------------------------------------------


def test_room_is_used_while_the_disk_is_full() -> None:
    files = disk()
    log = Log.open(files)
    log.append(1, None, entries(1, [1]))
    log.sync()
    files.full = True
    size, index = files.size(SEGMENT(1)), 2
    while files.size(SEGMENT(1)) - log.nbytes > 1024:
        log.append(1, None, entries(index, [1]))
        log.sync()
        index += 1
    log.append(1, None, entries(index, [1], size=1024))
    with pytest.raises(InvariantError, match="no space is left"):
        log.sync()
    assert index > 5
    assert files.size(SEGMENT(1)) < size + 4096
    files.full = False
    assert len(reopened(files, writable=True)[1][1]) == index - 1


@pytest.mark.parametrize("writes_some", [False, True])
def test_a_frame_that_fits_is_written_although_the_zeros_do_not(
    writes_some: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = SystemFiles(tmp_path)
    file = files.create("f")
    written, places = os.pwritev, []

    def full(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        places.append(offset)
        if sum(map(len, buffers)) <= 100:
            return written(descriptor, buffers, offset)
        if writes_some and not offset:
            return written(descriptor, [buffers[0][:40]], offset)
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwritev", full)
    file.write(b"x" * 100, 5000)
    assert (file.size, file.room, files.read("f")) == (100, 0, b"x" * 100)
    assert places == ([0, 40, 40] if writes_some else [0, 0])
    with pytest.raises(OSError, match="full"):
        file.write(b"y" * 101)
    file.close()


# -- readers beside a writer -------------------------------------------------------------------------------------------


class Overtaken(SimulatedFiles):
    """A disk on which something happens right behind the next read of a segment."""

    meanwhile: Any = None

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        data = super().read(path, offset, size)
        if self.meanwhile is not None and path.endswith(".arrows"):
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return data


def test_who_reads_a_log_that_is_written_meanwhile_finds_no_damage() -> None:
    """What was read of the room is older than what is found behind it."""
    files = Overtaken(disk()._random)
    log = Log.open(files, LogOptions(segment_bytes_max=64 << 20))
    for index in range(1, 300):
        log.append(1, None, entries(index, [1], size=30 * KIB))
        log.sync()
    window = 4 << 20
    assert log.nbytes > 2 * window

    def write() -> None:
        for index in range(300, 303):
            log.append(1, None, entries(index, [1], size=20 * KIB))
            log.sync()

    # The window that ends the log is read, then the writer goes on, then what lies behind that window is searched.
    stale = files.read(SEGMENT(1))
    write()
    reads = itertools.count()
    fresh = SimulatedFiles.read

    def read(path: str, offset: int = 0, size: int | None = None) -> bytes:
        found = fresh(files, path, offset, size)
        if path == SEGMENT(1) and next(reads) < 3:
            return found if offset >= len(stale) else stale[offset : offset + len(found)]
        return found

    files.read = read  # type: ignore[method-assign]
    reports: list[Any] = []
    found = [row.index for row in shown(files, reports.append)]
    assert found[:299] == list(range(1, 300))
    assert reports[0].lost_durable_bytes == 0


def test_who_reads_entries_that_are_synced_meanwhile_finds_them() -> None:
    files = Overtaken(disk()._random)
    log = Log.open(files, LogOptions(cache_bytes_max=0))
    log.append(1, None, entries(1, [1]))
    log.sync()
    log.append(1, None, entries(2, [1]))
    files.meanwhile = log.sync
    assert log.read(1, 1, 3).num_rows == 2


def test_who_reads_what_is_written_over_meanwhile_hears_that_it_is_not_there() -> None:
    files = Overtaken(disk()._random)
    log = Log.open(files, OPTIONS)
    following = write_segments(log, 1, 3)
    old = files.read(SEGMENT(1))

    def purge() -> None:
        log.start_after(1, 2, 1)
        log.sync()
        log.purge()
        write_segments(log, following, 1)
        # The reader holds the file open that has got another name and other bytes.
        files.put(SEGMENT(1), files.read(SEGMENT(4)))
        assert files.read(SEGMENT(1)) != old

    size = files.size
    calls = itertools.count()

    def purging_size(path: str) -> int:
        found = size(path)
        if next(calls) == 0:
            purge()
        return found

    files.size = purging_size  # type: ignore[method-assign]
    with pytest.raises(InvariantError, match="the log has 3 to"):
        log.read(1, 1, 3)


# -- what the disks have in common -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["system", "simulated"])
def test_both_disks_have_room(kind: str, tmp_path: Path) -> None:
    files: Files = SystemFiles(tmp_path) if kind == "system" else disk()
    files.make_directory("d")
    file = files.create("d/f")
    assert (file.size, file.room) == (0, 0)
    file.write(b"abc", 5)
    assert (file.size, file.room, files.read("d/f")) == (3, 5, b"abc" + bytes(5))
    file.write(b"de")
    assert (file.size, file.room, files.read("d/f")) == (5, 3, b"abcde" + bytes(3))
    file.write(b"fghi", 2)
    assert (file.size, file.room, files.read("d/f")) == (9, 2, b"abcdefghi" + bytes(2))
    file.sync()
    file.close()
    again = files.reuse("d/f")
    assert (again.size, again.room) == (0, 11)
    again.write(b"AB", 1)
    assert (again.size, again.room, files.read("d/f")) == (2, 9, b"AB\0defghi" + bytes(2))
    end = files.open_append("d/f")
    assert (end.size, end.room) == (11, 0)
    files.link("d/f", "d/g")
    assert not files.set_aside("d/f", "d/h")
    assert files.list("d") == ["f", "g"]
    files.remove("d/g")
    assert files.set_aside("d/f", "d/h")
    assert files.list("d") == ["h"]
    again.close()
    end.close()


def test_a_crash_keeps_any_subset_of_the_sectors_that_were_written_over() -> None:
    found = set()
    for seed in range(100):
        files = disk(seed)
        files.put("log/f", b"o" * 2 * SECTOR_BYTES)
        files.reuse("log/f").write(b"n" * 2 * SECTOR_BYTES)
        files.crash()
        data = files.read("log/f")
        assert len(data) == 2 * SECTOR_BYTES
        found.add((data[:1], data[-1:]))
    assert found == {(b"o", b"o"), (b"o", b"n"), (b"n", b"o"), (b"n", b"n")}
