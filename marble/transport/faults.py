"""Errors over Flight: each `MarbleError` becomes a Flight error and the same `MarbleError` again at the other end.

A Flight error carries, in ``extra_info``, a JSON object: ``code`` (a key of `marble.errors.ERROR_CODES`), ``message``,
and for a NotLeaderError ``leader`` (``host:port`` or null). Clients in other languages can read it too.

Rule 1: an error without that object says nothing about what happened at the server. For a call that changes something,
the outcome is then unknown, and only an error that the server itself sent makes it known.
"""

from __future__ import annotations

import json
import re
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
from marble.transport.explaining import explain

MESSAGE_CHARACTERS_MAX: Final = 1000
"""Errors travel in HTTP/2 trailers, of which gRPC accepts 8 KiB in all."""

_PREFIX: Final = re.compile(r"^Flight \w+ \w+ error, with message: ")
_LAST_ERROR: Final = re.compile(r"^failed to connect to all addresses; last error: \w+: ")
_CAUSES: Final = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        ("Connection refused", "the connection is refused: nothing listens there (does the node run?)"),
        (
            "hostname lookup|address lookup failed|resolv",
            "the name of the host is not known (a slip? else DNS, /etc/hosts)",
        ),
        ("No route to host|Network is unreachable", "there is no way to that address (the network, a VPN, routes?)"),
        (
            "FD Shutdown|connection attempt timed out|Connection timed out|Timeout occurred",
            "no connection in time (a firewall, or the machine is down?)",
        ),
        ("Stream removed", "the connection broke, or did not come about in time (a firewall, or the machine is down?)"),
        ("Deadline Exceeded", "no answer in time (a slow disk, a busy node, or something else on this port?)"),
        ("Failed parsing HTTP/2|Expected SETTINGS", "another program is on that port, or a node that speaks TLS"),
        (
            "CERTIFICATE_VERIFY_FAILED|certificate verify failed",
            "its certificate is not trusted (`marble doctor` says why)",
        ),
        (
            "Ssl handshake failed|SSL_ERROR_SSL|handshaker shutdown",
            "the TLS handshake failed (`marble doctor` says why)",
        ),
        ("Connection reset|Socket closed|recvmsg|Broken pipe", "the connection broke"),
    )
)
"""What gRPC says of common causes, by a part of it, and what a user can do with."""

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


def from_flight_error(error: BaseException, *, changes: bool = False, peer: str = "") -> MarbleError:
    """The `MarbleError` behind an exception that a Flight call raised.

    Parameters
    ----------
    error
        What the call raised.
    changes
        Whether the call may have changed something: then a lost answer is an OutcomeUnknownError, else an
        UnavailableError.
    peer
        Who was called, ``host:port``: for the message, if no server has written it.
    """
    if isinstance(error, MarbleError):
        return error
    told = _told(error)
    if told is not None:
        return told
    lost: type[MarbleError] = OutcomeUnknownError if changes else UnavailableError
    if (explained := explain(str(error))) is not None:
        # It never got as far as to do anything.
        return UnavailableError(explained)
    who = f"{peer}: " if peer else ""
    if isinstance(error, fl.FlightUnavailableError | fl.FlightTimedOutError | fl.FlightCancelledError):
        return lost(f"{who}{cause_of(error)}")
    if isinstance(error, fl.FlightUnauthenticatedError):
        return UnauthenticatedError(f"{who}refused: {cause_of(error)}")
    if isinstance(error, fl.FlightUnauthorizedError):
        return ForbiddenError(f"{who}refused: {cause_of(error)}")
    if isinstance(error, OSError):
        return lost(f"{who}the stream broke: {cause_of(error)}")
    if isinstance(error, fl.FlightError):
        return lost(f"{who}the server failed: {cause_of(error)}")
    if isinstance(error, pa.ArrowException):
        if isinstance(error, pa.ArrowNotImplementedError):
            return ProtocolError(f"{who}this is not a marble node, or one of another version: {cause_of(error)}")
        return ProtocolError(f"{who}the answer is not what it should be: {cause_of(error)}")
    return InvariantError(f"{type(error).__name__}: {error}")


def cause_of(error: BaseException) -> str:
    """What a user should read of an error, without what gRPC says to those who work on gRPC."""
    text = str(_told(error) or error)
    if (explained := explain(text)) is not None:
        return explained
    text = _PREFIX.sub("", text.partition(" gRPC client debug context")[0]).strip()
    for pattern, words in _CAUSES:
        if pattern.search(text):
            return words
    return _LAST_ERROR.sub("", text).rstrip(".") or type(error).__name__


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
    except (ValueError, RecursionError):
        return None
    if not isinstance(info, dict) or not isinstance(info.get("message"), str):
        return None
    kind = ERROR_CODES.get(str(info.get("code")))
    if kind is None:
        return None
    if kind is NotLeaderError:
        leader = info.get("leader")
        return NotLeaderError(info["message"], leader if isinstance(leader, str) else None)
    return kind(info["message"])
