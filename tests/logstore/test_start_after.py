"""Snapshots in the log: it goes on behind them and forgets what they hold."""

from __future__ import annotations

import contextlib

import pytest
from logstore.late import THREES, UNCACHED, filled, groups_of
from logstore.model import Group
from logstore.support import disk, entries
from logstore.test_log import BlockingFiles, rows_of

from marble.errors import InvariantError
from marble.logstore.log import Log, LogOptions
from marble.testing.disk import DiskCrash
from marble.types import EntryKind, HardState


def test_log_goes_on_behind_a_snapshot_of_its_own() -> None:
    files, log = filled(6)
    log.append(1, None, entries(7, [2, 2]))
    log.start_after(1, 4, 1)
    assert rows_of(log, 5, 9) == [(5, 1), (6, 1), (7, 2), (8, 2)]
    with pytest.raises(InvariantError, match="the log has 5 to 8"):
        log.read(1, 4, 6)
    log.start_after(1, 7, 2)
    log.start_after(1, 7, 2)
    assert rows_of(log, 8, 9) == [(8, 2)]
    log.close()
    log = Log.open(files, THREES)
    state = log.groups[1]
    assert (state.first_index, state.last_index, state.purged_index, state.purged_term) == (8, 8, 7, 2)
    assert state.hard_state == HardState(1, 1, 7), "what is in a snapshot is committed"
    assert (state.term_index.first_index, state.term_index.term_at(7)) == (8, 2)
    assert log.last_index(1) == 8


def test_what_is_purged_takes_no_memory() -> None:
    log = Log.open(disk(), THREES)
    for index in range(1, 200):
        log.append(1, None, entries(index, [index]))
        log.sync()
        log.start_after(1, index - index % 10 or 1, index - index % 10 or 1)
    extents = log._extents[1]
    assert max(len(extents._terms), len(extents._firsts)) <= 10
    assert (extents.term_at(190), extents.term_at(195)) == (190, 195)


@pytest.mark.parametrize(("index", "term"), [(20, 3), (9, 3), (6, 2)])
def test_snapshot_of_another_node_takes_the_place_of_everything(index: int, term: int) -> None:
    files, log = filled(6)
    log.append(1, None, entries(7, [1, 1], size=64))
    log.start_after(1, index, term, HardState(4, 2, index))
    assert log.last_index(1) == index
    with pytest.raises(InvariantError, match="were asked for"):
        log.read(1, index, index + 1)
    log.append(1, None, entries(index + 1, [4], mark=1))
    log.close()
    found = groups_of(files)[1]
    assert (found.hard_state, found.purged_index, found.purged_term) == (HardState(4, 2, index), index, term)
    assert [row["session"] for row in found.rows] == [1]


def test_group_may_begin_with_a_snapshot() -> None:
    files = disk()
    log = Log.open(files, THREES)
    log.start_after(3, 10, 2, HardState(2, 0, 10))
    log.close()
    assert groups_of(files) == {3: Group(HardState(2, 0, 10), 10, 2, [])}


def test_entries_and_snapshots_of_one_sync_are_taken_in_the_order_in_which_they_came() -> None:
    files, log = filled(4)
    log.append(1, None, entries(4, [2, 2, 2], mark=1))
    log.start_after(1, 5, 2)
    log.append(1, None, entries(6, [3, 3], mark=2))
    log.start_after(1, 6, 3)
    log.append(1, None, entries(8, [3], mark=3))
    expected = [(7, 3), (8, 3)]
    assert rows_of(log, 7, 9) == expected
    before = files.operations
    log.sync()
    assert files.operations - before == 3, "one frame holds all of it"
    assert rows_of(log, 7, 9) == expected
    log.close()
    found = groups_of(files)[1]
    assert (found.purged_index, found.purged_term) == (6, 3)
    assert [row["session"] for row in found.rows] == [2, 3]


def test_entries_that_were_replaced_before_a_snapshot_do_not_come_back_behind_it() -> None:
    """Entry 7 is put back as it was, which forgets 8 and 9; the snapshot then leaves nothing of it to write."""
    files, log = filled(6)
    log.append(1, None, entries(7, [1, 1, 1]))
    log.sync()
    log.append(1, None, entries(7, [1]))
    log.start_after(1, 7, 1)
    assert log.last_index(1) == 7
    log.close()
    assert groups_of(files)[1].last_index == 7


