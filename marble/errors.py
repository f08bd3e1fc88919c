"""The errors of marble. Each class answers one question: what should the caller do now?

The tree is closed: every error that marble raises on purpose is one of the leaves below. ``ERROR_CODES`` gives each
leaf the name under which it crosses the wire, so that a remote call raises the same class as a local one.
"""

from __future__ import annotations

from typing import ClassVar


class MarbleError(Exception):
    """Base of all errors that marble raises on purpose."""

    code: ClassVar[str] = "marble"


class UsageError(MarbleError, ValueError):
    """The call itself is wrong: mend the call. Nothing was replicated."""

    code = "usage"


class NotLeaderError(MarbleError):
    """This node does not lead. Nothing was replicated: repeat the call at ``leader``.

    Parameters
    ----------
    message
        What was asked of whom.
    leader
        Endpoint (``host:port``) of the leader as far as this node knows, or None.
    """

    code = "not_leader"

    def __init__(self, message: str, leader: str | None = None) -> None:
        super().__init__(message)
        self.leader = leader


class UnavailableError(MarbleError):
    """It cannot be done now (no leader, a full queue, a node that stops). Nothing was replicated: retry later."""

    code = "unavailable"


class OutcomeUnknownError(MarbleError):
    """The write was handed on and its answer is lost: it may or may not take effect.

    Read before deciding, or repeat it only with the same session and sequence, or if repeating is harmless.
    """

    code = "outcome_unknown"


class SessionExpiredError(OutcomeUnknownError):
    """The session that this write belongs to is over, or no longer knows it: this attempt was not carried out.

    If it was the first attempt, nothing was written: open another session and write again. If there was an earlier one, that
    one may or may not have taken effect.
    """

    code = "session_expired"


class UnauthenticatedError(MarbleError):
    """The node does not know who calls: bring a token or a certificate that it takes. Nothing was replicated."""

    code = "unauthenticated"


class ForbiddenError(MarbleError):
    """The node knows who calls, and it may not do this: ask the operator. Nothing was replicated."""

    code = "forbidden"


class ProtocolError(MarbleError):
    """A peer or a client broke the protocol. The message is dropped and counted; this node is unharmed."""

    code = "protocol"


class CorruptionError(MarbleError):
    """Stored bytes are not what was written. Do not go on with this copy.

    Parameters
    ----------
    message
        What is damaged and what to do.
    path
        The file, where one is known.
    offset
        Where in the file the damaged part starts, in bytes.
    """

    code = "corruption"

    def __init__(self, message: str, path: str | None = None, offset: int | None = None) -> None:
        where = "" if path is None else f" ({path}" + ("" if offset is None else f", offset {offset}") + ")"
        super().__init__(message + where)
        self.problem = message
        self.path = path
        self.offset = offset


class InvariantError(MarbleError):
    """marble itself is wrong, or its disk failed under it. The node stops; please report it."""

    code = "invariant"


ERROR_CODES: dict[str, type[MarbleError]] = {
    error.code: error
    for error in (
        UsageError,
        NotLeaderError,
        UnavailableError,
        OutcomeUnknownError,
        SessionExpiredError,
        UnauthenticatedError,
        ForbiddenError,
        ProtocolError,
        CorruptionError,
        InvariantError,
    )
}


def check(condition: object, message: str) -> None:
    """Raise InvariantError unless `condition` holds. Unlike ``assert`` it stays under ``python -O``."""
    if not condition:
        raise InvariantError(message)
