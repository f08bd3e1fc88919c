"""Purging: the space of what snapshots hold is given back, and nothing that is needed goes with it."""

from __future__ import annotations

import threading

import pytest
from logstore.late import THREES, UNCACHED, filled, groups_of
from logstore.support import SEGMENT, SYNCED, disk, entries, frame_ends
from logstore.test_log import rows_of

from marble.errors import CorruptionError, InvariantError, UsageError
from marble.logstore.log import Log, LogOptions
from marble.logstore.segment import segment_numbers
from marble.logstore.show import rows as shown
from marble.testing.disk import SimulatedFiles
from marble.types import HardState


def test_purge_frees_the_segments_that_nobody_needs() -> None:
    files, log = filled(options=LogOptions(segment_bytes_max=14_000))
    numbers = segment_numbers(files)
    assert numbers == [1, 2, 3, 4]
    assert log.purge() == 0, "all is needed"
    log.start_after(1, 6, 1)
    assert log.purge() == 0, "and would be after a crash"
    log.sync()
    before = log.nbytes
    freed = log.purge()
    assert segment_numbers(files) == [3, 4]
    assert freed > 8192
    assert {segment for segment, _ in log._cache._frames} <= {3, 4}, "frames that are gone take no memory"
    assert log.nbytes == before - freed == sum(frame_ends(files, SEGMENT(n), n)[-1] for n in (3, 4))
    assert log.purge() == 0
    assert rows_of(log, 7, 11) == [(7, 1), (8, 1), (9, 1), (10, 1)]
    log.start_after(1, 10, 1)
    log.sync()
    log.purge()
    assert segment_numbers(files) == [4], "the one that is being written stays"
    log.append(1, None, entries(11, [1]))
    log.close()
    found = groups_of(files)
    assert (found[1].purged_index, found[1].last_index) == (10, 11)
    assert found[2].hard_state == HardState(7, 3, 0), "a vote does not go with its segment"
    reader = Log.open(files, THREES, writable=False)
    assert reader.nbytes == files.size(SEGMENT(4))
    with pytest.raises(UsageError, match="reading only"):
        reader.purge()


def test_segment_stays_while_any_group_needs_it() -> None:
    files, log = filled(3)
    log.append(5, None, entries(1, [1], group=5))
    log.sync()
    held = segment_numbers(files)[-1]
    assert (log.holders(), held) == ((1, 5), 1)
    for first in range(4, 14):
        log.append(1, None, entries(first, [1], size=2000))
        log.sync()
    log.start_after(1, 13, 1)
    log.sync()
    log.purge()
    assert segment_numbers(files)[0] == held
    assert log.holders() == (5,)
    log.append(5, None, entries(1, [2], group=5, mark=1))
    log.purge()
    assert segment_numbers(files)[0] == held, "the old entry comes back if the power goes now"
    log.sync()
    assert log.holders() == ()
    log.purge()
    assert segment_numbers(files)[0] > held
    log.close()
    assert [row["session"] for row in groups_of(files)[5].rows] == [1]


def test_purge_goes_on_after_a_restart() -> None:
    files, log = filled()
    log.start_after(1, 6, 1)
    log.sync()
    files.crash()
    log = Log.open(files, THREES)
    assert log.purge() > 0
    assert segment_numbers(files) == [3, 4]
    log.close()
    assert groups_of(files)[1].last_index == 10


def test_purge_waits_while_lost_bytes_are_not_accepted() -> None:
    files, log = filled()
    log.start_after(1, 6, 1)
    log.append(1, None, entries(11, [1]))
    log.sync()
    log.append(1, None, entries(12, [1]))
    log.close()
    files.cut(SEGMENT(4), files.size(SEGMENT(4)) - 64)
    log = Log.open(files, THREES)
    assert log.report.lost_durable_bytes > 0
    assert log.purge() == 0
    assert segment_numbers(files) == [1, 2, 3, 4]
    log.append(1, None, entries(12, [1]))
    log.sync()
    assert log.purge() > 0


def test_failed_purge_ends_the_log_and_leaves_it_whole() -> None:
    for operation in (1, 2, 3, 4):
        files, log = filled()
        log.start_after(1, 6, 1)
        log.sync()
        before = groups_of(files)
        files.fail_at = files.operations + operation
        with pytest.raises(InvariantError, match="could not be purged"):
            log.purge()
        with pytest.raises(InvariantError, match="has failed"):
            log.append(1, None, entries(11, [1]))
        assert groups_of(files) == before
        files.crash()
        assert groups_of(files, writable=True) == before


