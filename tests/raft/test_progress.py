"""Flow control of one peer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marble.raft.progress import Inflights, Progress, ProgressState


def make(match: int = 0, following: int = 1, state: ProgressState = ProgressState.PROBE) -> Progress:
    progress = Progress(following, Inflights(3, 100))
    progress.match_index = match
    progress.state = state
    return progress


def test_inflights_are_freed_up_to_an_index() -> None:
    window = Inflights(3, 100)
    for last, size in ((5, 10), (7, 20), (9, 30)):
        window.add(last, size)
    assert window.full
    window.free(6)
    assert (window.count, window.bytes, window.full) == (2, 50, False)
    window.free(9)
    assert (window.count, window.bytes) == (0, 0)


def test_inflights_are_full_by_bytes() -> None:
    window = Inflights(10, 100)
    window.add(1, 99)
    assert not window.full
    window.add(2, 1)
    assert window.full
    window.clear()
    assert (window.count, window.bytes, window.full) == (0, 0, False)


@pytest.mark.parametrize(
    ("index", "match", "following", "news"), [(2, 3, 5, False), (3, 3, 5, False), (4, 4, 5, True), (6, 6, 7, True)]
)
def test_update(index: int, match: int, following: int, news: bool) -> None:
    progress = make(3, 5)
    progress.paused = True
    assert progress.maybe_update(index) is news
    assert (progress.match_index, progress.next_index, progress.paused) == (match, following, not news)


@pytest.mark.parametrize(
    ("state", "match", "following", "rejected", "hint", "genuine", "after"),
    [
        # Streaming: a refusal at or below the match is old; else go back to the match.
        (ProgressState.REPLICATE, 5, 10, 5, 5, False, 10),
        (ProgressState.REPLICATE, 5, 10, 4, 4, False, 10),
        (ProgressState.REPLICATE, 5, 10, 9, 9, True, 6),
        # Probing: a refusal of anything but the last probe is old.
        (ProgressState.PROBE, 0, 10, 8, 8, False, 10),
        (ProgressState.PROBE, 0, 10, 9, 9, True, 9),
        (ProgressState.PROBE, 0, 10, 9, 2, True, 3),
        (ProgressState.PROBE, 0, 2, 1, 0, True, 1),
        # Never at or below the match, whatever the hint says.
        (ProgressState.PROBE, 4, 10, 9, 0, True, 5),
    ],
)
def test_decrease(
    state: ProgressState, match: int, following: int, rejected: int, hint: int, genuine: bool, after: int
) -> None:
    progress = make(match, following, state)
    assert progress.maybe_decrease(rejected, hint) is genuine
    assert progress.next_index == after


def test_probe_pauses_after_entries_and_replicate_when_full() -> None:
    progress = make(0, 5)
    progress.sent_entries(0, 0)
    assert not progress.paused
    progress.sent_entries(2, 10)
    assert progress.paused
    assert progress.next_index == 5
    progress.become_replicate()
    assert (progress.next_index, progress.paused) == (1, False)
    progress.sent_entries(4, 99)
    assert (progress.next_index, progress.paused) == (5, False)
    progress.sent_entries(1, 1)
    assert (progress.next_index, progress.paused, progress.inflights.count) == (6, True, 2)
    progress.become_probe()
    assert (progress.next_index, progress.paused, progress.inflights.count) == (1, False, 0)


def test_commit_is_worth_a_message_only_if_it_tells_something() -> None:
    progress = make(3, 6, ProgressState.REPLICATE)
    progress.sent_commit = 2
    assert progress.can_bump_commit(3)
    assert not progress.can_bump_commit(2)
    progress.sent_commit = 5
    assert not progress.can_bump_commit(9)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["sent", "update", "decrease", "probe", "replicate"]),
            st.integers(0, 12),
            st.integers(0, 12),
        )
    )
)
def test_match_stays_below_next_and_never_falls(steps: list[tuple[str, int, int]]) -> None:
    progress = make(0, 4)
    for name, a, b in steps:
        match = progress.match_index
        if name == "sent":
            progress.sent_entries(a % 4, b)
        elif name == "update":
            progress.maybe_update(a)
            progress.inflights.free(a)
        elif name == "decrease":
            progress.maybe_decrease(a, b)
        elif name == "probe":
            progress.become_probe()
        else:
            progress.become_replicate()
        assert match <= progress.match_index < progress.next_index
        assert progress.sent_commit < progress.next_index
        assert progress.inflights.bytes >= 0
