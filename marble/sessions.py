"""Sessions of clients: what makes a write that was sent twice take effect once (Raft §8, thesis §6.3).

A session is part of the replicated state. Its number is the index of the entry that opened it; its client numbers its
writes from 1. The first write of a number is executed and its answer kept; a repeat gets that answer and does nothing.

Rule 1: deterministic. Everything here is a function of the entries in their order: time is the time that entries carry,
never less than that of an earlier entry, and sessions expire when an entry says so, not when a clock does. How entries
came together in batches makes no difference.
Rule 2: nothing is executed twice. A number whose answer is no longer known is refused, not executed: that is what an
expired session, one that had to go, and a number at or below a session's floor have in common.
Rule 3: bounded, by the limits below. What is dropped is always what was not used for longest.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, Final

import pyarrow as pa

from marble.errors import ERROR_CODES, CorruptionError, InvariantError, SessionExpiredError, check
from marble.machine import Result

SESSION_TTL_US: Final = 3_600_000_000
"""A session that was not used for an hour of entries' time is forgotten: longer than any client retries, and short enough
that what crashed clients leave behind does not gather."""

SESSIONS_MAX: Final = 65_536
"""Sessions at a time. Above that the one that was not used for longest goes."""

SESSION_ANSWERS_MAX: Final = 4096
"""Answers kept for a session, those of its highest numbers: many times what a client has under way at once."""

ANSWERS_MAX: Final = 4 * 1024 * 1024
"""Answers kept for all sessions together, an answer that is an error counted by its length: about 128 MiB. Above that the
sessions that were not used for longest go."""

_ANSWER_BYTES: Final = 32
_BATCH_COST_MAX: Final = 65_536
_DROP_TOGETHER: Final = 512


def _column(name: str, type_: pa.DataType) -> pa.Field:
    return pa.field(name, type_, nullable=False)


_ERROR: Final = pa.struct(
    [_column("sequence", pa.uint64()), _column("code", pa.string()), _column("message", pa.string())]
)

SESSIONS_SCHEMA: Final = pa.schema(
    [
        _column("session", pa.uint64()),
        _column("active_us", pa.uint64()),
        _column("floor", pa.uint64()),
        _column("sequences", pa.list_(_column("item", pa.uint64()))),
        _column("indexes", pa.list_(_column("item", pa.uint64()))),
        _column("values", pa.list_(_column("item", pa.int64()))),
        _column("errors", pa.list_(_column("item", _ERROR))),
    ]
)
"""Sessions as rows, the one that was not used for longest first. ``sequences``, ``indexes`` and ``values`` run in parallel, one
item an answer, sequences ascending; ``errors`` has an item for each of these answers that is an error."""


class _Session:
    """One session.

    - ``sequences`` ascends; ``floor`` is the highest number whose answer was dropped, and below all of them.
    - ``indexes[i]`` and ``values[i]`` belong to ``sequences[i]``; ``errors`` has those among them that are errors.
    - Items below ``start`` were dropped: they are taken away many at a time, since that moves all the others.
    - ``capture`` is the number of captures that had been made when this object was: it may change only while no further
      one was made, see `Sessions.state`.
    """

    __slots__ = ("active_us", "capture", "errors", "floor", "id", "indexes", "sequences", "start", "values")

    def __init__(self, id_: int, active_us: int, capture: int) -> None:
        self.id = id_
        self.active_us = active_us
        self.capture = capture
        self.floor = 0
        self.start = 0
        self.sequences: array[int] = array("Q")
        self.indexes: array[int] = array("Q")
        self.values: array[int] = array("q")
        self.errors: dict[int, tuple[str, str]] = {}

    def copy(self, capture: int) -> _Session:
        other = _Session(self.id, self.active_us, capture)
        other.floor = self.floor
        other.sequences, other.indexes, other.values = self.kept()
        other.errors = dict(self.errors)
        return other

    def kept(self) -> tuple[array[int], array[int], array[int]]:
        """Copies of ``sequences``, ``indexes`` and ``values`` without what was dropped."""
        return self.sequences[self.start :], self.indexes[self.start :], self.values[self.start :]

    def __len__(self) -> int:
        return len(self.sequences) - self.start

    @property
    def cost(self) -> int:
        """What it counts against `ANSWERS_MAX`; at least 1."""
        return 1 + len(self) + sum(_error_cost(message) for _, message in self.errors.values())


class Sessions:
    """All sessions of one group. One thread at a time.

    - Sessions are in the order of their last use; ``active_us`` therefore never falls along them.
    - At most `SESSIONS_MAX` sessions, whose costs are at most `ANSWERS_MAX` together unless there is only one.
    """

    def __init__(self) -> None:
        self._sessions: OrderedDict[int, _Session] = OrderedDict()
        self._time_us = 0
        self._cost = 0
        self._captures = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, index: int, time_us: int) -> None:
        """Take in a new session.

        Parameters
        ----------
        index
            Index of its OPEN_SESSION entry, and from now on its number.
        time_us
            Time of that entry, microseconds since 1970.
        """
        self._advance(time_us)
        check(index not in self._sessions, f"session {index} is opened twice")
        self._sessions[index] = _Session(index, self._time_us, self._captures)
        self._cost += 1
        self._make_room()

    def close(self, id: int) -> bool:  # noqa: A002
        """Forget a session and its answers. Returns whether it was there."""
        session = self._sessions.pop(id, None)
        if session is None:
            return False
        self._cost -= session.cost
        return True

    def recall(self, id: int, sequence: int, time_us: int) -> Result | None:  # noqa: A002
        """What an entry with this session and sequence must answer, or None if it is new and is to be executed.

        None must be followed by `remember`.

        Parameters
        ----------
        id
            The session.
        sequence
            Which of its writes it is, at least 1. They may arrive in any order.
        time_us
            Time of the entry. The session counts as used then.

        Returns
        -------
        Result or None
            For a repeat the first answer, its ``index`` set to the index of the entry that got it. For what cannot be
            known any more a ``session_expired``, with ``index`` 0: this entry did nothing, an earlier one may have.
        """
        self._advance(time_us)
        session = self._sessions.get(id)
        if session is None:
            return _unknown(
                f"session {id} is not known: it was closed, was not used for {SESSION_TTL_US // 60_000_000} minutes, or had "
                f"to make room; write {sequence} of it was not executed now, but an earlier attempt may have been: read "
                "before writing it again, in a new session"
            )
        session = self._own(session)
        session.active_us = self._time_us
        self._sessions.move_to_end(id)
        sequences = session.sequences
        at = bisect_left(sequences, sequence, session.start)
        if at < len(sequences) and sequences[at] == sequence:
            code, message = session.errors.get(sequence, (None, ""))
            return Result(session.values[at], code, message, session.indexes[at])
        if sequence <= session.floor:
            return _unknown(
                f"write {sequence} of session {id} is older than the {SESSION_ANSWERS_MAX} answers kept: it was not executed "
                "now, but an earlier attempt may have been: read before writing it again, with a new number"
            )
        return None

    def remember(self, id: int, sequence: int, index: int, result: Result) -> None:  # noqa: A002
        """Keep the answer to an entry for which `recall` has just returned None.

        Parameters
        ----------
        id, sequence
            As in `recall`.
        index
            Index of the entry.
        result
            What executing it gave; an error is an answer too.
        """
        session = self._sessions.get(id)
        if session is None or sequence <= session.floor:
            raise InvariantError(f"write {sequence} of session {id} was not recalled")
        session = self._own(session)
        at = bisect_left(session.sequences, sequence, session.start)
        session.sequences.insert(at, sequence)
        session.indexes.insert(at, index)
        session.values.insert(at, result.value)
        self._cost += 1
        if result.error_code is not None:
            session.errors[sequence] = (result.error_code, result.message)
            self._cost += _error_cost(result.message)
        if len(session) > SESSION_ANSWERS_MAX:
            self._drop_lowest(session)
        self._make_room()

    def state(self) -> Iterator[pa.RecordBatch]:
        """Everything as rows of `SESSIONS_SCHEMA`, as of now, whatever happens before they are fetched.

        The rows may be fetched on another thread. Equal histories give equal rows.
        """
        # Sessions that were there at this moment are copied before they change, so nothing is copied here.
        self._captures += 1
        return _batches(list(self._sessions.values()))

    def restore(self, time_us: int, batches: Iterable[pa.RecordBatch]) -> None:
        """Become what `state` gave out.

        Parameters
        ----------
        time_us
            The highest time that any entry had until then.
        batches
            What `state` gave out.

        Raises
        ------
        CorruptionError
            `batches` are not what `state` gives out. Nothing was changed then.
        """
        sessions: OrderedDict[int, _Session] = OrderedDict()
        active_us = 0
        for session in _sessions_of(batches):
            _sound(session.id not in sessions and active_us <= session.active_us <= time_us, "are not in order")
            active_us = session.active_us
            sessions[session.id] = session
        cost = sum(session.cost for session in sessions.values())
        _sound(len(sessions) <= SESSIONS_MAX and (cost <= ANSWERS_MAX or len(sessions) == 1), "are too many")
        self._sessions, self._time_us, self._cost, self._captures = sessions, time_us, cost, 0

    def _advance(self, time_us: int) -> None:
        """Let time pass, and forget what has not been used for too long by then."""
        self._time_us = max(self._time_us, time_us)
        while self._sessions:
            oldest = next(iter(self._sessions.values()))
            if self._time_us - oldest.active_us <= SESSION_TTL_US:
                return
            self.close(oldest.id)

    def _make_room(self) -> None:
        while len(self._sessions) > SESSIONS_MAX or (self._cost > ANSWERS_MAX and len(self._sessions) > 1):
            self.close(next(iter(self._sessions)))

    def _own(self, session: _Session) -> _Session:
        """`session` as an object that no `state` reads: in its place if need be a copy."""
        if session.capture != self._captures:
            session = session.copy(self._captures)
            self._sessions[session.id] = session
        return session

    def _drop_lowest(self, session: _Session) -> None:
        session.floor = session.sequences[session.start]
        session.start += 1
        if session.start == _DROP_TOGETHER:
            session.sequences, session.indexes, session.values = session.kept()
            session.start = 0
        self._cost -= 1
        error = session.errors.pop(session.floor, None)
        if error is not None:
            self._cost -= _error_cost(error[1])


def _error_cost(message: str) -> int:
    return 1 + len(message) // _ANSWER_BYTES


def _unknown(message: str) -> Result:
    return Result(error_code=SessionExpiredError.code, message=message)


def _batches(sessions: list[_Session]) -> Iterator[pa.RecordBatch]:
    start, cost = 0, 0
    for end, session in enumerate(sessions, start=1):
        cost += session.cost
        if cost >= _BATCH_COST_MAX or end == len(sessions):
            yield _batch(sessions[start:end])
            start, cost = end, 0


def _batch(sessions: list[_Session]) -> pa.RecordBatch:
    def lists(name: str, type_: pa.DataType) -> pa.Array:
        values = array("q" if type_ == pa.int64() else "Q")
        offsets = array("i", [0])
        for session in sessions:
            values.extend(getattr(session, name)[session.start :])
            offsets.append(len(values))
        items = pa.Array.from_buffers(type_, len(values), [None, pa.py_buffer(values)])
        starts = pa.Array.from_buffers(pa.int32(), len(offsets), [None, pa.py_buffer(offsets)])
        return pa.ListArray.from_arrays(starts, items, type=SESSIONS_SCHEMA.field(name).type)

    errors = [
        [{"sequence": sequence, "code": code, "message": message} for sequence, (code, message) in items]
        for items in (sorted(session.errors.items()) for session in sessions)
    ]
    columns = [
        pa.array([session.id for session in sessions], pa.uint64()),
        pa.array([session.active_us for session in sessions], pa.uint64()),
        pa.array([session.floor for session in sessions], pa.uint64()),
        lists("sequences", pa.uint64()),
        lists("indexes", pa.uint64()),
        lists("values", pa.int64()),
        pa.array(errors, SESSIONS_SCHEMA.field("errors").type),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SESSIONS_SCHEMA)


def _sound(condition: object, what: str) -> None:
    if not condition:
        raise CorruptionError(f"sessions of a snapshot {what}: do not use this snapshot")


def _sessions_of(batches: Iterable[pa.RecordBatch]) -> Iterator[_Session]:
    for batch in batches:
        _sound(batch.schema.equals(SESSIONS_SCHEMA), "have other columns than this version of marble knows")
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid as error:
            raise CorruptionError(f"sessions of a snapshot are not valid Arrow data: {error}") from error
        _sound(not any(column.null_count for column in batch.columns), "have nulls")
        for row in range(batch.num_rows):
            yield _session(*(column[row] for column in batch.columns))


def _session(id_: Any, active_us: Any, floor: Any, sequences: Any, indexes: Any, values: Any, errors: Any) -> _Session:
    """One row, of which only the types are known to be right."""
    session = _Session(id_.as_py(), active_us.as_py(), 0)
    session.floor = floor.as_py()
    for items, target in ((sequences, session.sequences), (indexes, session.indexes), (values, session.values)):
        _sound(items.values.null_count == 0, "have nulls")
        target.extend(items.values.to_numpy())
    known = set(session.sequences)
    for error in errors.as_py():
        sound = error is not None and error["sequence"] in known and error["code"] in ERROR_CODES
        _sound(sound and error["message"] is not None, "have odd errors")
        session.errors[error["sequence"]] = (error["code"], error["message"])
    bounds = [session.floor, *session.sequences]
    ascending = all(lower < upper for lower, upper in pairwise(bounds))
    _sound(ascending, "have numbers that do not ascend")
    _sound(len(session.sequences) == len(session.indexes) == len(session.values), "have answers that do not match")
    _sound(len(session.sequences) <= SESSION_ANSWERS_MAX, "have too many answers")
    return session
