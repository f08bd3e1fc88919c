"""A client's stream of writes to one table: pipelined, in order, and honest about what it does not know.

Rule 1: no write of this stream takes effect after a later one. What is sent again goes out before what was not sent yet, and is given
up if a later write may have passed it.
Rule 2: without a session, a write is sent again only if the server said that nothing was replicated; what was sent and never answered
ends in `OutcomeUnknownError`.
Rule 3: with a session, it is sent again under the same number until its deadline: the replicas carry it out once. A number is never
changed while an attempt under it may still take effect. The other end helps with rule 1: after one write of a stream whose outcome it
cannot tell, it refuses all that follow in that stream (`marble.transport.intake`), so that they come again in order.

Rule 4: nothing waits while the stream owes few answers. Above that, small writes are gathered and go out as one batch, under one number,
as soon as an answer comes: they take effect at one index, or none of them does. What was gathered once stays so.

It is a DoExchange and not a DoPut because only an exchange can be cancelled, which is what makes deadlines hold when a server
falls silent. The acknowledgements are the same.

Threads: any thread may `write`. One thread of the stream's own ("marble-put-…") opens it, reads acknowledgements and mends it; another
("marble-gather-…"), begun when first needed, sends what was gathered.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

import pyarrow as pa
import pyarrow.flight as fl

from marble.errors import (
    MarbleError,
    NotLeaderError,
    OutcomeUnknownError,
    ProtocolError,
    SessionExpiredError,
    UnavailableError,
    UsageError,
    check,
)
from marble.transport import patience
from marble.transport.faults import from_flight_error
from marble.transport.gathering import Item, gather
from marble.transport.wire import Ack, Stamp, decode_acks, encode_stamp

STREAM_ERRORS: Final = (pa.ArrowException, OSError)
"""What Flight raises when a stream breaks: some breaks come as Arrow's IOError, which is Python's OSError."""


class PutStream:
    """Writes to one place (a table, or its deletes), acknowledged in order. Thread-safe.

    - Writes are sent in the order in which `write` was called, and answered in that order.
    - ``_sent`` holds what the current stream owes an answer for; ``_backlog`` what waits for a stream, or to be gathered.
    - ``_order`` is held while sending, so that order on the wire is order in ``_sent``; never take it while holding ``_state``.
    - ``_order`` is never waited for by the thread that reads: who holds it may wait for the other end, which waits for who reads acks.
    - ``_session`` and ``_sequence`` number what is sent for the first time, under ``_state``; a stream is open only with a session.
    - ``_dead``, once set, stays: a stream of somebody else's stamps has an outcome that it cannot tell, and takes no more.

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
    open_session
        Opens a session at the node that it is given, until the given moment. None: writes are not repeated, or carry
        the stamps of somebody who repeats them himself.
    gather_bytes_max
        How large a batch may become by gathering, in bytes of its IPC message; 0: nothing is gathered. It needs a session,
        and writes that cannot fail for what one of them has in it.
    """

    def __init__(
        self,
        path: tuple[str, ...],
        schema: pa.Schema,
        locate: Callable[[float, bool], fl.FlightClient],
        timeout_s: float,
        options: fl.FlightCallOptions | None = None,
        open_session: Callable[[fl.FlightClient, float], int] | None = None,
        gather_bytes_max: Callable[[], int] = lambda: 0,
    ) -> None:
        self._path = path
        self._schema = schema
        self._locate = locate
        self._timeout_s = timeout_s
        self._options = options
        self._open_session = open_session
        self._gather_bytes_max = gather_bytes_max
        self._session = 0
        self._sequence = 0
        self._dead: MarbleError | None = None
        self._heard_s = 0.0
        self._probed_s = 0.0
        self._client: fl.FlightClient | None = None
        self._progressed = False
        self._order = threading.Lock()
        self._state = threading.Condition()
        self._backlog: deque[Item] = deque()
        self._sent: deque[Item] = deque()
        self._bytes = 0
        self._count = 0
        self._writer: fl.FlightStreamWriter | None = None
        self._reader: fl.FlightStreamReader | None = None
        self._closing = False
        self._aborted = False
        self._thread: threading.Thread | None = None
        self._gatherer: threading.Thread | None = None

    @property
    def session(self) -> int:
        """The session under which it numbers what it sends; 0 if it has none now."""
        return self._session

    def write(self, batch: pa.RecordBatch, stamp: Stamp | None = None) -> Future[Ack]:
        """Send `batch`. The future ends with an Ack whose ``error_code`` is None, or with what the Ack said.

        `stamp` is for a stream without a session of its own: somebody else's number of this write.

        Waits while too much is in flight; raises UnavailableError if there is no room in time, UsageError after `close`.
        """
        future: Future[Ack] = Future()
        future.set_running_or_notify_cancel()
        item = Item(batch, batch.nbytes, (future,), time.monotonic() + self._timeout_s, stamp)
        with self._state:
            self._admit(item)
        with self._order:
            with self._state:
                if self._dead is not None or self._closing:
                    self._leave(item)
                    raise self._dead or UsageError("the connection is closed")
                writer = self._writer
                if writer is None or self._waits(item):
                    self._backlog.append(item)
                    self._state.notify_all()
                    return future
                self._owe(item)
            self._send(writer, item)
        return future

    def expire(self, now: float) -> float:
        """Give up a stream that owes an answer since too long. Returns when to look again (``time.monotonic()``)."""
        with self._state:
            reader = self._reader
            due = self._sent[0].deadline if self._sent else now + self._timeout_s
            if self._sent and self._open_session is not None:
                due = min(due, self._heard_s + patience.SILENCE_MAX_S, now + patience.PROBE_AFTER_S / 4)
        if due <= now and reader is not None:
            reader.cancel()
            return now + self._timeout_s
        return due

    def suspect(self, now: float) -> fl.FlightClient | None:
        """The client of a stream that owes answers for long: whoever asks is to find out whether anybody is there."""
        with self._state:
            usual_s = patience.PROBE_AFTER_S + sum(item.size for item in self._sent) / patience.SLOW_BYTES_PER_S
            owes = self._sent and self._open_session is not None and self._reader is not None
            late = owes and now >= max(self._heard_s, self._probed_s) + usual_s
            self._probed_s = now if late else self._probed_s
            return self._client if late else None

    def give_up_silent(self, heard_before: float) -> bool:
        """Give up the stream if it owes answers and its last one came before then (``time.monotonic()``). Whether it was so."""
        with self._state:
            reader = self._reader if self._sent and self._heard_s < heard_before else None
        if reader is not None:
            reader.cancel()
        return reader is not None

    def abort(self) -> None:
        """Give up at once: what was sent and not answered ends in OutcomeUnknownError. Does not wait."""
        with self._state:
            self._closing = self._aborted = True
            reader = self._reader
            self._state.notify_all()
        if reader is not None:
            reader.cancel()

    def close(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds for what is in flight, then end the stream. Idempotent."""
        with self._state:
            # First, so that a `write` that waits for room gives up.
            self._closing = True
            self._state.notify_all()
        if self._order.acquire(timeout=max(0.0, timeout_s)):
            try:
                self._end_writing()
            finally:
                self._order.release()
        else:
            self.abort()  # A server that does not read holds whoever sends.
        with self._state:
            thread, gatherer = self._thread, self._gatherer
        if gatherer is not None:
            gatherer.join(timeout_s)
        if thread is None:
            return
        try:
            thread.join(timeout_s)
        except RuntimeError:
            return  # A Ctrl-C came while it was being started: nothing was sent.
        if thread.is_alive():
            self.abort()
            thread.join(timeout_s)

    # -- under the caller's thread -----------------------------------------------------------------------------------

    def _admit(self, item: Item) -> None:
        def room() -> bool:
            full = (
                self._count >= patience.IN_FLIGHT_BATCHES_MAX or self._bytes + item.size > patience.IN_FLIGHT_BYTES_MAX
            )
            return not full or not self._count or self._closing

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

    def _waits(self, item: Item) -> bool:
        """Whether `item` is to be gathered although a stream is open. Called under ``_state``."""
        if self._backlog:
            return True  # It must not overtake what waits.
        if len(self._sent) < patience.GATHER_AFTER or not item.fresh or not self._gather_bytes_max():
            return False
        if self._gatherer is None:
            name = "marble-gather-" + "/".join(self._path)
            self._gatherer = threading.Thread(target=self._send_gathered, name=name, daemon=True)
            self._gatherer.start()
        return True

    def _flush(self, owed_max: int) -> None:
        """Send what waits, in order, while fewer than `owed_max` answers are owed. Called under ``_order``."""
        while True:
            with self._state:
                writer = self._writer
                if writer is None or not self._backlog or len(self._sent) >= owed_max:
                    return
                item = gather(self._backlog, self._gather_bytes_max())
                self._owe(item)
            self._send(writer, item)

    def _end_writing(self) -> None:
        """The last of what waits goes out, if a stream is open. Called under ``_order``."""
        self._flush(patience.IN_FLIGHT_BATCHES_MAX + 1)
        if (writer := self._writer) is not None:
            try:
                writer.done_writing()
            except STREAM_ERRORS:
                pass  # The stream broke at the same moment: its thread finds out and ends all the same.

    def _send_gathered(self) -> None:
        """What the gathering thread does until `close`, which sends the rest itself."""

        def ready() -> bool:
            return self._closing or bool(self._writer and self._backlog and len(self._sent) < patience.GATHER_AFTER)

        while True:
            with self._state:
                self._state.wait_for(ready)
                if self._closing:
                    return
            with self._order:
                self._flush(patience.GATHER_AFTER)

    def _owe(self, item: Item) -> None:
        """`item` is about to be sent; number it if this is the first time. Called under ``_state``."""
        if item.stamp is None and self._open_session is not None:
            self._sequence += 1
            item.stamp = Stamp(self._session, self._sequence)
        if not self._sent:
            self._heard_s = time.monotonic()
        self._sent.append(item)

    def _send(self, writer: fl.FlightStreamWriter, item: Item) -> None:
        """Write `item`. Called under ``_order``."""
        try:
            if item.stamp is None:
                writer.write_batch(item.batch)
            else:
                writer.write_with_metadata(item.batch, pa.py_buffer(encode_stamp(item.stamp)))
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
                    self._state.wait_for(lambda: self._aborted or (self._closing and not self._backlog), pause_s)
                self._state.wait_for(lambda: self._backlog or self._closing)
                if not self._backlog:
                    return
                deadline = self._backlog[0].deadline
            try:
                if self._aborted:
                    raise UnavailableError("the connection is closed")
                client = self._locate(deadline, failed)
            except MarbleError as error:
                failed = True
                self._fail_backlog(error)
                continue
            try:
                self._begin_session(client, deadline)
                # Held until the stream is settled: pyarrow ends the whole exchange when its writer is collected.
                writer = self._open(client)
            except (MarbleError, *STREAM_ERRORS) as failure:
                failed, pause_s = True, patience.longer(pause_s)
                told = from_flight_error(failure)
                mends = isinstance(told, UnavailableError | NotLeaderError | OutcomeUnknownError)
                if not mends or time.monotonic() >= deadline:
                    late = UnavailableError(f"no node took the write in time: {told}")
                    self._fail_backlog(late if mends else told)
                continue
            again, why = self._read_acks()
            failed = bool(again) or why is not None
            pause_s = patience.longer(0.0 if self._progressed else pause_s) if failed else 0.0
            self._settle(again, why)
            # After the end of the stream this only collects its status, which is known.
            with contextlib.suppress(*STREAM_ERRORS):
                writer.close()

    def _begin_session(self, client: fl.FlightClient, deadline: float) -> None:
        if self._open_session is not None and not self._session:
            session = self._open_session(client, deadline)
            with self._state:
                self._session, self._sequence = session, 0

    def _open(self, client: fl.FlightClient) -> fl.FlightStreamWriter:
        writer, reader = client.do_exchange(fl.FlightDescriptor.for_path(*self._path), self._options)
        writer.begin(self._schema)
        with self._order:
            with self._state:
                self._writer, self._reader, self._client = writer, reader, client
                self._progressed = False
            self._flush(patience.IN_FLIGHT_BATCHES_MAX + 1)
            if self._closing:
                writer.done_writing()
        return writer

    def _read_acks(self) -> tuple[list[Item], BaseException | None]:
        """Answer writes until the stream ends, or until it takes no more and owes nothing.

        Returns what is to be sent again, in order, and what broke the stream.
        """
        reader = self._reader
        assert reader is not None
        again: list[Item] = []
        while True:
            try:
                acks = decode_acks(reader.read_chunk().app_metadata)
            except StopIteration:
                return again, None
            except (*STREAM_ERRORS, MarbleError) as error:
                return again, error
            for ack in acks:
                with self._state:
                    self._heard_s = time.monotonic()
                    if not self._sent:
                        return again, ProtocolError("the server acknowledged more than was written")
                    item = self._sent.popleft()
                self._take_ack(item, ack, again)
            with self._state:
                if self._writer is None and not self._sent:
                    reader.cancel()
                    return again, None

    def _take_ack(self, item: Item, ack: Ack, again: list[Item]) -> None:
        """Answer `item`, or keep it in `again` to be sent again."""
        answer = ack.error()
        if self._may_repeat(item, answer):
            again.append(item)
            with self._state:
                # Nothing more goes out here; it waits in the backlog behind what is to be sent again.
                self._writer = None
            return
        # It may have taken effect: what was refused before it would overtake it. What only has no answer took effect earlier,
        # or this could not have: the other end refuses all that follows what it cannot tell.
        for earlier in [each for each in again if each.refusal is not None]:
            assert earlier.refusal is not None
            again.remove(earlier)
            self._done(earlier)
            earlier.give_up(earlier.refusal)
        self._progressed = True
        self._done(item)
        if answer is None:
            for future in item.futures:
                future.set_result(ack)
            return
        unknown = isinstance(answer, OutcomeUnknownError) and not isinstance(answer, SessionExpiredError)
        if unknown and item.stamp is not None and self._open_session is None:
            with self._state:
                self._writer = None
                self._die()
        item.fail(answer)

    def _may_repeat(self, item: Item, answer: MarbleError | None) -> bool:
        """Whether `item` may be sent again after `answer`; notes what is known of it now."""
        if isinstance(answer, NotLeaderError | UnavailableError):
            item.refusal = answer
            return True
        if self._open_session is None or not isinstance(answer, OutcomeUnknownError):
            return False
        if not isinstance(answer, SessionExpiredError):
            item.refusal, item.open = None, True
            return True
        with self._state:
            # No more goes out under that session, and without one nothing does.
            self._writer = None
            if item.stamp is not None and item.stamp.session == self._session:
                self._session = 0
        if item.open:
            return False
        # No attempt under this number was carried out, so it may have another.
        item.stamp, item.refusal = None, UnavailableError(f"nothing was written: {answer}")
        return True

    def _settle(self, again: list[Item], why: BaseException | None) -> None:
        """The stream has ended: decide about everything that it still owed."""
        reason = from_flight_error(why) if isinstance(why, STREAM_ERRORS) else why
        lost = UnavailableError(str(reason or "the server ended the stream"))
        with self._state:
            self._writer = self._reader = None
            unknown = list(self._sent)
            self._sent.clear()
            for item in unknown:
                item.refusal, item.open = None, True
            if unknown and any(item.stamp is not None for item in unknown) and self._open_session is None:
                self._die()
            kept = self._kept(again, unknown)
            self._backlog.extendleft(reversed(kept))
            dead, refused = self._dead, list(self._backlog) if self._dead is not None else []
            if dead is not None:
                self._backlog.clear()
        stays = set(kept)
        for item in [*again, *unknown]:
            if item not in stays:
                self._done(item)
                item.give_up(item.refusal or lost)
        for item in refused:
            assert dead is not None
            self._done(item)
            item.give_up(dead)

    def _kept(self, again: list[Item], unknown: list[Item]) -> list[Item]:
        """What goes out once more, in order. Called under ``_state``."""
        if self._dead is not None or (self._open_session is None and (unknown or self._closing)) or self._aborted:
            return []
        now = time.monotonic()
        return [item for item in (*again, *unknown) if item.deadline > now]

    def _die(self) -> None:
        """Take no more: what followed would overtake a write that may be sent again elsewhere. Called under ``_state``."""
        self._dead = UnavailableError(
            "the outcome of an earlier write of this stream is not known: nothing was written"
        )

    def _fail_backlog(self, error: MarbleError) -> None:
        with self._state:
            waiting = list(self._backlog)
            self._backlog.clear()
        for item in waiting:
            self._done(item)
            item.give_up(error)

    def _done(self, item: Item) -> None:
        with self._state:
            self._leave(item)

    def _leave(self, item: Item) -> None:
        """`item` is on its way no more. Called under ``_state``."""
        self._count -= len(item.futures)
        self._bytes -= item.size
        check(self._count >= 0, "more writes ended than began")
        self._state.notify_all()