def test_read_of_what_is_purged_meanwhile_says_that_it_is_not_there() -> None:
    files, log = filled(options=UNCACHED)

    class Purging:
        """Purges in the middle of the first read, as another thread would."""

        done = False

        def __call__(self, path: str) -> int:
            if not self.done:
                self.done = True
                log.start_after(1, 6, 1)
                log.sync()
                assert log.purge() > 0
            return SimulatedFiles.size(files, path)

    files.size = Purging()  # type: ignore[method-assign]
    with pytest.raises(InvariantError, match="the log has 7 to 10"):
        log.read(1, 1, 4)


def test_purge_and_appends_by_three_threads() -> None:
    files = disk()
    log = Log.open(files, THREES)
    count, errors = 300, []
    appended, synced = threading.Semaphore(0), threading.Semaphore(0)

    def syncing() -> None:
        try:
            for _ in range(count):
                assert appended.acquire(timeout=30)
                log.sync()
                synced.release()
        except BaseException as error:
            errors.append(error)

    def purging() -> None:
        try:
            for _ in range(count):
                assert synced.acquire(timeout=30)
                log.purge()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=syncing), threading.Thread(target=purging)]
    for thread in threads:
        thread.start()
    for index in range(1, count + 1):
        log.append(1, HardState(1, 1, index - 1), entries(index, [1], size=500))
        if index % 10 == 0:
            log.start_after(1, index - 5, 1)
        assert log.read(1, index, index + 1).num_rows == 1
        appended.release()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert errors == []
    log.close()
    found = groups_of(files)[1]
    assert (found.purged_index, found.last_index) == (count - 5, count)
    assert len(segment_numbers(files)) <= 3


# -- what a start makes of a log that begins late ----------------------------------------------------------------------


def purged_log() -> SimulatedFiles:
    """Segments 3 and 4 of `filled`, with entries 7 to 10 behind a snapshot at 6, and two more frames."""
    files, log = filled()
    log.start_after(1, 6, 1)
    log.sync()
    log.purge()
    log.append(1, HardState(2, 2, 10), entries(11, [2]))
    log.sync()
    log.append(2, HardState(8, 1, 0), None)
    log.close()
    assert segment_numbers(files) == [3, 4]
    return files


@pytest.mark.parametrize(("kept", "is_whole"), [(2, True), (3, True), (4, False)])
def test_early_segments_may_be_gone_if_nothing_in_them_is_needed(kept: int, is_whole: bool) -> None:
    files, log = filled()
    log.start_after(1, 6, 1)
    log.append(1, None, entries(11, [1]))
    log.close()
    before = groups_of(files)
    for number in range(1, kept):
        files.delete(SEGMENT(number))
    if is_whole:
        assert groups_of(files) == before
        return
    with pytest.raises(CorruptionError, match="a segment is missing, and with it entries 7 to 9 of group 1") as caught:
        Log.open(files, THREES)
    assert caught.value.path == "simulated:" + SEGMENT(kept - 1)


def test_segment_is_missing_although_its_entries_are_replaced_in_part() -> None:
    files, log = filled()
    log.append(1, None, entries(10, [2, 2], mark=1))
    log.close()
    for number in (1, 2, 3):
        files.delete(SEGMENT(number))
    with pytest.raises(CorruptionError, match="entries 1 to 9 of group 1"):
        Log.open(files, THREES)


@pytest.mark.parametrize("all_of_it", [False, True])
def test_absent_entries_may_be_replaced_or_purged_later(all_of_it: bool) -> None:
    files = disk()
    log = Log.open(files, THREES)
    log.append(1, None, entries(1, [1, 1, 1], size=3500))
    log.sync()
    log.append(2, None, entries(1, [1], group=2, size=2500))
    log.sync()
    assert segment_numbers(files) == [1, 2]
    if all_of_it:
        log.append(1, None, entries(1, [2, 2], mark=1))
    else:
        log.append(1, None, entries(3, [2, 2, 2], mark=1))
        log.sync()
        log.start_after(1, 1, 1)
        log.sync()
        assert log.purge() == 0
        log.start_after(1, 2, 1)
    log.sync()
    assert log.purge() > 0
    log.close()
    found = groups_of(files)[1]
    assert [row["index"] for row in found.rows] == ([1, 2] if all_of_it else [3, 4, 5])
    assert {row["term"] for row in found.rows} == {2}


