"""A client's watch: it holds streams to their deadlines, and finds out whether those who owe an answer are there at all.

Rule 1: a node that is slow is waited for; one that does not even say that it is there is not. A process that was stopped, or hangs, takes
what it is sent and answers nothing, which no deadline of a call that may take its time notices soon.

One thread ("marble-client-watch"), from `start` until `closed` is set.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow.flight as fl

from marble.contacts import PROBE_TIMEOUT_S, Contacts
from marble.errors import MarbleError, UnavailableError
from marble.orders import RETRY_WAIT_MIN_S, act
from marble.transport.faults import is_refusal
from marble.transport.patience import PROBE_AFTER_S
from marble.transport.pool import ClientPool
from marble.transport.put import PutStream

REFRESH_S: Final = 10.0
"""How often a client with streams open asks which nodes there are. Those that it knows may all be removed in time."""

WAIT_MAX_S: Final = 1.0
"""How late the deadline of a stream may be noticed; somebody who does not answer may add `PROBE_TIMEOUT_S`."""


@dataclass(frozen=True, slots=True)
class _Wait:
    """Somebody reads from ``endpoint`` (None: it is not to be asked whether it is there) since then, and until then at the latest."""

    deadline: float
    endpoint: str | None
    since: float


class Vigil:
    """Thread-safe, except that `start` is called under a lock of the caller's.

    Parameters
    ----------
    contacts, clients
        The nodes, and the connections to them.
    closed
        Ends the thread.
    puts
        Gives the streams of writes that are open.
    refresh
        Called every `REFRESH_S`: asks which nodes there are.
    """

    def __init__(
        self,
        contacts: Contacts,
        clients: ClientPool,
        closed: threading.Event,
        puts: Callable[[], Sequence[PutStream]],
        refresh: Callable[[], None],
    ) -> None:
        self._contacts = contacts
        self._clients = clients
        self._closed = closed
        self._puts = puts
        self._refresh = refresh
        self._lock = threading.Lock()
        self._waits: dict[fl.FlightStreamReader, _Wait] = {}
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, unless it has begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="marble-client-watch", daemon=True)
            self._thread.start()

    def join(self) -> None:
        """Wait for the end, once `closed` is set."""
        if self._thread is not None:
            # A Ctrl-C may have come while it was being started; then there is nothing to wait for.
            with contextlib.suppress(RuntimeError):
                self._thread.join()

    @contextlib.contextmanager
    def watched(self, reader: fl.FlightStreamReader, timeout_s: float, endpoint: str | None = None) -> Iterator[None]:
        """Cancel `reader` if what happens in here takes longer than `timeout_s`; also if `endpoint` meanwhile does not say that it
        is there.
        """
        now = time.monotonic()
        with self._lock:
            self._waits[reader] = _Wait(now + timeout_s, endpoint, now)
        try:
            yield
        finally:
            with self._lock:
                del self._waits[reader]

    def ping(self, endpoint: str, timeout_s: float) -> None:
        """Raise UnavailableError unless the node says that it is there."""
        try:
            act(self._clients.get(endpoint), "ping", b"", timeout_s, peer=endpoint)
        except UnavailableError as error:
            # A node that stops says so itself.
            if not is_refusal(error):
                self.lose(endpoint)
            raise
        self._contacts.answered(endpoint)

    def lose(self, endpoint: str) -> None:
        """A node did not answer: the connection may be at fault."""
        self._contacts.fell_silent(endpoint)
        self._clients.renew(endpoint)

    def _run(self) -> None:
        wait_s = min(REFRESH_S, WAIT_MAX_S)
        refresh = time.monotonic() + REFRESH_S
        while not self._closed.wait(wait_s):
            now = time.monotonic()
            if now >= refresh:
                self._refresh()
                refresh = now = time.monotonic()
                refresh += REFRESH_S
            with self._lock:
                waits = dict(self._waits)
            for reader, wait in waits.items():
                if wait.deadline <= now or (wait.endpoint is not None and self._is_gone(wait.endpoint, wait.since)):
                    reader.cancel()
            puts = self._puts()
            for put in puts:
                if (client := put.suspect(now)) is not None and not self._is_there(client):
                    put.give_up_silent(now)
            due = min((put.expire(now) for put in puts), default=now + WAIT_MAX_S)
            wait_s = min(max(RETRY_WAIT_MIN_S, min(due, refresh) - now), WAIT_MAX_S)

    def _is_gone(self, endpoint: str, since: float) -> bool:
        """Whether the node that was asked something at `since` does not even say that it is there."""
        if time.monotonic() - since < PROBE_AFTER_S or self._contacts.is_fresh(endpoint):
            return False
        try:
            self.ping(endpoint, PROBE_TIMEOUT_S)
        except UnavailableError:
            return True
        except MarbleError:
            # It is there, and has something against this client, which the call itself will be told.
            return False
        return False

    def _is_there(self, client: fl.FlightClient) -> bool:
        """Whether the node at the other end answers, on the connection that it is asked about."""
        try:
            act(client, "ping", b"", PROBE_TIMEOUT_S)
        except UnavailableError:
            endpoint = self._clients.forget(client)
            if endpoint is not None:
                self._contacts.fell_silent(endpoint)
            return False
        except MarbleError:
            return True
        return True
