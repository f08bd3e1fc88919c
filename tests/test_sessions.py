"""Sessions: a repeat gets the first answer, what was forgotten is refused, and a snapshot changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marble import sessions as module
from marble.errors import CorruptionError, InvariantError
from marble.machine import Result
from marble.sessions import SESSION_ANSWERS_MAX, SESSION_TTL_US, SESSIONS_SCHEMA, Sessions

FAILED = Result(error_code="usage", message="no such table")


def opened(*ids: int, time_us: int = 0) -> Sessions:
    sessions = Sessions()
    for id_ in ids:
        sessions.open(id_, time_us)
    return sessions


def execute(sessions: Sessions, id_: int, sequence: int, index: int, result: Result, time_us: int = 0) -> None:
    assert sessions.recall(id_, sequence, time_us) is None
    sessions.remember(id_, sequence, index, result)


def restored(sessions: Sessions, time_us: int = 0) -> Sessions:
    other = Sessions()
    other.restore(time_us, list(sessions.state()))
    return other


def rows(sessions: Sessions) -> list[dict[str, object]]:
    return [row for batch in sessions.state() for row in batch.to_pylist()]


def refused(result: Result | None) -> str:
    assert result is not None
    assert (result.error_code, result.value, result.index) == ("session_expired", 0, 0)
    return result.message


def test_a_repeat_gets_the_first_answer() -> None:
    sessions = opened(5)
    execute(sessions, 5, 1, 7, Result(3))
    execute(sessions, 5, 2, 8, FAILED)
    assert sessions.recall(5, 1, 0) == Result(3, index=7)
    assert sessions.recall(5, 2, 0) == replace(FAILED, index=8)
    assert sessions.recall(5, 1, 0) == Result(3, index=7)
    assert sessions.recall(5, 3, 0) is None


def test_sessions_have_numbers_of_their_own() -> None:
    sessions = opened(5, 6)
    execute(sessions, 5, 1, 7, Result(1))
    execute(sessions, 6, 1, 8, Result(2))
    assert sessions.recall(5, 1, 0) == Result(1, index=7)
    assert sessions.recall(6, 1, 0) == Result(2, index=8)


def test_numbers_may_arrive_in_any_order() -> None:
    sessions = opened(1)
    for index, sequence in enumerate((3, 9, 1, 2, 10, 5), start=2):
        execute(sessions, 1, sequence, index, Result(sequence))
    for index, sequence in enumerate((3, 9, 1, 2, 10, 5), start=2):
        assert sessions.recall(1, sequence, 0) == Result(sequence, index=index)
    assert sessions.recall(1, 4, 0) is None


def test_a_session_that_is_not_there_is_refused_with_advice() -> None:
    sessions = opened(5)
    assert sessions.close(5)
    assert not sessions.close(5)
    assert len(sessions) == 0
    for id_ in (5, 77):
        message = refused(sessions.recall(id_, 1, 0))
        assert f"session {id_} is not known" in message
        assert "in a new session" in message


def test_a_refused_write_is_not_remembered() -> None:
    with pytest.raises(InvariantError, match="write 4 of session 9 was not recalled"):
        Sessions().remember(9, 4, 1, Result(0))


def test_a_session_expires_by_the_time_of_entries() -> None:
    sessions = opened(1, 2, time_us=1000)
    assert sessions.recall(1, 1, 1000 + SESSION_TTL_US) is None
    assert len(sessions) == 2
    assert "not used for 60 minutes" in refused(sessions.recall(2, 1, 1001 + SESSION_TTL_US))
    assert len(sessions) == 1
    assert sessions.recall(1, 1, 1000 + 2 * SESSION_TTL_US) is None
    sessions.open(3, 1001 + 3 * SESSION_TTL_US)
    assert len(sessions) == 1


def test_time_that_goes_back_stands_still() -> None:
    sessions = opened(1, time_us=SESSION_TTL_US)
    sessions.open(2, 5)
    assert [row["active_us"] for row in rows(sessions)] == [SESSION_TTL_US, SESSION_TTL_US]
    assert sessions.recall(1, 1, 0) is None
    assert sessions.recall(1, 1, 2 * SESSION_TTL_US) is None


def test_the_highest_numbers_are_kept() -> None:
    sessions = opened(1)
    for sequence in range(1, SESSION_ANSWERS_MAX + 3):
        execute(sessions, 1, sequence, 10 + sequence, FAILED if sequence == 1 else Result(sequence))
    assert "older than the 4096 answers kept" in refused(sessions.recall(1, 2, 0))
    refused(sessions.recall(1, 1, 0))
    assert sessions.recall(1, 3, 0) == Result(3, index=13)
    assert len(rows(sessions)[0]["errors"]) == 0  # type: ignore[arg-type]
    other = restored(sessions)
    assert rows(other) == rows(sessions)
    assert other.recall(1, SESSION_ANSWERS_MAX + 2, 0) == Result(
        SESSION_ANSWERS_MAX + 2, index=SESSION_ANSWERS_MAX + 12
    )
    refused(other.recall(1, 2, 0))


def test_a_late_number_above_all_that_was_forgotten_is_executed() -> None:
    sessions = opened(1)
    for sequence in range(10, 10 + SESSION_ANSWERS_MAX):
        execute(sessions, 1, sequence, sequence, Result(sequence))
    execute(sessions, 1, 9, 1, Result(9))
    refused(sessions.recall(1, 9, 0))
    refused(sessions.recall(1, 8, 0))
    assert sessions.recall(1, 10, 0) == Result(10, index=10)


def test_the_session_unused_for_longest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SESSIONS_MAX", 2)
    sessions = opened(1, 2)
    assert sessions.recall(1, 1, 0) is None
    sessions.open(3, 0)
    refused(sessions.recall(2, 1, 0))
    assert sessions.recall(1, 1, 0) is None
    assert sessions.recall(3, 1, 0) is None


@pytest.mark.parametrize("snapshot", [False, True])
def test_answers_of_all_sessions_together_are_bounded(snapshot: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWERS_MAX", 20)
    sessions = opened(1, 2)
    for id_ in (1, 2):
        for sequence in range(1, 9):
            execute(sessions, id_, sequence, sequence, Result(0))
    if snapshot:
        sessions = restored(sessions)
    execute(sessions, 2, 9, 9, replace(FAILED, message=""))
    assert len(sessions) == 2, "an error without words counts as two answers: 20 in all"
    execute(sessions, 2, 10, 10, Result(0))
    assert len(sessions) == 1
    refused(sessions.recall(1, 1, 0))
    for sequence in range(11, 40):
        execute(sessions, 2, sequence, sequence, Result(0))
    assert sessions.recall(2, 1, 0) == Result(0, index=1), "the only one stays, whatever it costs"
    assert len(restored(sessions)) == 1


def test_a_long_error_counts_by_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWERS_MAX", 14)
    sessions = opened(1, 2)
    execute(sessions, 2, 1, 9, replace(FAILED, message="x" * 319))
    assert len(sessions) == 2
    execute(sessions, 2, 2, 9, Result(0))
    assert len(sessions) == 2
    execute(sessions, 2, 3, 9, Result(0))
    assert len(sessions) == 1


def test_closed_sessions_and_dropped_answers_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWERS_MAX", 20)
    monkeypatch.setattr(module, "SESSION_ANSWERS_MAX", 3)
    sessions = opened(1)
    for id_ in range(2, 50):
        sessions.open(id_, 0)
        for sequence in range(1, 30):
            execute(sessions, id_, sequence, sequence, FAILED)
        assert sessions.close(id_)
    assert len(sessions) == 1


def test_a_snapshot_changes_nothing() -> None:
    sessions = opened(3, 1, time_us=5)
    execute(sessions, 3, 2, 7, Result(-(2**63)), time_us=6)
    execute(sessions, 3, 1, 2**63 - 1, FAILED, time_us=7)
    other = restored(sessions, 9)
    assert rows(other) == rows(sessions)
    assert [row["session"] for row in rows(other)] == [1, 3]
    assert other.recall(3, 2, 9) == Result(-(2**63), index=7)
    assert other.recall(3, 1, 9) == replace(FAILED, index=2**63 - 1)
    assert restored(Sessions()).state().__next__ is not None
    assert rows(restored(Sessions())) == []


def test_large_states_come_in_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_COST_MAX", 10)
    sessions = opened(*range(1, 40))
    batches = list(sessions.state())
    assert [batch.num_rows for batch in batches] == [10, 10, 10, 9]
    assert all(batch.schema == SESSIONS_SCHEMA for batch in batches)
    assert rows(restored(sessions)) == rows(sessions)


def test_a_state_does_not_change_once_taken() -> None:
    sessions = opened(1, 2)
    execute(sessions, 1, 1, 3, Result(1))
    before = rows(sessions)
    taken, again = sessions.state(), sessions.state()
    execute(sessions, 1, 2, 4, FAILED, time_us=8)
    sessions.close(2)
    sessions.open(9, 9)
    later = sessions.state()
    execute(sessions, 1, 3, 5, Result(1), time_us=9)
    assert [row for batch in taken for row in batch.to_pylist()] == before
    assert [row for batch in again for row in batch.to_pylist()] == before
    assert [row["sequences"] for batch in later for row in batch.to_pylist()] == [[1, 2], []]
    assert [row["sequences"] for row in rows(sessions)] == [[], [1, 2, 3]]


def test_a_state_taken_between_the_two_halves_of_a_write_does_not_change() -> None:
    sessions = opened(1)
    assert sessions.recall(1, 1, 0) is None
    taken = sessions.state()
    sessions.remember(1, 1, 2, Result(0))
    assert [row["sequences"] for batch in taken for row in batch.to_pylist()] == [[]]


def test_a_state_is_read_on_another_thread_while_writes_go_on() -> None:
    sessions = opened(*range(1, 65))
    for id_ in range(1, 65):
        for sequence in range(1, 20):
            execute(sessions, id_, sequence, sequence, Result(id_))
    expected = rows(sessions)
    found: list[list[dict[str, object]]] = []
    taken = sessions.state()
    reader = threading.Thread(target=lambda: found.append([row for batch in taken for row in batch.to_pylist()]))
    reader.start()
    for id_ in range(1, 65):
        execute(sessions, id_, 20, 20, FAILED)
    reader.join(timeout=30)
    assert found == [expected]


def change(name: str, value: object) -> Callable[[list[dict[str, object]]], None]:
    return lambda listed: listed[0].update({name: value})


ODD = {"sequence": 3, "code": "usage", "message": "m"}


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (change("floor", 1), "do not ascend"),
        (change("sequences", [2, 2]), "do not ascend"),
        (change("sequences", [2, 1]), "do not ascend"),
        (change("indexes", [5]), "do not match"),
        (change("values", [5, 6, 7]), "do not match"),
        (change("active_us", 3), "not in order"),
        (change("active_us", 2000), "not in order"),
        (change("session", 2), "not in order"),
        (change("errors", [ODD]), "odd errors"),
        (change("errors", [ODD | {"sequence": 1, "code": "none"}]), "odd errors"),
        (lambda listed: listed.extend({**listed[1], "session": 10 + i} for i in range(4)), "too many"),
        (change("sequences", list(range(1, 7))), "do not match"),
    ],
)
def test_a_state_that_cannot_be_is_refused(
    mutate: Callable[[list[dict[str, object]]], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SESSIONS_MAX", 5)
    sessions = opened(1, 2)
    execute(sessions, 1, 1, 3, Result(1))
    execute(sessions, 1, 2, 4, FAILED)
    sessions.recall(2, 1, 1)
    listed = rows(sessions)
    mutate(listed)
    target = opened(9)
    with pytest.raises(CorruptionError, match=message):
        target.restore(1000, [pa.RecordBatch.from_pylist(listed, SESSIONS_SCHEMA)])
    assert target.recall(9, 1, 0) is None


def test_a_state_of_other_columns_is_refused() -> None:
    batch = next(opened(1).state())
    with pytest.raises(CorruptionError, match="other columns"):
        Sessions().restore(0, [batch.drop_columns(["floor"])])
    loose = pa.schema([field_.with_nullable(True) for field_ in SESSIONS_SCHEMA])
    null = pa.RecordBatch.from_pylist([{"session": 1}], loose).columns
    with pytest.raises(CorruptionError, match="null"):
        Sessions().restore(0, [pa.RecordBatch.from_arrays(null, schema=SESSIONS_SCHEMA)])


@dataclass
class Model:
    """Sessions the obvious way: nothing is thrown away, what counts is computed anew each time."""

    ttl: int
    sessions_max: int
    answers_max: int
    time_us: int = 0
    used: list[tuple[int, int]] = field(default_factory=list)
    executed: dict[int, dict[int, tuple[int, Result]]] = field(default_factory=dict)
    forgotten: dict[int, set[int]] = field(default_factory=dict)

    def touch(self, id_: int) -> None:
        self.used = [(each, when) for each, when in self.used if each != id_] + [(id_, self.time_us)]
        self.used = self.used[-self.sessions_max :]

    def now(self, time_us: int) -> None:
        self.time_us = max(self.time_us, time_us)
        self.used = [(each, when) for each, when in self.used if self.time_us - when <= self.ttl]

    def open(self, index: int, time_us: int) -> None:
        self.now(time_us)
        self.executed[index], self.forgotten[index] = {}, set()
        self.touch(index)

    def close(self, id_: int) -> None:
        self.used = [(each, when) for each, when in self.used if each != id_]

    def write(self, id_: int, sequence: int, index: int, result: Result, time_us: int) -> Result | str:
        self.now(time_us)
        if id_ not in [each for each, _ in self.used]:
            return "refused"
        self.touch(id_)
        answers, forgotten = self.executed[id_], self.forgotten[id_]
        kept = sorted(answers)[-self.answers_max :]
        forgotten |= set(answers) - set(kept)
        if sequence in kept:
            return replace(answers[sequence][1], index=answers[sequence][0])
        if sequence <= max(forgotten, default=0):
            return "refused"
        answers[sequence] = (index, result)
        forgotten |= set(answers) - set(sorted(answers)[-self.answers_max :])
        return result


STEP = st.tuples(
    st.sampled_from(["open", "write", "write", "write", "write", "close", "snapshot"]),
    st.integers(0, 5),
    st.integers(1, 9),
    st.integers(0, 12),
    st.booleans(),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(STEP, max_size=60))
def test_against_a_model_that_forgets_nothing(steps: list[tuple[str, int, int, int, bool]]) -> None:
    model, sessions, time_us = Model(ttl=20, sessions_max=3, answers_max=2), Sessions(), 100
    ids: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SESSION_TTL_US", model.ttl)
        patch.setattr(module, "SESSIONS_MAX", model.sessions_max)
        patch.setattr(module, "SESSION_ANSWERS_MAX", model.answers_max)
        patch.setattr(module, "_DROP_TOGETHER", 2)
        for index, (what, which, sequence, passed, good) in enumerate(steps, start=1):
            time_us += passed - 3
            id_ = ids[-1 - which] if which < len(ids) else 999
            if what == "open":
                ids.append(index)
                model.open(index, time_us)
                sessions.open(index, time_us)
            elif what == "close":
                model.close(id_)
                sessions.close(id_)
            elif what == "snapshot":
                before = rows(sessions)
                sessions = restored(sessions, model.time_us)
                assert rows(sessions) == before
            else:
                result = Result(index) if good else FAILED
                expected = model.write(id_, sequence, index, result, time_us)
                found = sessions.recall(id_, sequence, time_us)
                if expected == "refused":
                    refused(found)
                elif found is None:
                    assert expected is result, "executed what was executed before"
                    sessions.remember(id_, sequence, index, result)
                else:
                    assert found == expected
