"""What rows mean, one log by hand for each rule: also rows that no writer of ours makes, as another version might."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest
from logstore.support import SEGMENT, contents, disk, entries

from marble._core import frame
from marble.errors import CorruptionError
from marble.logstore.log import Log
from marble.testing.disk import SimulatedFiles
from marble.types import HardState

Frame = tuple[Sequence[tuple[int, int, int, int]], Sequence[tuple[int, int, int, int]], Sequence[pa.RecordBatch]]
"""Hard states (group, term, vote, commit), SNAPSHOT rows (group, index, term, last), entries."""


def crafted(segments: dict[int, Sequence[Frame]]) -> SimulatedFiles:
    """A log of these frames, sealed as one that was written."""
    files, chain = disk(), 7
    for number, frames in segments.items():
        header, chain = frame.encode_header("1", number, 0 if number == 1 else chain)
        data = header.to_pybytes()
        for states, starts, batches in frames:
            ranges = [(batch, 0, batch.num_rows) for batch in batches]
            at = len(data)
            made, _, chain = frame.encode(list(states), ranges, number, at, at, chain, starts)
            data += made.to_pybytes()
        files.put(SEGMENT(number), data)
    return files


def found(files: SimulatedFiles) -> dict[int, tuple[int, int, list[int]]]:
    """Of each group: purged index and term, and the terms of its entries."""
    log = Log.open(files, writable=False)
    rows = contents(log)
    return {
        group: (state.purged_index, state.purged_term, [row["term"] for row in rows[group][1]])
        for group, state in log.groups.items()
    }


NOTHING: Any = ()


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ((1, 2, 1, 5), (2, 1, [2, 2, 2])),
        ((1, 2, 1, 4), (2, 1, [2, 2])),
        ((1, 3, 2, 4), (3, 2, [2])),
        ((1, 5, 2, 5), (5, 2, [])),
        ((1, 5, 9, 5), (5, 9, [])),
        ((1, 1, 9, 1), (1, 9, [])),
        ((1, 50, 9, 50), (50, 9, [])),
        ((2, 50, 9, 50), None),
    ],
)
def test_a_snapshot_leaves_the_entries_that_it_names(start: tuple[int, int, int, int], expected: Any) -> None:
    log = [entries(1, [1, 1]), entries(3, [2, 2, 2])]
    files = crafted({1: [(NOTHING, NOTHING, log), (NOTHING, [start], NOTHING)]})
    if expected is None:
        assert found(files) == {1: (0, 0, [1, 1, 2, 2, 2]), 2: (50, 9, [])}
    else:
        assert found(files) == {1: expected}


@pytest.mark.parametrize(
    ("start", "words"),
    [
        pytest.param((1, 2, 1, 6), "stay of 5", id="entries stay that are not there"),
        pytest.param((1, 2, 2, 5), "another term", id="entries stay behind one of another history"),
        pytest.param((1, 3, 1, 2), "out of range", id="the last entry that stays is purged"),
        pytest.param((1, 0, 0, 5), "began behind 0", id="nothing"),
        pytest.param((1, 2, 0, 5), "out of range", id="no term"),
        pytest.param((1, 0, 1, 5), "out of range", id="no index"),
        pytest.param((1, 2**63, 1, 2**63), "out of range", id="an index that cannot be"),
    ],
)
def test_snapshot_that_cannot_be_is_damage(start: tuple[int, int, int, int], words: str) -> None:
    files = crafted({1: [(NOTHING, NOTHING, [entries(1, [1, 1, 2, 2, 2])]), (NOTHING, [start], NOTHING)]})
    with pytest.raises(CorruptionError, match=words) as caught:
        Log.open(files)
    assert caught.value.path == "simulated:" + SEGMENT(1)


def test_snapshot_never_goes_back() -> None:
    for later in ((1, 3, 1, 3), (1, 4, 1, 4), (1, 4, 2, 5)):
        files = crafted({1: [(NOTHING, [(1, 4, 1, 4)], [entries(5, [2])]), (NOTHING, [later], NOTHING)]})
        with pytest.raises(CorruptionError, match="began behind 4"):
            Log.open(files)


def test_entry_in_a_snapshot_is_damage() -> None:
    for batch, words in (
        (entries(4, [2]), "in a snapshot"),
        (entries(6, [2]), "a gap"),
        (entries(5, [1]), "below the log's last term"),
    ):
        files = crafted({1: [(NOTHING, [(1, 4, 2, 4)], NOTHING), (NOTHING, NOTHING, [batch])]})
        with pytest.raises(CorruptionError, match=words):
            Log.open(files)


BASE: Frame = ([(1, 3, 2, 0)], [(1, 4, 1, 6)], NOTHING)
"""Entries 5 and 6 are in segments before it."""


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        pytest.param([(NOTHING, [(1, 6, 2, 6)], NOTHING)], (6, 2, []), id="purged"),
        pytest.param([(NOTHING, [(1, 9, 2, 9)], NOTHING)], (9, 2, []), id="passed by another node's snapshot"),
        pytest.param([(NOTHING, NOTHING, [entries(5, [3, 3])])], (4, 1, [3, 3]), id="replaced"),
        pytest.param(
            [(NOTHING, NOTHING, [entries(7, [3])]), (NOTHING, [(1, 6, 2, 7)], NOTHING)], (6, 2, [3]), id="kept"
        ),
        pytest.param(
            [
                (NOTHING, NOTHING, [entries(6, [2, 3])]),
                (NOTHING, [(1, 5, 1, 7)], NOTHING),
            ],
            (5, 1, [2, 3]),
            id="replaced and purged",
        ),
        pytest.param(
            [
                (NOTHING, NOTHING, [entries(7, [2, 3])]),
                (NOTHING, [(1, 5, 1, 8)], NOTHING),
                (NOTHING, [(1, 7, 2, 8)], NOTHING),
            ],
            (7, 2, [3]),
            id="purged in two steps",
        ),
        pytest.param(
            [
                (NOTHING, NOTHING, [entries(7, [2, 3])]),
                (NOTHING, [(1, 5, 1, 5)], NOTHING),
                (NOTHING, NOTHING, [entries(6, [4])]),
            ],
            (5, 1, [4]),
            id="given up for another node's snapshot",
        ),
    ],
)
def test_absent_entries_that_become_superfluous_do_no_harm(frames: list[Frame], expected: Any) -> None:
    files = crafted({3: [BASE, *frames]})
    assert found(files) == {1: expected}
    log = Log.open(files)
    assert log.groups[1].hard_state == HardState(3, 2, max(0, expected[0]))
    log.close()


@pytest.mark.parametrize(
    ("frames", "first", "last"),
    [
        ([], 5, 6),
        ([(NOTHING, NOTHING, [entries(6, [3, 3])])], 5, 5),
        ([(NOTHING, [(1, 5, 1, 6)], NOTHING)], 6, 6),
        ([(NOTHING, NOTHING, [entries(7, [3, 3])])], 5, 6),
        ([(NOTHING, [(1, 5, 1, 6)], [entries(7, [3])]), (NOTHING, NOTHING, [entries(7, [4])])], 6, 6),
    ],
)
def test_absent_entries_that_are_needed_are_a_missing_segment(frames: list[Frame], first: int, last: int) -> None:
    files = crafted({3: [BASE, *frames]})
    with pytest.raises(
        CorruptionError, match=f"segment is missing, and with it entries {first} to {last} of"
    ) as caught:
        Log.open(files)
    assert (caught.value.path, caught.value.offset) == ("simulated:" + SEGMENT(2), 0)


FULL: Frame = ([(1, 3, 2, 0), (2, 5, 1, 0)], [(2, 4, 1, 4)], [entries(1, [1, 2])])


@pytest.mark.parametrize(
    ("states", "starts", "words"),
    [
        pytest.param([(1, 3, 2, 1), (2, 5, 1, 4)], [(1, 0, 0, 2), (2, 4, 1, 4)], "", id="as it was"),
        pytest.param([(1, 3, 0, 1), (2, 5, 1, 4)], [(1, 0, 0, 2), (2, 4, 1, 4)], "vote", id="another vote"),
        pytest.param([(1, 4, 0, 1), (2, 5, 1, 4)], [(1, 0, 0, 2), (2, 4, 1, 4)], "vote", id="another term"),
        pytest.param([(1, 3, 2, 1), (2, 5, 1, 4)], [(1, 0, 0, 1), (2, 4, 1, 4)], "another log", id="fewer entries"),
        pytest.param([(1, 3, 2, 1), (2, 5, 1, 4)], [(1, 1, 1, 2), (2, 4, 1, 4)], "another log", id="a purge"),
        pytest.param([(1, 3, 2, 1), (2, 5, 1, 4)], [(1, 0, 0, 2), (2, 4, 2, 4)], "another log", id="another history"),
        pytest.param([(1, 3, 2, 1)], [(1, 0, 0, 2)], "other groups", id="a group less"),
        pytest.param([(1, 3, 2, 1), (2, 5, 1, 4)], [(1, 0, 0, 2)], "by half", id="half a group"),
    ],
)
def test_base_agrees_with_the_frames_before_it(states: Any, starts: Any, words: str) -> None:
    files = crafted({1: [FULL], 2: [(states, starts, NOTHING), (NOTHING, NOTHING, [entries(3, [2])])]})
    if not words:
        assert found(files) == {1: (0, 0, [1, 2, 2]), 2: (4, 1, [])}
        return
    with pytest.raises(CorruptionError, match=words) as caught:
        Log.open(files)
    assert caught.value.path == "simulated:" + SEGMENT(2)


def test_base_holds_no_entries() -> None:
    files = crafted({2: [([(1, 3, 2, 1)], [(1, 0, 0, 0)], [entries(1, [1])])]})
    with pytest.raises(CorruptionError, match="holds entries"):
        Log.open(files)


def test_base_that_cannot_be_is_damage() -> None:
    for state, start in (((1, 2**63, 0, 0), (1, 0, 0, 0)), ((1, 3, 0, 0), (1, 3, 0, 3)), ((1, 3, 0, 0), (1, 3, 1, 2))):
        with pytest.raises(CorruptionError, match="out of range"):
            Log.open(crafted({2: [([state], [start], NOTHING)]}))
