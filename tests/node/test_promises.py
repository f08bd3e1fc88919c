"""When a proposal is decided, and that it is never decided wrongly."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from marble.errors import OutcomeUnknownError, UnavailableError, UsageError
from marble.machine import Result
from marble.promises import Committed, Promises, promise
from marble.raft.messages import ReadState


def _promises(asked: list[int] | None = None) -> Promises:
    asked = [] if asked is None else asked
    return Promises(10.0, 5.0, lambda request, lease: asked.append(request), 3)


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


def test_a_write_that_a_snapshot_covers_is_of_unknown_outcome() -> None:
    promises = _promises()
    (covered,) = _write(promises, 60, term=3)
    (behind,) = _write(promises, 202, term=3)
    # A snapshot at 200, of another leader, took the place of what was applied up to then: it may have entry 60.
    promises.applied(201, [5], [Result()])
    assert isinstance(covered.exception(0), OutcomeUnknownError)
    assert isinstance(behind.exception(0), UnavailableError)


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


def test_a_write_that_failed_on_every_replica_ends_in_that_error_and_its_neighbours_do_not() -> None:
    promises = _promises()
    before, wrong, after = _write(promises, 5, term=2, count=3)
    promises.applied(5, [2, 2, 2], [Result(1), Result(error_code="usage", message="no such table"), Result(3)])
    assert before.result(0) == Committed(5, 2, 1)
    with pytest.raises(UsageError, match="no such table"):
        wrong.result(0)
    assert after.result(0) == Committed(7, 2, 3)


def test_a_write_of_a_later_lead_outlives_the_deadline_of_the_one_before_it_at_the_same_index() -> None:
    promises = _promises()
    (older,) = _write(promises, 5, term=2, now=0.0)
    (newer,) = _write(promises, 5, term=4, now=1.0)
    promises.expire(10.0)
    assert isinstance(older.exception(0), OutcomeUnknownError)
    assert not newer.done()
    promises.applied(5, [4], [Result(7)])
    assert newer.result(0) == Committed(5, 4, 7)


def test_a_read_is_answered_when_its_index_is_applied_and_not_before() -> None:
    asked: list[int] = []
    promises = _promises(asked)
    first: Future[int] = promise()
    second: Future[int] = promise()
    promises.add_read(first, 0.0)
    promises.add_read(second, 0.0)
    promises.answered([ReadState(asked[0], 6), ReadState(asked[1], 7)], applied_index=6)
    assert first.result(0) == 6
    assert not second.done()
    promises.answered([], applied_index=9)
    assert second.result(0) == 9


def test_a_read_that_the_core_does_not_answer_is_asked_again_and_the_old_number_no_longer_counts() -> None:
    asked: list[int] = []
    promises = _promises(asked)
    future: Future[int] = promise()
    promises.add_read(future, 0.0)
    # The core dropped it: no index, so the question is repeated after its patience of three ticks.
    promises.answered([ReadState(asked[0], 0)], applied_index=5)
    for tick in range(1, 4):
        promises.expire(tick / 10)
        assert len(asked) == 1
    promises.expire(0.4)
    assert len(asked) == 2
    promises.answered([ReadState(asked[0], 4)], applied_index=5)
    assert not future.done()
    promises.answered([ReadState(asked[1], 5)], applied_index=5)
    assert future.result(0) == 5


def test_a_read_with_an_index_waits_for_it_and_is_not_asked_again() -> None:
    asked: list[int] = []
    promises = _promises(asked)
    future: Future[int] = promise()
    promises.add_read(future, 0.0)
    promises.answered([ReadState(asked[0], 8)], applied_index=5)
    for tick in range(1, 10):
        promises.expire(tick / 10)
    assert len(asked) == 1
    promises.answered([], applied_index=8)
    assert future.result(0) == 8


def test_a_read_that_nobody_confirms_in_time_may_be_retried() -> None:
    promises = _promises()
    future: Future[int] = promise()
    promises.add_read(future, 0.0)
    promises.expire(4.9)
    assert not future.done()
    promises.expire(5.0)
    assert isinstance(future.exception(0), UnavailableError)


def test_when_the_engine_ends_a_write_is_of_unknown_outcome_and_a_read_ends_as_the_engine_did() -> None:
    promises = _promises()
    (write,) = _write(promises, 5, term=2)
    read: Future[int] = promise()
    promises.add_read(read, 0.0)
    gone = UnavailableError("the node has stopped")
    promises.abandon(gone)
    assert isinstance(write.exception(0), OutcomeUnknownError)
    assert read.exception(0) is gone


def test_a_read_that_no_leader_confirms_is_refused_before_its_deadline() -> None:
    promises = Promises(10.0, 5.0, lambda request, lease: None, 3, confirm_timeout_s=2.0)
    future: Future[int] = promise()
    promises.add_read(future, 100.0)
    promises.expire(101.9)
    assert not future.done()
    promises.expire(102.0)
    with pytest.raises(UnavailableError, match="ask another"):
        future.result(0)


def test_a_read_that_is_confirmed_and_not_applied_has_its_deadline() -> None:
    promises = Promises(10.0, 5.0, lambda request, lease: None, 3, confirm_timeout_s=2.0)
    future: Future[int] = promise()
    promises.add_read(future, 100.0)
    promises.answered([ReadState(1, 50)], applied_index=49)
    promises.expire(104.9)
    assert not future.done()
    promises.expire(105.0)
    with pytest.raises(UnavailableError, match="not applied"):
        future.result(0)


def test_who_has_known_no_leader_for_long_refuses_reads_at_once() -> None:
    asked: list[int] = []
    promises = Promises(10.0, 5.0, lambda request, lease: asked.append(request), 3, confirm_timeout_s=2.0)
    promises.led(False, 100.0)
    promises.led(False, 101.5)  # Another term, and still nobody.
    early: Future[int] = promise()
    promises.add_read(early, 101.9)
    assert not early.done()
    late: Future[int] = promise()
    promises.add_read(late, 102.0)
    with pytest.raises(UnavailableError, match="ask another"):
        late.result(0)
    promises.led(True, 102.1)
    again: Future[int] = promise()
    promises.add_read(again, 110.0)
    assert not again.done()
    assert len(asked) == 2
