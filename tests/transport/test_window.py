"""Pieces asked for ahead: everything comes, in order, whatever is lost, late, or cut otherwise than it was thought."""

from __future__ import annotations

from random import Random

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marble.transport.window import PIECES_MAX, SLOWER_TICKS, Window


def data(nbytes: int) -> pa.Buffer:
    return pa.py_buffer(bytes(nbytes))


def answer(window: Window, asked: tuple[int, int], needed: tuple[int, int], nbytes: int = 100) -> bool:
    return window.keep(*asked, data(nbytes), needed)


def test_one_question_first_then_as_many_more_as_answers_come() -> None:
    window = Window(10_000, 100)
    wanted = [(7, 0, 100_000)]
    assert list(window.plan(wanted)) == [(7, 0)]
    assert list(window.plan(wanted)) == []
    assert answer(window, (7, 0), (7, 0))
    assert [offset for offset, _ in window.take(7, 0)] == [0]
    assert list(window.plan([(7, 100, 100_000)])) == [(7, 100), (7, 200)]
    # Out of order: it is held until its turn comes, and counts.
    assert answer(window, (7, 200), (7, 100))
    assert window.take(7, 100) == []
    assert list(window.plan([(7, 100, 100_000)])) == [(7, 300)]
    assert answer(window, (7, 100), (7, 100))
    assert [offset for offset, _ in window.take(7, 100)] == [100, 200]


def test_window_ends_at_its_bytes_and_at_its_pieces() -> None:
    for bytes_max, most in ((450, 4), (1, 1), (1 << 20, PIECES_MAX)):
        window = Window(bytes_max, 100)
        offset = 0
        for _ in range(3 * PIECES_MAX):
            asked = list(window.plan([(1, offset, 1 << 30)]))
            assert len(asked) <= most
            assert answer(window, (1, offset), (1, offset))
            offset += 100 * len(window.take(1, offset))
        assert window.size == most


def test_way_that_is_full_shrinks_the_window() -> None:
    window = Window(10_000, 100)
    offset = 0
    for _ in range(20):
        list(window.plan([(1, offset, 1 << 30)]))
        answer(window, (1, offset), (1, offset))
        offset += 100 * len(window.take(1, offset))
    assert window.size == 21
    for _ in range(20):
        # Everything that is asked for from now on waits behind what is on the way.
        list(window.plan([(1, offset, 1 << 30)]))
        for _ in range(SLOWER_TICKS + 1):
            window.tick()
        answer(window, (1, offset), (1, offset))
        offset += 100 * len(window.take(1, offset))
    assert window.size == 1


def test_what_nobody_asked_for_is_not_kept_unless_it_is_needed() -> None:
    window = Window(10_000, 100)
    assert list(window.plan([(1, 0, 1000)])) == [(1, 0)]
    assert not answer(window, (1, 500), (1, 0))
    assert not answer(window, (2, 0), (1, 0))
    window.lost()
    # It was only slow.
    assert answer(window, (1, 0), (1, 0))


def test_next_file_is_asked_for_before_this_one_is_whole() -> None:
    window = Window(10_000, 100)
    list(window.plan([(1, 0, 150)]))
    answer(window, (1, 0), (1, 0))
    window.take(1, 0)
    assert list(window.plan([(1, 100, 150), (2, 0, 300)])) == [(1, 100), (2, 0)]
    assert answer(window, (2, 0), (1, 100))
    assert answer(window, (1, 100), (1, 100), 50)
    assert len(window.take(1, 100)) == 1
    window.forget(1)
    assert [(offset, piece.size) for offset, piece in window.take(2, 0)] == [(0, 100)]


def test_file_that_was_partly_here_takes_the_pieces_that_were_asked_for_from_its_beginning() -> None:
    window = Window(10_000, 100)
    list(window.plan([(1, 0, 250)]))
    answer(window, (1, 0), (1, 0))
    list(window.plan([(1, 0, 250)]))
    answer(window, (1, 100), (1, 0))
    assert list(window.plan([(1, 130, 250)])) == [(1, 200)]
    assert [offset for offset, _ in window.take(1, 130)] == [100]
    # What lies before it is superfluous, and gone.
    assert window.take(1, 0) == []


@pytest.mark.parametrize("real", [100, 30, 250])
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), files=st.lists(st.integers(1, 2000), min_size=1, max_size=6))
def test_everything_comes_in_order_over_a_bad_way(real: int, seed: int, files: list[int]) -> None:
    random = Random(seed)
    window = Window(2000, 100)
    way: list[tuple[int, int]] = []
    current, offset, quiet = 0, 0, 0
    while current < len(files):
        wanted = [(at, offset if at == current else 0, files[at]) for at in range(current, len(files))]
        way.extend(window.plan(wanted))
        if way and random.random() < 0.8:
            file, at = way.pop(random.randrange(min(3, len(way))))
            if random.random() < 0.9:
                quiet = 0
                window.keep(file, at, data(min(real, files[file] - at)), (current, offset))
        elif random.random() < 0.3:
            window.tick()
            quiet += 1
            if quiet > 5:
                window.lost()
                quiet = 0
        taken = window.take(current, offset)
        for start, piece in taken:
            assert start <= offset
            offset = start + piece.size
        assert len(window._held) + len(window._asked) <= PIECES_MAX + 1
        if offset == files[current]:
            window.forget(current)
            current, offset = current + 1, 0