@pytest.mark.parametrize(
    ("index", "term", "hard_state", "words"),
    [
        (3, 1, None, "begins behind 4, not 3"),
        (4, 2, None, "has term 1, not 2"),
        (5, 2, None, "committed entry 5 .* has term 1, not 2"),
        (0, 1, None, "no entry"),
        (2**63, 1, None, "no entry"),
        (9, 0, None, "no entry"),
        (9, 3, HardState(0, 0, 0), "went back"),
        (9, 3, HardState(3, 0, 10), "passes the log"),
    ],
)
def test_start_after_refuses_what_contradicts_the_log(
    index: int, term: int, hard_state: HardState | None, words: str
) -> None:
    files, log = filled(6)
    log.start_after(1, 4, 1)
    before = log.last_index(1)
    with pytest.raises(InvariantError, match=words):
        log.start_after(1, index, term, hard_state)
    assert log.last_index(1) == before
    log.close()
    assert groups_of(files)[1].purged_index == 4


def test_append_refuses_what_contradicts_a_snapshot() -> None:
    _, log = filled(6)
    log.start_after(1, 9, 5)
    for batch, words in ((entries(9, [5]), "committed"), (entries(11, [5]), "gap"), (entries(10, [4]), "terms fall")):
        with pytest.raises(InvariantError, match=words):
            log.append(1, None, batch)
    with pytest.raises(InvariantError, match="passes the log, which ends at 9"):
        log.append(1, HardState(5, 0, 10), None)
    log.append(1, HardState(5, 0, 10), entries(10, [5]))


def test_changes_of_the_membership_are_known_as_long_as_they_are_in_the_log() -> None:
    files, log = filled(2)
    for index in (3, 5, 6, 8):
        log.append(1, None, entries(index, [2], kind=EntryKind.MEMBERSHIP))
        log.append(1, None, entries(index + 1, [2, 2]))
    log.append(1, None, entries(9, [3], kind=EntryKind.MEMBERSHIP))
    log.close()
    log = Log.open(files)
    assert log.groups[1].changes == [3, 5, 6, 8, 9]
    assert log.groups[2].changes == []
    log.append(1, None, entries(8, [4]))
    log.start_after(1, 5, 2)
    log.close()
    assert Log.open(files, writable=False).groups[1].changes == [6]


def test_snapshot_while_a_sync_is_under_way() -> None:
    """The entries that are being written settle only behind the snapshot, or not at all."""
    for index, term in ((3, 1), (5, 1), (6, 1), (2, 2), (9, 4)):
        files = BlockingFiles()
        log = Log.open(files, THREES)
        log.append(1, None, entries(1, [1, 1]))
        log.sync()
        log.append(1, None, entries(3, [1, 1, 1]))
        log.append(1, None, entries(6, [1]))
        with files.blocked_sync(log):
            log.start_after(1, index, term)
            log.append(1, None, entries(max(index, 6) + 1 if term == 1 else index + 1, [5], mark=1))
            assert log.last_index(1) == (7 if term == 1 else index + 1)
        last = log.last_index(1)
        assert rows_of(log, index + 1, last + 1)[-1] == (last, 5)
        log.sync()
        live = log.read(1, index + 1, last + 1).to_pylist()
        log.close()
        log = Log.open(files, UNCACHED, writable=False)
        assert log.groups[1].purged_index == index
        assert log.read(1, index + 1, last + 1).to_pylist() == live


def test_snapshot_of_a_write_of_several_frames_brings_its_commit_index_or_nothing() -> None:
    """A commit index without its snapshot would be lowered to the last of the entries that the snapshot replaces."""
    options = LogOptions(frame_bytes_max=1 << 20)
    outcomes = set()
    for seed in range(6):
        for operation in range(1, 8):
            files = disk(seed)
            log = Log.open(files, options)
            log.append(1, HardState(1, 1, 4), entries(1, [1] * 10))
            log.sync()
            log.append(2, None, entries(1, [1] * 15, group=2, size=100_000))
            log.start_after(1, 50, 4, HardState(5, 2, 50))
            log.append(1, None, entries(51, [5] * 15, size=100_000))
            files.lose_power_at = files.operations + operation
            with contextlib.suppress(DiskCrash):
                log.sync()
            files.crash()
            log = Log.open(files, options)
            state = log.groups[1]
            outcomes.add((state.purged_index, state.last_index))
            if state.purged_index:
                assert (state.purged_index, state.purged_term) == (50, 4)
                assert state.hard_state == HardState(5, 2, 50)
            else:
                assert (state.hard_state, state.last_index) == (HardState(1, 1, 4), 10)
    assert {(0, 10), (50, 50), (50, 65)} <= outcomes
    assert len(outcomes) > 3
