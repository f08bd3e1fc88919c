"""Purged segments are kept, and written over by those that come."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from logstore.recycling import KIB, OPTIONS, SPARE, read_by_arrow, recycled, spares, write_segments
from logstore.support import SEGMENT, contents, disk, entries, frame_ends, reopened

from marble.env import Files, SystemFiles
from marble.errors import InvariantError
from marble.logstore.log import Log, LogOptions
from marble.logstore.room import SPARES_MAX, TERMINATOR_BYTES
from marble.logstore.segment import segment_numbers
from marble.logstore.show import rows as shown
from marble.testing.disk import DiskCrash


@pytest.mark.parametrize("kind", ["system", "simulated"])
def test_a_purged_segment_is_written_over(kind: str, tmp_path: Path) -> None:
    files: Files = SystemFiles(tmp_path) if kind == "system" else disk()
    log, following = recycled(files)
    data, end = files.read(SEGMENT(4)), frame_ends(files, SEGMENT(4), 4)[-1]
    assert any(data[end:]), "old frames stand behind the end"
    assert not any(data[end : end + TERMINATOR_BYTES])
    assert read_by_arrow(files, 4) == [following - 1]
    assert [row["index"] for batch in log.replay(1, 3, following) for row in batch.to_pylist()] == [
        *range(3, following)
    ]
    found = reopened(files, OPTIONS)
    assert [row["index"] for row in found[1][1]] == list(range(3, following))
    reports: list[Any] = []
    assert {row.segment for row in shown(files, reports.append)} == {2, 3, 4}
    assert (reports[0].cut_path, reports[0].cut_bytes) == (None, 0), "nothing was torn"
    write_segments(log, following, 1)
    log.close()
    for number in (2, 3, 4, 5):
        assert frame_ends(files, SEGMENT(number), number)[-1] == files.size(SEGMENT(number))


def test_the_room_of_a_killed_process_goes_at_the_next_start() -> None:
    files = disk()
    _, following = recycled(files)
    end = frame_ends(files, SEGMENT(4), 4)[-1]
    assert files.size(SEGMENT(4)) > end
    log = Log.open(files, OPTIONS)
    assert log.report.cut_path is None
    assert files.size(SEGMENT(4)) == end
    assert log.last_index(1) == following - 1


def test_spares_are_few_and_go_with_the_process() -> None:
    files = disk()
    log = Log.open(files, OPTIONS)
    following = write_segments(log, 1, SPARES_MAX + 3)
    log.start_after(1, following - 2, 1)
    log.sync()
    log.purge()
    assert len(spares(files)) == SPARES_MAX
    killed = files.copy()
    log.close()
    assert spares(files) == []
    log = Log.open(killed, OPTIONS)
    assert spares(killed) == []
    assert contents(log) == reopened(files, OPTIONS)


@pytest.mark.parametrize("kind", ["system", "simulated"])
def test_a_file_with_a_further_name_is_not_written_over(kind: str, tmp_path: Path) -> None:
    """A checkpoint links the segments: what is in them must stay as it is."""
    files: Files = SystemFiles(tmp_path) if kind == "system" else disk()
    log = Log.open(files, OPTIONS)
    following = write_segments(log, 1, 4)
    files.make_directory("checkpoint")
    files.link(SEGMENT(1), "checkpoint/1")
    kept = files.read("checkpoint/1")
    log.start_after(1, 4, 1)
    log.sync()
    log.purge()
    assert spares(files) == [SPARE.replace("1", "2")]
    write_segments(log, following, 3)
    assert files.read("checkpoint/1") == kept
    log.close()


def test_segments_of_another_size_are_not_kept() -> None:
    for options in (LogOptions(segment_bytes_max=512 * KIB), LogOptions(segment_bytes_max=8 * KIB)):
        files = disk()
        log = Log.open(files, OPTIONS)
        following = write_segments(log, 1, 3)
        log.close()
        log = Log.open(files, options)
        log.start_after(1, following - 2, 1)
        log.sync()
        log.purge()
        assert segment_numbers(files)[0] > 1
        assert spares(files) == []


def test_power_lost_at_every_operation_of_a_purge_and_the_segment_that_follows() -> None:
    for seed in range(6):
        for operation in range(1, 40):
            files = disk(100 * seed + operation)
            log = Log.open(files, OPTIONS)
            following = write_segments(log, 1, 3)
            log.start_after(1, 2, 1)
            log.sync()
            files.lose_power_at = files.operations + operation
            acknowledged = following - 1
            with contextlib.suppress(DiskCrash):
                log.purge()
                for index in range(following, following + 5):
                    log.append(1, None, entries(index, [1], size=50 * KIB))
                    log.sync()
                    acknowledged = index
            files.crash()
            log = Log.open(files, OPTIONS)
            assert acknowledged <= log.last_index(1) <= acknowledged + 1
            assert log.report.lost_durable_bytes == 0
            assert contents(log)[1][1][0]["index"] == 3
            assert spares(files) == []
            last = log.last_index(1)
            write_segments(log, last + 1, 1)
            files.crash()
            assert [row["index"] for row in reopened(files, OPTIONS)[1][1]] == list(range(3, last + 3))


def test_spares_go_when_little_is_written() -> None:
    files = disk()
    log = Log.open(files, LogOptions(segment_bytes_max=1 << 20, cache_bytes_max=0))
    following = write_segments(log, 1, 3, size=400 * KIB)
    assert not log.room.rests(100.0)
    log.start_after(1, 4, 1)
    log.sync()
    log.purge()
    kept = spares(files)
    assert len(kept) == 2
    following = write_segments(log, following, 2, size=400 * KIB)
    log.start_after(1, following - 3, 1)
    log.sync()
    log.purge()
    kept = spares(files)
    assert len(kept) == 2
    assert not log.room.rests(100.9), "it is not yet time to look"
    assert not log.room.rests(101.0), "much was written since the last look"
    log.append(1, None, entries(following, [1]))
    log.sync()
    log.purge()
    assert spares(files) == kept
    assert not log.room.rests(101.9)
    assert log.room.rests(102.0)
    assert spares(files) == kept, "a look removes nothing: the engine's thread takes it"
    log.purge()
    assert spares(files) == []
    assert not log.room.rests(103.0), "there is nothing more to be removed"
    write_segments(log, following + 1, 2, size=400 * KIB)
    log.close()
    assert [row["index"] for row in reopened(files, OPTIONS)[1][1]] == list(range(following - 2, following + 5))


def test_a_spare_that_cannot_be_removed_stops_the_node() -> None:
    files = disk()
    log = Log.open(files, OPTIONS)
    write_segments(log, 1, 3)
    log.start_after(1, 2, 1)
    log.sync()
    log.purge()
    assert len(spares(files)) == 1
    assert log.room.rests(2.0)
    files.fail_at = files.operations + 1
    with pytest.raises(InvariantError, match="could not be purged"):
        log.purge()
