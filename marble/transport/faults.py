"""Errors over Flight: each `MarbleError` becomes a Flight error and the same `MarbleError` again at the other end.

A Flight error carries, in ``extra_info``, a JSON object: ``code`` (a key of `marble.errors.ERROR_CODES`), ``message``,
and for a NotLeaderError ``leader`` (``host:port`` or null). Clients in other languages can read it too.

Rule 1: an error without that object says nothing about what happened at the server. For a call that changes something,
the outcome is then unknown, and only an error that the server itself sent makes it known.
"""

from __future__ import annotations

import json
from typing import Any, Final

import pyarrow as pa
import pyarrow.flight as fl

from marble.errors import (
    ERROR_CODES,
    CorruptionError,
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

MESSAGE_CHARACTERS_MAX: Final = 1000
"""Errors travel in HTTP/2 trailers, of which gRPC accepts 8 KiB in all."""

_FLIGHT_CLASSES: Final[dict[type[MarbleError], type[fl.FlightError]]] = {
    UsageError: fl.FlightServerError,
    NotLeaderError: fl.FlightUnavailableError,
    UnavailableError: fl.FlightUnavailableError,
    OutcomeUnknownError: fl.FlightServerError,
    UnauthenticatedError: fl.FlightUnauthenticatedError,
    ForbiddenError: fl.FlightUnauthorizedError,
    ProtocolError: fl.FlightServerError,
    CorruptionError: fl.FlightInternalError,
    InvariantError: fl.FlightInternalError,
}

_REFUSALS: Final = (UsageError, NotLeaderError, UnavailableError, UnauthenticatedError, ForbiddenError)


def to_flight_error(error: BaseException) -> fl.FlightError:
    """The Flight error that tells a client of `error`.

    A Flight error is returned as it is. Arrow's complaint about data (`pyarrow.ArrowInvalid` and the like) becomes a
    ProtocolError: what a handler reads comes from the client. Anything else is our fault and becomes an InvariantError.
    """
    if isinstance(error, fl.FlightError):
        return error
    if isinstance(error, pa.ArrowException):
        error = ProtocolError(f"the data sent is not what it should be: {error}")
    elif not isinstance(error, MarbleError):
        error = InvariantError(f"{type(error).__name__}: {error}")
    message = str(error)
    if len(message) > MESSAGE_CHARACTERS_MAX:
        message = message[: MESSAGE_CHARACTERS_MAX - 1] + "…"
    info: dict[str, Any] = {"code": error.code, "message": message}
    if isinstance(error, NotLeaderError):
        info["leader"] = error.leader
    flight_class = next((_FLIGHT_CLASSES[kind] for kind in type(error).__mro__ if kind in _FLIGHT_CLASSES), None)
    # Non-ASCII is escaped by json, and gRPC escapes the message itself.
    return (flight_class or fl.FlightInternalError)(message, json.dumps(info).encode())


def from_flight_error(error: BaseException, *, changes: bool = False) -> MarbleError:
    """The `MarbleError` behind an exception that a Flight call raised.

    Parameters
    ----------
    error
        What the call raised.
    changes
        Whether the call may have changed something: then a lost answer is an OutcomeUnknownError, else an
        UnavailableError.
    """
    if isinstance(error, MarbleError):
        return error
    told = _told(error)
    if told is not None:
        return told
    lost: type[MarbleError] = OutcomeUnknownError if changes else UnavailableError
    if isinstance(error, fl.FlightUnavailableError | fl.FlightTimedOutError | fl.FlightCancelledError):
        return lost(f"no answer: {error}")
    if isinstance(error, fl.FlightUnauthenticatedError):
        return UnauthenticatedError(f"refused: {error}")
    if isinstance(error, fl.FlightUnauthorizedError):
        return ForbiddenError(f"refused: {error}")
    if isinstance(error, OSError):
        return lost(f"the stream broke: {error}")
    if isinstance(error, fl.FlightError):
        return lost(f"the server failed: {error}")
    if isinstance(error, pa.ArrowException):
        return ProtocolError(f"the answer is not what it should be: {error}")
    return InvariantError(f"{type(error).__name__}: {error}")


def cause_of(error: BaseException) -> str:
    """What a user should read of an error, without what gRPC says to those who work on gRPC."""
    text = str(from_flight_error(error) if getattr(error, "extra_info", b"") else error)
    return text.partition(" gRPC client debug context")[0]


def is_refusal(error: BaseException) -> bool:
    """Whether a server itself said that it did nothing of what was asked, so that asking again repeats nothing."""
    return isinstance(_told(error), _REFUSALS)


def _told(error: BaseException) -> MarbleError | None:
    """What the server says in ``extra_info``; None if it says nothing that we understand."""
    extra = getattr(error, "extra_info", b"")
    if not extra:
        return None
    try:
        info = json.loads(extra)
    except ValueError:
        return None
    if not isinstance(info, dict) or not isinstance(info.get("message"), str):
        return None
    kind = ERROR_CODES.get(info.get("code", ""))
    if kind is None:
        return None
    if kind is NotLeaderError:
        leader = info.get("leader")
        return NotLeaderError(info["message"], leader if isinstance(leader, str) else None)
    return kind(info["message"])
