"""A follower's way to the leader: calls and streams of writes that clients gave to the wrong node.

Rule 1: what is relayed says so (`marble.transport.wire.FORWARD_HEADER`), and is never relayed again: there is one hop,
and a leader that has just lost its post answers NotLeaderError.
Rule 2: what is relayed has the rights of the client that gave it, never the node's own: its token goes along, and the leader
judges it again.
Rule 3: a relay repeats only what was certainly not done. Stamps of clients pass through; repeating under them is the client's.

Thread-safe. One thread ("marble-relay-watch", while there are streams) holds the streams to their deadlines.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import pyarrow as pa
import pyarrow.flight as flight

from marble.errors import NotLeaderError, ProtocolError, UnavailableError
from marble.transport.faults import from_flight_error
from marble.transport.pool import ClientPool
from marble.transport.put import PutStream
from marble.transport.security import PLAIN, Credentials
from marble.transport.wire import Stamp, call_options

RETRY_WAIT_S: Final = 0.02
"""Between two tries to reach a leader: an election takes longer, a node's news of it hardly does."""

STUCK_S: Final = 0.75
"""A stream that has had no answer for so long waits for TCP, if its way was broken or its client has given up: most likely."""

WATCH_WAIT_S: Final = 0.25
"""How late a stream's deadline may be noticed."""


Authority = Sequence[tuple[bytes, bytes]]
"""Headers of the client on whose behalf a call is relayed."""


class RelayStream(PutStream):
    """A stream of writes to the leader that takes itself off its `Relays` when it ends."""

    def __init__(self, relays: Relays, path: tuple[str, ...], schema: pa.Schema, authority: Authority) -> None:
        options = call_options(None, forward=False, authority=authority)
        super().__init__(path, schema, self._find, relays.timeout_s, options)
        self._relays = relays
        self.endpoint = ""
        """Where it goes, or went last."""

    def _find(self, deadline: float, failed: bool) -> flight.FlightClient:
        self.endpoint, client = self._relays.locate(deadline, failed)
        return client

    def abort(self) -> None:
        if self.give_up_silent(time.monotonic() - STUCK_S):
            # Its client has gone, and will ask again: not on a connection that stands still.
            self._relays.suspect(self.endpoint)
        super().abort()

    def close(self, timeout_s: float) -> None:
        super().close(timeout_s)
        self._relays.forget(self)


class Relays:
    """Clients of the nodes that lead, and the streams that are open to them.

    Parameters
    ----------
    find_leader
        Waits up to the given seconds for a leader; its endpoint, or None.
    timeout_s
        Deadline of a call, and of each batch of a stream.
    credentials
        What this node brings to others.
    """

    def __init__(
        self,
        find_leader: Callable[[float], str | None],
        timeout_s: float,
        credentials: Callable[[], Credentials] = lambda: PLAIN,
    ) -> None:
        self.timeout_s = timeout_s
        self._find_leader = find_leader
        self._lock = threading.Lock()
        self._clients = ClientPool(credentials)
        self._streams: set[RelayStream] = set()
        self._stopping = threading.Event()
        self._watch: threading.Thread | None = None

    def open_stream(self, path: tuple[str, ...], schema: pa.Schema, authority: Authority = ()) -> RelayStream:
        """A stream of batches of `schema` to `path` (table and verb) at the leader, with the rights of `authority`."""
        stream = RelayStream(self, path, schema, authority)
        with self._lock:
            self._check_running()
            self._streams.add(stream)
            if self._watch is None:
                self._watch = threading.Thread(target=self._hold_to_deadlines, name="marble-relay-watch", daemon=True)
                self._watch.start()
        return stream

    def forget(self, stream: RelayStream) -> None:
        """`stream` has ended."""
        with self._lock:
            self._streams.discard(stream)

    def renew(self, endpoint: str) -> None:
        """The way to `endpoint` was broken, and may be whole again: what goes there from now on takes a new connection, and streams that
        wait there for an answer are given up, so that their clients repeat what has none.
        """
        self._clients.renew(endpoint)
        with self._lock:
            streams = [stream for stream in self._streams if stream.endpoint == endpoint]
        for stream in streams:
            stream.give_up_silent(time.monotonic() - STUCK_S)

    def suspect(self, endpoint: str) -> None:
        """The connection to `endpoint` stands still: what goes there from now on takes another one."""
        self._clients.renew(endpoint)

    def locate(self, deadline: float, failed: bool) -> tuple[str, flight.FlightClient]:
        """Where the leader is, and a client of it, waiting for one until `deadline` (``time.monotonic()``).

        Raises
        ------
        UnavailableError
            If there is none in time, or the node stops.
        """
        if failed:
            self._stopping.wait(RETRY_WAIT_S)
        endpoint = self._leader(deadline)
        return endpoint, self._client(endpoint)

    def action(
        self, name: str, body: bytes, *, repeatable: bool, stamp: Stamp | None = None, authority: Authority = ()
    ) -> bytes:
        """Do action `name` at the leader.

        Parameters
        ----------
        repeatable
            Doing it twice is doing it once, so that it may be sent again when the answer is lost.
        stamp
            Of the client's, if it gave one.
        authority
            Headers of the client (`marble.transport.admission.authority`): the leader grants it what it grants them.

        Raises
        ------
        MarbleError
            What the leader answered; UnavailableError if nothing was sent; OutcomeUnknownError if the answer was lost.
        """
        deadline = time.monotonic() + self.timeout_s
        while True:
            endpoint = self._leader(deadline)
            left_s = max(RETRY_WAIT_S, deadline - time.monotonic())
            options = call_options(left_s, forward=False, stamp=stamp, authority=authority)
            try:
                results = list(self._client(endpoint).do_action(flight.Action(name, body), options))
            except pa.ArrowException as error:
                told = from_flight_error(error, changes=not repeatable, peer=f"the leader, {endpoint}")
                if not isinstance(told, NotLeaderError) and not (repeatable and isinstance(told, UnavailableError)):
                    raise told from None
                if time.monotonic() + RETRY_WAIT_S >= deadline or self._stopping.wait(RETRY_WAIT_S):
                    raise told from None
                continue
            if len(results) != 1:
                raise ProtocolError(f"the leader {endpoint} answered {name} {len(results)} times")
            return bytes(results[0].body.to_pybytes())

    def stop(self) -> None:
        """End everything at once: streams break off, waits end in UnavailableError. Idempotent."""
        self._stopping.set()
        with self._lock:
            streams, watch = list(self._streams), self._watch
        for stream in streams:
            stream.abort()
        if watch is not None:
            watch.join()
        self._clients.close()

    def _leader(self, deadline: float) -> str:
        while True:
            self._check_running()
            # In slices, so that a stop does not wait for an election.
            left = deadline - time.monotonic()
            endpoint = self._find_leader(max(0.0, min(left, WATCH_WAIT_S)))
            if endpoint is not None:
                return endpoint
            if left <= 0:
                raise UnavailableError(f"no leader was known within {self.timeout_s} s: nothing was written; retry")

    def _client(self, endpoint: str) -> flight.FlightClient:
        self._check_running()
        return self._clients.get(endpoint)

    def _check_running(self) -> None:
        if self._stopping.is_set():
            raise UnavailableError("the node stops: nothing was written")

    def _hold_to_deadlines(self) -> None:
        while not self._stopping.wait(WATCH_WAIT_S):
            with self._lock:
                streams = list(self._streams)
            now = time.monotonic()
            for stream in streams:
                stream.expire(now)
