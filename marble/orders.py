"""What a client has the leader do: an action that is carried out once, over lost answers and changes of leader.

Rule 1: what is stamped is sent again under the same stamp until its deadline; its session is opened with the first of them.
Rule 2: what cannot be stamped is sent again only after a refusal.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import pyarrow.flight as fl

from marble.errors import (
    MarbleError,
    NotLeaderError,
    OutcomeUnknownError,
    ProtocolError,
    SessionExpiredError,
    UnavailableError,
    UsageError,
)
from marble.transport.faults import from_flight_error
from marble.transport.put import STREAM_ERRORS
from marble.transport.wire import Stamp, call_options, check_number, decode_json

RETRY_WAIT_MIN_S: Final = 0.01
RETRY_WAIT_MAX_S: Final = 0.5
STATUS_BYTES_MAX: Final = 1024 * 1024
ATTEMPT_TIMEOUT_S: Final = 8.0
"""How long one node may take to answer a call before the next one is asked: above a node's own deadlines, which give the better error."""


class Backoff:
    """Waits that grow, with jitter, until a deadline (``time.monotonic()``) or until `closed` is set."""

    def __init__(self, deadline: float, closed: threading.Event) -> None:
        self._deadline = deadline
        self._closed = closed
        self._wait_s = RETRY_WAIT_MIN_S

    def wait(self, why: MarbleError) -> None:
        """Wait before the next try; raise `why` if there is no time for one."""
        wait_s = self._wait_s * (0.5 + random.random())
        self._wait_s = min(2 * self._wait_s, RETRY_WAIT_MAX_S)
        if time.monotonic() + wait_s >= self._deadline or self._closed.wait(wait_s):
            raise why


class Orders:
    """Sends actions to the leader. Thread-safe.

    Parameters
    ----------
    locate
        Finds the leader until the given moment; its second argument says that the last guess did not work out.
    timeout_s
        How long one action may take, finding the leader included.
    closed
        Set when the client is closed.
    """

    def __init__(
        self, locate: Callable[[float, bool], fl.FlightClient], timeout_s: float, closed: threading.Event
    ) -> None:
        self._locate = locate
        self._timeout_s = timeout_s
        self._closed = closed
        self._lock = threading.Lock()
        self._session = 0
        self._sequence = 0

    @property
    def session(self) -> int:
        """The session of what is stamped; 0 if there is none now."""
        return self._session

    def once(self, name: str, body: bytes) -> bytes:
        """Have the leader do what must not be repeated: sent again only after a refusal. Raises like `change`."""
        deadline = time.monotonic() + self._timeout_s
        backoff = Backoff(deadline, self._closed)
        failed = False
        while True:
            try:
                return act(self._locate(deadline, failed), name, body, _left(deadline), changes=True)
            except (NotLeaderError, UnavailableError) as error:
                failed, why = True, error
            backoff.wait(why)

    def change(self, name: str, body: bytes) -> bytes:
        """Have the leader do what changes something: it takes effect once, however often it has to be sent.

        Raises
        ------
        UnavailableError
            If nothing was done in time.
        OutcomeUnknownError
            If it was sent and has no answer in time, or its session ended before one came.
        MarbleError
            What the leader answered.
        """
        deadline = time.monotonic() + self._timeout_s
        backoff = Backoff(deadline, self._closed)
        stamp: Stamp | None = None
        failed = unresolved = False
        why: MarbleError
        while True:
            try:
                client = self._locate(deadline, failed)
                stamp = stamp or self._next_stamp(client, deadline)
                return act(client, name, body, min(_left(deadline), ATTEMPT_TIMEOUT_S), stamp)
            except SessionExpiredError as error:
                self._end_session(stamp)
                if unresolved:
                    raise
                stamp, why = None, UnavailableError(str(error))
            except (NotLeaderError, UnavailableError, OutcomeUnknownError) as error:
                unresolved = unresolved or isinstance(error, OutcomeUnknownError)
                why = OutcomeUnknownError(f"{name} was sent and has no answer: {error}") if unresolved else error
            failed = True
            backoff.wait(why)

    def _next_stamp(self, client: fl.FlightClient, deadline: float) -> Stamp:
        with self._lock:
            if not self._session:
                self._session, self._sequence = open_session(client, deadline), 0
            self._sequence += 1
            return Stamp(self._session, self._sequence)

    def _end_session(self, stamp: Stamp | None) -> None:
        with self._lock:
            if stamp is not None and stamp.session == self._session:
                self._session = 0


def open_session(client: fl.FlightClient, deadline: float) -> int:
    """Open a session at the leader `client`; its number. Raises what the leader answers, or UnavailableError."""
    # Opening another one in place of one whose number was lost is harmless.
    answer = act(client, "open_session", b"", min(_left(deadline), ATTEMPT_TIMEOUT_S))
    try:
        return check_number(as_object(answer).get("session"), "session")
    except UsageError as error:
        raise ProtocolError(str(error)) from None


def _left(deadline: float) -> float:
    return max(RETRY_WAIT_MIN_S, deadline - time.monotonic())


def act(
    client: fl.FlightClient,
    name: str,
    body: bytes,
    timeout_s: float,
    stamp: Stamp | None = None,
    *,
    changes: bool = False,
    peer: str = "",
) -> bytes:
    """One action of `peer`; what Flight raises comes out as a MarbleError: a lost answer, if it `changes` something, as unknown
    outcome.
    """
    try:
        answers = list(client.do_action(fl.Action(name, body), call_options(timeout_s, stamp=stamp)))
    except STREAM_ERRORS as error:
        raise from_flight_error(error, changes=changes or stamp is not None, peer=peer) from None
    if len(answers) != 1:
        raise ProtocolError(f"a node answered {name} {len(answers)} times")
    return bytes(answers[0].body.to_pybytes())


def as_object(answer: bytes) -> dict[str, Any]:
    """The JSON object that an action answered. Raises ProtocolError for anything else."""
    value = decode_json(answer, "an answer", STATUS_BYTES_MAX)
    if not isinstance(value, dict):
        raise ProtocolError("an answer is not a JSON object")
    return value


def no_leader(nodes: Sequence[str], silent: Sequence[str]) -> str:
    """Why there is nobody to write to: `silent` has what came of asking those of `nodes` that did not answer."""
    if len(silent) >= len(nodes):
        return f"none answers ({'; '.join(silent)}): `marble doctor {','.join(nodes)}` says more"
    but = f" ({'; '.join(silent)})" if silent else ""
    return (
        f"no leader is known to {', '.join(nodes)}{but}: a majority of the voters must run and reach each other, see "
        f"`marble doctor {nodes[0]}`"
    )