def test_one_flipped_bit_anywhere_in_a_purged_log_is_never_silent() -> None:
    files = purged_log()
    before = groups_of(files)
    for number in (3, 4):
        path = SEGMENT(number)
        for byte in range(0, files.size(path), 3):
            files.flip_bit(path, 8 * byte + byte % 8)
            with pytest.raises(CorruptionError) as caught:
                Log.open(files, THREES, writable=False)
            assert caught.value.path == "simulated:" + path
            files.flip_bit(path, 8 * byte + byte % 8)
    assert groups_of(files) == before


def test_opening_of_the_first_segment_is_no_torn_tail() -> None:
    """It is the last one, too, and the mark is as old as the file: but the segments before it are gone."""
    files, log = filled()
    log.start_after(1, 10, 1)
    log.sync()
    log.purge()
    log.close()
    assert segment_numbers(files) == [4]
    files.delete(SYNCED)
    whole = files.read(SEGMENT(4))
    for size in (0, 64, 767, 1500):
        files.put(SEGMENT(4), whole[:size])
        with pytest.raises(CorruptionError, match="for which the ones before it were purged"):
            Log.open(files, THREES)


def test_torn_opening_is_made_anew_with_its_base() -> None:
    files, log = filled()
    log.close()
    before = groups_of(files)
    opening = files.read(SEGMENT(4))[:2500]
    header = 960
    for size in (0, 64, header - 1, header, header + 64, header + 700):
        torn = disk()
        for number in (1, 2, 3):
            torn.put(SEGMENT(number), files.read(SEGMENT(number)))
        torn.put(SEGMENT(4), opening[:size])
        log = Log.open(torn, THREES)
        assert (log.report.cut_offset, log.report.cut_bytes) == (0, size)
        last = log.last_index(1)
        assert last == 9
        log.start_after(1, last, 1)
        log.append(1, None, entries(last + 1, [1]))
        log.sync()
        log.purge()
        log.close()
        assert segment_numbers(torn) == [4]
        found = groups_of(torn)
        assert found[2] == before[2]
        assert (found[1].purged_index, found[1].last_index) == (last, last + 1)


def test_mark_that_is_older_than_the_first_segment_does_no_harm() -> None:
    files, log = filled(4)
    mark = files.read(SYNCED)
    for first in range(5, 11):
        log.append(1, None, entries(first, [1], size=2000))
        log.sync()
    log.start_after(1, 10, 1)
    log.sync()
    log.purge()
    log.close()
    before = groups_of(files)
    files.put(SYNCED, mark)
    assert groups_of(files, writable=True) == before


def test_hole_between_segments_is_damage_even_if_nothing_in_it_is_needed() -> None:
    files, log = filled()
    log.start_after(1, 10, 1)
    log.close()
    files.delete(SEGMENT(2))
    with pytest.raises(CorruptionError, match="a segment is missing") as caught:
        Log.open(files, THREES)
    assert caught.value.path == "simulated:" + SEGMENT(2)


def test_rows_of_a_purged_log_are_shown() -> None:
    found = list(shown(purged_log()))
    base = [(row.group, row.kind, row.index, row.term, row.session, row.sequence) for row in found[:4]]
    assert base == [
        (1, "HARD_STATE", 5, 1, 1, 0),
        (2, "HARD_STATE", 0, 7, 3, 0),
        (1, "SNAPSHOT", 0, 0, 0, 6),
        (2, "SNAPSHOT", 0, 0, 0, 0),
    ]
    assert all(row.checksum_ok for row in found)
    assert all(row.truncates == 0 for row in found)
    assert {row.segment for row in found} == {3, 4}
    files, log = filled(3)
    log.start_after(1, 3, 2)
    log.close()
    last = list(shown(files))[-1]
    assert (last.kind, last.index, last.term, last.sequence, last.truncates) == ("SNAPSHOT", 3, 2, 3, 0)
    log = Log.open(files, THREES)
    log.append(1, None, entries(4, [2, 2]))
    log.start_after(1, 4, 3)
    log.close()
    assert list(shown(files))[-1].truncates == 0
