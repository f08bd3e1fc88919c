"""Errors cross Flight and stay what they are."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.flight as fl
import pytest

from marble.errors import (
    ERROR_CODES,
    ForbiddenError,
    InvariantError,
    MarbleError,
    NotLeaderError,
    OutcomeUnknownError,
    ProtocolError,
    UnauthenticatedError,
    UnavailableError,
    UsageError,
)
from marble.transport.faults import MESSAGE_CHARACTERS_MAX, from_flight_error, is_refusal, to_flight_error


@pytest.mark.parametrize("kind", ERROR_CODES.values())
def test_every_error_comes_back_as_itself(kind: type[MarbleError]) -> None:
    back = from_flight_error(to_flight_error(kind("what happened — and why")), changes=True)
    assert type(back) is kind
    assert str(back) == "what happened — and why"


def test_not_leader_names_the_leader() -> None:
    for leader in ("127.0.0.1:5001", None):
        back = from_flight_error(to_flight_error(NotLeaderError("ask the leader", leader)))
        assert isinstance(back, NotLeaderError)
        assert back.leader == leader


def test_a_subclass_travels_as_its_parent() -> None:
    class Special(UsageError):
        pass

    assert type(from_flight_error(to_flight_error(Special("x")))) is UsageError


def test_long_messages_are_cut() -> None:
    told = to_flight_error(UsageError("x" * 100_000))
    assert len(str(told)) == MESSAGE_CHARACTERS_MAX
    assert len(told.extra_info) < 2 * MESSAGE_CHARACTERS_MAX


def test_what_is_not_ours_gets_a_class() -> None:
    assert type(from_flight_error(to_flight_error(pa.ArrowInvalid("offsets")))) is ProtocolError
    assert type(from_flight_error(to_flight_error(KeyError("bug")))) is InvariantError
    kept = fl.FlightUnauthorizedError("no")
    assert to_flight_error(kept) is kept


@pytest.mark.parametrize("extra", [b"", b"not json", b"[]", b'{"code": "usage"}', b'{"code": "new", "message": "x"}'])
def test_an_error_that_says_nothing_leaves_the_outcome_open(extra: bytes) -> None:
    for error in (fl.FlightUnavailableError, fl.FlightTimedOutError, fl.FlightCancelledError, fl.FlightInternalError):
        assert type(from_flight_error(error("gone", extra), changes=True)) is OutcomeUnknownError
        assert type(from_flight_error(error("gone", extra))) is UnavailableError


def test_other_errors_on_the_client_side() -> None:
    assert type(from_flight_error(fl.FlightUnauthenticatedError("who?"))) is UnauthenticatedError
    assert type(from_flight_error(fl.FlightUnauthorizedError("you?"))) is ForbiddenError
    assert type(from_flight_error(pa.ArrowInvalid("bad"))) is ProtocolError
    assert type(from_flight_error(ZeroDivisionError())) is InvariantError
    same = UsageError("x")
    assert from_flight_error(same) is same


def test_only_a_server_can_refuse() -> None:
    refusals = {kind for kind in ERROR_CODES.values() if is_refusal(to_flight_error(kind("no")))}
    assert refusals == {UsageError, NotLeaderError, UnavailableError, UnauthenticatedError, ForbiddenError}
    assert not is_refusal(fl.FlightUnavailableError("connection lost"))
    assert not is_refusal(UsageError("made here"))
