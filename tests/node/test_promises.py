"""When a proposal is decided, and that it is never decided wrongly."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from marble.errors import OutcomeUnknownError, UnavailableError
from marble.machine import Result
from marble.promises import Committed, Promises, promise


def _promises() -> Promises:
    return Promises(10.0, 5.0, lambda request: None, 3)


def _write(promises: Promises, first: int, term: int, count: int = 1, now: float = 0.0) -> list[Future[Committed]]:
    futures: list[Future[Committed]] = [promise() for _ in range(count)]
    promises.add_writes(first, term, futures, now)
    return futures


def test_an_entry_of_a_later_term_decides_everything_behind_it() -> None:
    promises = _promises()
    futures = _write(promises, 5, term=2, count=4)
    promises.applied(5, [2], [Result(1)])
    assert futures[0].result(0) == Committed(5, 2, 1)
    assert not any(future.done() for future in futures[1:])
    promises.applied(6, [3], [Result()])
    # The entry at 6 is of term 3: no log that has it can hold term 2 at 7 or 8.
    for future in futures[1:]:
        assert isinstance(future.exception(0), UnavailableError)


def test_an_entry_of_the_same_term_decides_nothing_behind_it() -> None:
    promises = _promises()
    (older,) = _write(promises, 8, term=2)
    (newer,) = _write(promises, 8, term=4)
    promises.applied(6, [2], [Result()])
    promises.applied(7, [2], [Result()])
    assert not older.done()
    assert not newer.done()
    promises.applied(8, [2], [Result(3)])
    assert older.result(0) == Committed(8, 2, 3)
    assert isinstance(newer.exception(0), UnavailableError)


def test_a_later_leader_spares_its_own_writes() -> None:
    promises = _promises()
    (older,) = _write(promises, 7, term=2)
    (newer,) = _write(promises, 7, term=4)
    promises.applied(6, [4], [Result()])
    assert isinstance(older.exception(0), UnavailableError)
    assert not newer.done()
    promises.applied(7, [4], [Result(1)])
    assert newer.result(0) == Committed(7, 4, 1)


@pytest.mark.parametrize(("now", "done"), [(9.9, False), (10.0, True)])
def test_what_is_not_decided_in_time_is_of_unknown_outcome(now: float, done: bool) -> None:
    promises = _promises()
    (future,) = _write(promises, 5, term=2)
    promises.expire(now)
    assert future.done() is done
    if done:
        assert isinstance(future.exception(0), OutcomeUnknownError)
