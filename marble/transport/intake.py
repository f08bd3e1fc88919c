"""The server's end of a stream of writes: every batch is answered, in order, and what is under way is bounded.

Rule 1: acks leave in the order in which the batches came, one for each. Batches go either to this node's log or,
through a relay, to the leader. The way changes only when nothing is under way, or when what is under way was refused
and none of it has taken effect: a batch never overtakes an earlier one of its stream.
Rule 2: once a batch was refused, all that come after it in its stream are; so it is when the outcome of a batch with a stamp
cannot be told. Its client then sends them again, in order, in another stream.

Threads: the Flight handler reads and calls `Intake.take`; one thread of the intake's own ("marble-ack-…") waits for
outcomes and writes acks. It ends with the ``with`` block that the handler puts around the intake.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol

import pyarrow as pa

from marble.errors import (
    InvariantError,
    MarbleError,
    NotLeaderError,
    OutcomeUnknownError,
    SessionExpiredError,
    UnavailableError,
)
from marble.transport.wire import Ack, Stamp, encode_acks

UNDER_WAY_BATCHES_MAX: Final = 1024
"""Batches of one stream that wait for their outcome; the next one is not read before one of them has it."""

UNDER_WAY_BYTES_MAX: Final = 64 * 1024 * 1024
"""The same in bytes of Arrow buffers; a single larger batch is let through alone."""

RELAY_END_TIMEOUT_S: Final = 1.0
"""How long the end of a stream waits for its relay, which by then owes nothing."""


RESIGNED_WAIT_S: Final = 0.3
"""What has a stamp and was offered here has its outcome so long after this node ceased to lead, or not before it hears from the others
again, which may take any time: its client is told to ask the new leader, under the same stamp."""

RESIGNED_LOOK_S: Final = 0.1
"""How often a batch that waits looks whether this node still leads."""


class StreamEndedError(Exception):
    """Inside this floor: the stream takes no more, because its client is gone or the server stops."""


class Relay(Protocol):
    """The way to the leader (`marble.transport.put.PutStream`)."""

    def write(self, batch: pa.RecordBatch, stamp: Stamp | None) -> Future[Ack]: ...

    def abort(self) -> None: ...

    def close(self, timeout_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Ways:
    """Where the batches of one stream may go.

    Attributes
    ----------
    offer
        Puts a batch, with its stamp if it has one, into this node's log; raises what the caller did wrong. Its last argument
        says that nothing of the stream is under way, so that a new leadership may begin with this batch.
    leads
        Whether this node leads, as far as it knows.
    open_relay
        Opens the way to the leader; None: the client asked for refusals instead.
    timeout_s
        After this an outcome is taken for lost. Above the deadlines of the log and the relay, which say more.
    """

    offer: Callable[[pa.RecordBatch, Stamp | None, bool], Future[Ack]]
    leads: Callable[[], bool]
    open_relay: Callable[[], Relay] | None
    timeout_s: float


@dataclass(slots=True, eq=False)
class _Item:
    """One batch under way; ``batch`` is None if it was refused before it went anywhere."""

    batch: pa.RecordBatch | None
    stamp: Stamp | None
    size: int
    future: Future[Ack]
    deadline: float

    def error(self) -> BaseException | None:
        """How the batch failed; None if it did not, or not yet."""
        return self.future.exception() if self.future.done() else None


def _failed(error: MarbleError) -> Future[Ack]:
    future: Future[Ack] = Future()
    future.set_exception(error)
    return future


class Intake:
    """Takes the batches of one stream and answers them. `take` and `refuse` belong to one thread, `stop` to any.

    - ``_window`` holds what has no ack yet, in order of arrival; only the acking thread removes from it.
    - ``_relayed`` changes only under ``_route``, and then no item of ``_window`` is under way the old way.
    - ``_route`` is taken before ``_state``, never after it.

    Parameters
    ----------
    name
        For the thread, e.g. the table's name.
    ways
        Where batches go.
    answer
        Writes a message of acks; may block as long as the client does not read, and raises when the client is gone.
    acks_max
        Acks in one message: 1 where the protocol wants one for each batch.
    """

    def __init__(self, name: str, ways: Ways, answer: Callable[[bytes], None], acks_max: int = 1) -> None:
        self._ways = ways
        self._answer = answer
        self._acks_max = acks_max
        self._awaited: Future[Ack] | None = None
        self._route = threading.Lock()
        self._state = threading.Condition()
        self._window: deque[_Item] = deque()
        self._bytes = 0
        self._relay: Relay | None = None
        self._relayed = False
        self._refusal: MarbleError | None = None
        self._finishing = False
        self._stopping = False
        self._broken = False
        self._thread = threading.Thread(target=self._run, name=f"marble-ack-{name}", daemon=True)

    def __enter__(self) -> Intake:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Wait until everything taken is answered; after an error of the stream, only until the thread has ended."""
        ended = kind is not None and issubclass(kind, StreamEndedError)
        with self._state:
            self._finishing = True
            self._broken = self._broken or (kind is not None and not ended)
            relay, broken = self._relay, self._broken
            self._state.notify_all()
        if relay is not None and broken:
            relay.abort()
        self._thread.join()
        if self._relay is not None:
            self._relay.close(RELAY_END_TIMEOUT_S)
        return ended

    def take(self, batch: pa.RecordBatch, stamp: Stamp | None = None) -> None:
        """Send `batch` on its way. Waits while too much is under way.

        Raises
        ------
        StreamEndedError
            If the client is gone or the server stops.
        """
        size = batch.nbytes
        self._wait_for_room(size)
        with self._route:
            if not self._window:
                self._relayed = self._ways.open_relay is not None and not self._ways.leads()
            sent = self._send(batch, stamp)
            self._append(_Item(batch, stamp, size, sent, time.monotonic() + self._ways.timeout_s))

    def refuse(self, error: MarbleError) -> None:
        """Answer `error` in the place of a batch that cannot be taken."""
        self._wait_for_room(0)
        with self._route:
            self._append(_Item(None, None, 0, _failed(error), 0.0))

    def stop(self) -> None:
        """The server stops: answer OutcomeUnknownError to what is under way and take no more."""
        with self._state:
            self._stopping = True
            relay = self._relay
            self._state.notify_all()
        if relay is not None:
            relay.abort()

    # -- under the handler's thread ------------------------------------------------------------------------------------

    def _wait_for_room(self, size: int) -> None:
        def room() -> bool:
            if self._stopping or self._broken or not self._window:
                return True
            return len(self._window) < UNDER_WAY_BATCHES_MAX and self._bytes + size <= UNDER_WAY_BYTES_MAX

        with self._state:
            self._state.wait_for(room)
            if self._stopping or self._broken:
                raise StreamEndedError

    def _send(self, batch: pa.RecordBatch, stamp: Stamp | None) -> Future[Ack]:
        """Start `batch` on the present way. Called under ``_route``.

        A refusal holds for all that follows in the stream: whatever was taken after it would have passed it.
        """
        if self._refusal is not None:
            return _failed(self._refusal)
        try:
            if not self._relayed:
                return self._ways.offer(batch, stamp, not self._window)
            return self._the_relay().write(batch, stamp)
        except MarbleError as error:
            if isinstance(error, NotLeaderError | UnavailableError):
                self._refusal = error
            return _failed(error)

    def _the_relay(self) -> Relay:
        with self._state:
            if self._stopping:
                raise UnavailableError("the node stops: nothing was written")
            if self._relay is None:
                assert self._ways.open_relay is not None
                self._relay = self._ways.open_relay()
            return self._relay

    def _append(self, item: _Item) -> None:
        with self._state:
            self._window.append(item)
            self._bytes += item.size
            self._state.notify_all()
        item.future.add_done_callback(self._wake)

    def _wake(self, future: Future[Ack]) -> None:
        with self._state:
            # Others are seen when their turn comes; to wake the thread for each would cost more than its work.
            if future is self._awaited:
                self._state.notify_all()

    # -- the intake's own thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (item := self._head()) is not None:
                self._await(item)
                if self._may_mend(item):
                    self._mend()
                    self._await(item)
                refusal = self._refusal_after(item)
                if refusal is not None:
                    with self._route:
                        self._refusal = refusal
                items = [item, *self._succeeded()]
                self._answer(encode_acks([self._ack(each) for each in items]))
                with self._state:
                    for each in items:
                        self._window.popleft()
                        self._bytes -= each.size
                    self._state.notify_all()
        except (pa.ArrowException, OSError):
            # The client is gone. What is under way takes its course; nobody is left to tell.
            with self._state:
                self._broken = True
                self._state.notify_all()

    @staticmethod
    def _refusal_after(item: _Item) -> MarbleError | None:
        """What all that follows `item` in the stream is told, if the end of `item` forbids that it be taken."""
        error = item.error()
        if isinstance(error, NotLeaderError | UnavailableError):
            return error
        known = item.future.done() and (
            not isinstance(error, OutcomeUnknownError) or isinstance(error, SessionExpiredError)
        )
        if known or item.stamp is None:
            return None
        return UnavailableError(
            "the outcome of an earlier batch of this stream is not known: send it again in another one"
        )

    def _head(self) -> _Item | None:
        """The next batch to answer; None when the stream is over."""
        with self._state:
            self._state.wait_for(lambda: self._window or self._finishing or self._broken or self._stopping)
            return self._window[0] if self._window and not self._broken else None

    def _succeeded(self) -> list[_Item]:
        """What directly follows the next batch to answer and was written too, as far as one message may answer it."""
        with self._state:
            following = itertools.islice(self._window, 1, self._acks_max)
            return list(itertools.takewhile(lambda item: item.future.done() and item.error() is None, following))

    def _await(self, item: _Item) -> None:
        """Wait until `item` has an outcome, or there is no use in waiting."""

        def over() -> bool:
            return item.future.done() or self._stopping or self._broken

        with self._state:
            self._awaited = item.future
            led = now = time.monotonic()
            while not over() and now < item.deadline and now - led < RESIGNED_WAIT_S:
                self._state.wait_for(over, min(item.deadline - now, RESIGNED_LOOK_S))
                now = time.monotonic()
                if item.stamp is None or self._relayed or self._ways.leads():
                    led = now
            self._awaited = None

    def _ack(self, item: _Item) -> Ack:
        if not item.future.done():
            why = "the node stops" if self._stopping else f"no outcome was known after {self._ways.timeout_s} s"
            return Ack.of_error(OutcomeUnknownError(f"{why}: the batch may or may not have been written"))
        error = item.error()
        if error is None:
            return item.future.result()
        return Ack.of_error(error if isinstance(error, MarbleError) else InvariantError(repr(error)))

    def _may_mend(self, item: _Item) -> bool:
        """Whether `item` was refused only because another node leads now, and may be sent there."""
        if self._relayed or self._ways.open_relay is None or self._stopping or item.batch is None:
            return False
        error = item.error()
        # A leader that lost its post says that it is unavailable for what it could not replicate any more.
        return isinstance(error, NotLeaderError) or (isinstance(error, UnavailableError) and not self._ways.leads())

    def _mend(self) -> None:
        """Send everything under way to the leader, unless some of it may have taken effect already."""
        with self._route:
            # Nothing is appended while the route is held. All outcomes have deadlines of their own.
            items = list(self._window)
            for item in items:
                self._await(item)
            refused = [item for item in items if isinstance(item.error(), NotLeaderError | UnavailableError)]
            last = items.index(refused[-1])
            if any(self._may_have_effect(item) for item in items[:last]):
                return
            self._relayed = True
            self._refusal = None
            for item in refused:
                item.future = self._send(item.batch, item.stamp)
                item.deadline = time.monotonic() + self._ways.timeout_s
                item.future.add_done_callback(self._wake)

    @staticmethod
    def _may_have_effect(item: _Item) -> bool:
        return not item.future.done() or item.error() is None or isinstance(item.error(), OutcomeUnknownError)
