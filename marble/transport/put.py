"""A client's stream of writes to one table: pipelined, in order, and honest about what it does not know.

Rule 1: a write is sent again only if the server said that nothing was replicated, and only if no later write of this stream
may have taken effect, since a repeat must not overtake. What was sent and never answered ends in `OutcomeUnknownError`.

It is a DoExchange and not a DoPut because only an exchange can be cancelled, which is what makes deadlines hold when a server
falls silent. The acknowledgements are the same.

Threads: any thread may `write`. One thread of the stream's own ("marble-put-…") opens it, reads acknowledgements and mends it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.flight as fl

from marble.errors import (
    MarbleError,
    NotLeaderError,
    OutcomeUnknownError,
    ProtocolError,
    UnavailableError,
    UsageError,
    check,
)
from marble.transport.faults import from_flight_error
from marble.transport.wire import Ack, decode_acks

STREAM_ERRORS: Final = (pa.ArrowException, OSError)
"""What Flight raises when a stream breaks: some breaks come as Arrow's IOError, which is Python's OSError."""

IN_FLIGHT_BATCHES_MAX: Final = 1024
"""Writes of one stream that wait for their answer; a further `write` waits for room."""

IN_FLIGHT_BYTES_MAX: Final = 64 * 1024 * 1024
"""The same in bytes of Arrow buffers; a single larger batch is let through alone."""

REFUSED_PAUSE_MIN_S: Final = 0.01
REFUSED_PAUSE_MAX_S: Final = 0.5
"""Before what was refused, or could not be sent, is sent again; doubling while that goes on."""


@dataclass(slots=True, eq=False)
class _Item:
    """One batch on its way. ``refusal`` is set when the server said that it was not replicated."""

    batch: pa.RecordBatch
    size: int
    future: Future[Ack]
    deadline: float
    refusal: MarbleError | None = None

    def refuse(self) -> None:
        assert self.refusal is not None
        self.future.set_exception(self.refusal)


def _longer(pause_s: float) -> float:
    return min(max(2 * pause_s, REFUSED_PAUSE_MIN_S), REFUSED_PAUSE_MAX_S)


class PutStream:
    """Writes to one place (a table, or its deletes), acknowledged in order. Thread-safe.

    - Writes are sent in the order in which `write` was called, and answered in that order.
    - ``_sent`` holds what the current stream owes an answer for, ``_backlog`` what the next stream has to send.
    - ``_order`` is held while sending, so that order on the wire is order in ``_sent``; never take it while holding ``_state``.

    Parameters
    ----------
    path
        The descriptor's path, e.g. ``("flights", "put")``.
    schema
        Of every batch.
    locate
        Finds the node to write to, waiting until the given moment (``time.monotonic()``); raises UnavailableError.
        Its argument ``failed`` says that the last stream broke.
    timeout_s
        How long a write may take before its outcome is unknown.
    options
        Of the Flight call; it must not carry a deadline, as the stream lives as long as it is used.
    """

    def __init__(
        self,
        path: tuple[str, ...],
        schema: pa.Schema,
        locate: Callable[[float, bool], fl.FlightClient],
        timeout_s: float,
        options: fl.FlightCallOptions | None = None,
    ) -> None:
        self._path = path
        self._schema = schema
        self._locate = locate
        self._timeout_s = timeout_s
        self._options = options
        self._order = threading.Lock()
        self._state = threading.Condition()
        self._backlog: deque[_Item] = deque()
        self._sent: deque[_Item] = deque()
        self._bytes = 0
        self._count = 0
        self._writer: fl.FlightStreamWriter | None = None
        self._reader: fl.FlightStreamReader | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    def write(self, batch: pa.RecordBatch) -> Future[Ack]:
        """Send `batch`. The future ends with an Ack whose ``error_code`` is None, or with what the Ack said.

        Waits while too much is in flight; raises UnavailableError if there is no room in time, UsageError after `close`.
        """
        future: Future[Ack] = Future()
        future.set_running_or_notify_cancel()
        item = _Item(batch, batch.nbytes, future, time.monotonic() + self._timeout_s)
        with self._order:
            with self._state:
                self._admit(item)
                if self._writer is None:
                    self._backlog.append(item)
                    self._state.notify_all()
                    return future
                writer = self._writer
                self._sent.append(item)
            self._send(writer, item)
        return future

    def expire(self, now: float) -> float:
        """Give up a stream that owes an answer since too long. Returns when to look again (``time.monotonic()``)."""
        with self._state:
            reader = self._reader
            late = bool(self._sent) and self._sent[0].deadline <= now
            due = self._sent[0].deadline if self._sent else now + self._timeout_s
        if late and reader is not None:
            reader.cancel()
            return now + self._timeout_s
        return due

    def abort(self) -> None:
        """Give up at once: what was sent and not answered ends in OutcomeUnknownError. Does not wait."""
        with self._state:
            self._closing = True
            reader = self._reader
            self._state.notify_all()
        if reader is not None:
            reader.cancel()

    def close(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds for what is in flight, then end the stream. Idempotent."""
        with self._state:
            # First, so that a `write` that waits for room while it holds `_order` gives up.
            self._closing = True
            self._state.notify_all()
        with self._order:
            with self._state:
                writer, thread = self._writer, self._thread
            if writer is not None:
                try:
                    writer.done_writing()
                except STREAM_ERRORS:
                    pass  # The stream broke at the same moment: its thread finds out and ends all the same.
        if thread is None:
            return
        try:
            thread.join(timeout_s)
        except RuntimeError:
            return  # A Ctrl-C came while it was being started: nothing was sent.
        if thread.is_alive():
            with self._state:
                reader = self._reader
            if reader is not None:
                reader.cancel()
            thread.join(timeout_s)

    # -- under the caller's thread -----------------------------------------------------------------------------------

    def _admit(self, item: _Item) -> None:
        def room() -> bool:
            fits = self._count < IN_FLIGHT_BATCHES_MAX and self._bytes + item.size <= IN_FLIGHT_BYTES_MAX
            return fits or not self._count or self._closing

        if not self._state.wait_for(room, max(0.0, item.deadline - time.monotonic())):
            raise UnavailableError("too many writes wait for their answer: nothing was sent; retry later")
        if self._closing:
            raise UsageError("the connection is closed")
        self._count += 1
        self._bytes += item.size
        if self._thread is None:
            name = "marble-put-" + "/".join(self._path)
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()

    def _send(self, writer: fl.FlightStreamWriter, item: _Item) -> None:
        try:
            writer.write_batch(item.batch)
        except STREAM_ERRORS:
            # Part of it may have left. The thread that reads sees the stream end and says so to all that wait.
            with self._state:
                reader = self._reader
            if reader is not None:
                reader.cancel()

    # -- the stream's own thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        failed = False
        pause_s = 0.0
        while True:
            with self._state:
                if pause_s:
                    # Refused or broken: the leader is full, or there is none. `close` cuts the pause short.
                    self._state.wait_for(lambda: self._closing, pause_s)
                self._state.wait_for(lambda: self._backlog or self._closing)
                if not self._backlog:
                    return
                deadline = self._backlog[0].deadline
            try:
                # Held until the stream is settled: pyarrow ends the whole exchange when its writer is collected.
                writer = self._open(self._locate(deadline, failed))
            except MarbleError as error:
                failed = True
                self._fail_backlog(error)
                continue
            except STREAM_ERRORS as error:
                failed, pause_s = True, _longer(pause_s)
                if time.monotonic() >= deadline:
                    self._fail_backlog(UnavailableError(f"no node took the write in time: {from_flight_error(error)}"))
                continue
            refused, why = self._read_acks()
            failed = bool(refused) or why is not None
            pause_s = _longer(pause_s) if refused else 0.0
            self._settle(refused, why)
            # After the end of the stream this only collects its status, which is known.
            with contextlib.suppress(*STREAM_ERRORS):
                writer.close()

    def _open(self, client: fl.FlightClient) -> fl.FlightStreamWriter:
        writer, reader = client.do_exchange(fl.FlightDescriptor.for_path(*self._path), self._options)
        writer.begin(self._schema)
        with self._order:
            with self._state:
                self._writer, self._reader = writer, reader
                waiting = list(self._backlog)
                self._backlog.clear()
                self._sent.extend(waiting)
                closing = self._closing
            for item in waiting:
                self._send(writer, item)
            if closing:
                writer.done_writing()
        return writer

    def _read_acks(self) -> tuple[list[_Item], BaseException | None]:
        """Answer writes until the stream ends, or until it has refused one and owes nothing more.

        Returns what was refused and may be sent again, and what broke the stream.
        """
        reader = self._reader
        assert reader is not None
        refused: list[_Item] = []
        while True:
            try:
                acks = decode_acks(reader.read_chunk().app_metadata)
            except StopIteration:
                return refused, None
            except (*STREAM_ERRORS, MarbleError) as error:
                return refused, error
            for ack in acks:
                with self._state:
                    if not self._sent:
                        return refused, ProtocolError("the server acknowledged more than was written")
                    item = self._sent.popleft()
                self._take_ack(item, ack, refused)
            with self._state:
                if self._writer is None and not self._sent:
                    reader.cancel()
                    return refused, None

    def _take_ack(self, item: _Item, ack: Ack, refused: list[_Item]) -> None:
        """Answer `item`, or keep it in `refused` to be sent again."""
        answer = ack.error()
        if isinstance(answer, NotLeaderError | UnavailableError):
            item.refusal = answer
            refused.append(item)
            with self._state:
                # Nothing more goes out here; it waits in the backlog behind what is to be sent again.
                self._writer = None
            return
        # It may have taken effect: sending an earlier one again would overtake it.
        for earlier in refused:
            self._done(earlier)
            earlier.refuse()
        refused.clear()
        self._done(item)
        if answer is None:
            item.future.set_result(ack)
        else:
            item.future.set_exception(answer)

    def _settle(self, refused: list[_Item], why: BaseException | None) -> None:
        """The stream has ended: decide about everything that it still owed."""
        with self._state:
            self._writer = self._reader = None
            unknown = list(self._sent)
            self._sent.clear()
            now = time.monotonic()
            again = [] if unknown else [item for item in refused if item.deadline > now and not self._closing]
            for item in reversed(again):
                self._backlog.appendleft(item)
        for item in refused:
            if item not in again:
                self._done(item)
                item.refuse()
        reason = from_flight_error(why) if isinstance(why, STREAM_ERRORS) else why
        for item in unknown:
            self._done(item)
            item.future.set_exception(
                OutcomeUnknownError(
                    f"the write was sent and its answer was lost ({reason or 'the server ended the stream'})"
                )
            )

    def _fail_backlog(self, error: MarbleError) -> None:
        with self._state:
            waiting = list(self._backlog)
            self._backlog.clear()
        for item in waiting:
            self._done(item)
            item.future.set_exception(error)

    def _done(self, item: _Item) -> None:
        with self._state:
            self._count -= 1
            self._bytes -= item.size
            check(self._count >= 0, "more writes ended than began")
            self._state.notify_all()
