"""A carrier for nodes that live in one process: tests with many of them, and databases that embed several.

Nothing leaves the process: a chunk is handed over by reference. What a node checks of it is the same as over the wire, its
checksums included, so what these nodes show holds there too.

Rule 1: it keeps the promises of `marble.transport.carrier`, those about breaks and bounded buffers as well.
Rule 2: each stream has a thread ("marble-inprocess-…") in which its other end runs, as gRPC has. It ends with the stream.

::

    network = InProcessNetwork()
    one = InProcessTransport(network, "c", 1)
    two = InProcessTransport(network, "c", 2)
    one.set_peers({2: two.endpoint})

Thread-safe.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

import pyarrow as pa
import pyarrow.flight as fl

from marble.transport.carrier import Arrival
from marble.transport.faults import to_flight_error
from marble.transport.flight import FlightTransport

BUFFER_BYTES: Final = 4 << 20
"""What one stream holds that was written and not read; a single larger chunk still passes. gRPC's windows are about so large."""

ANSWERS_MAX: Final = 1024
"""Answers that nobody has read: more, and who answers waits."""

Take = Callable[[Arrival], None]


class _Stream:
    """Both ends of a stream: a `marble.transport.carrier.Stream` and, as `arrival`, what the other end sees."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._chunks: deque[tuple[pa.Buffer, pa.RecordBatch | None, int]] = deque()
        self._bytes = 0
        self._answers: deque[bytes] = deque()
        self._finishing = False
        self._cancelled = False
        self._ended = False
        self._error: fl.FlightError | None = None

    def write(self, metadata: bytes, batch: pa.RecordBatch | None) -> None:
        size = len(metadata) + (0 if batch is None else batch.nbytes)
        with self._changed:
            self._changed.wait_for(lambda: self._broken or not self._bytes or self._bytes + size <= BUFFER_BYTES)
            self._check()
            self._chunks.append((pa.py_buffer(metadata), batch, size))
            self._bytes += size
            self._changed.notify_all()

    def answer(self) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: self._broken or self._answers)
            if self._answers and not self._cancelled:
                self._changed.notify_all()
                return self._answers.popleft()
            if self._cancelled or self._error is not None:
                self._check()
            return None

    def finish(self) -> None:
        with self._changed:
            self._finishing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._broken)
            if self._cancelled or self._error is not None:
                self._check()

    def cancel(self) -> None:
        with self._changed:
            self._cancelled = True
            self._chunks.clear()
            self._bytes = 0
            self._changed.notify_all()

    def close(self) -> None:
        self.cancel()

    @property
    def _broken(self) -> bool:
        return self._cancelled or self._ended

    def _check(self) -> None:
        if self._cancelled:
            raise fl.FlightCancelledError("the stream was cancelled")
        if self._error is not None:
            raise self._error
        if self._ended:
            raise fl.FlightUnavailableError("the peer ended the stream")

    def serve(self, take: Take) -> None:
        """Be the other end, until `take` returns."""
        error = None
        try:
            take(_Arrival(self))
        except BaseException as raised:
            error = to_flight_error(raised)
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def read(self) -> tuple[pa.Buffer, pa.RecordBatch | None] | None:
        """The next chunk, for the other end; None when there are no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or self._chunks or self._finishing)
            if self._cancelled:
                raise fl.FlightCancelledError("the peer cancelled the stream")
            if not self._chunks:
                return None
            metadata, batch, size = self._chunks.popleft()
            self._bytes -= size
            self._changed.notify_all()
            return metadata, batch

    def reply(self, metadata: bytes) -> bool:
        """An answer of the other end; whether somebody may read it."""
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or len(self._answers) < ANSWERS_MAX)
            if self._cancelled:
                return False
            self._answers.append(metadata)
            self._changed.notify_all()
            return True


class _Arrival:
    """A `marble.transport.carrier.Arrival`."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[tuple[pa.Buffer | None, pa.RecordBatch | None]]:
        while (chunk := self._stream.read()) is not None:
            yield chunk

    def answer(self, metadata: bytes) -> bool:
        return self._stream.reply(metadata)


class InProcessNetwork:
    """Who is where in this process: a `marble.transport.carrier.Carrier` to all of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._takers: dict[str, Take] = {}
        self._streams: dict[str, set[_Stream]] = {}

    def listen(self, address: str, take: Take) -> None:
        """Streams to `address` go to `take`, each on a thread of its own: ``FlightTransport.take_messages``."""
        with self._lock:
            self._takers[address] = take

    def leave(self, address: str) -> None:
        """Nobody is at `address` any more: what is open to there breaks. Idempotent."""
        with self._lock:
            self._takers.pop(address, None)
            streams = self._streams.pop(address, set())
        for stream in streams:
            stream.cancel()

    def open(self, address: str, schema: pa.Schema, *, connect_timeout_s: float, silent_peer_s: float) -> _Stream:
        """See `marble.transport.carrier.Carrier.open`. At once; raises ConnectionRefusedError if nobody is there."""
        stream = _Stream()
        with self._lock:
            take = self._takers.get(address)
            if take is None:
                raise ConnectionRefusedError(f"nobody is at {address} in this process")
            self._streams.setdefault(address, set()).add(stream)
        threading.Thread(
            target=self._serve, args=(address, take, stream), name=f"marble-inprocess-{address}", daemon=True
        ).start()
        return stream

    def _serve(self, address: str, take: Take, stream: _Stream) -> None:
        stream.serve(take)
        with self._lock:
            self._streams.get(address, set()).discard(stream)


class InProcessTransport(FlightTransport):
    """A transport whose peers are in this process. It has a port all the same, for clients, and is named by it.

    Parameters
    ----------
    network
        Where the peers are.
    cluster_id, node_id, options
        As for `FlightTransport`; which other arguments it takes are `options` of that.
    """

    def __init__(self, network: InProcessNetwork, cluster_id: str, node_id: int, **arguments: Any) -> None:
        super().__init__("127.0.0.1:0", cluster_id, node_id, carrier=network, **arguments)
        self._network = network
        network.listen(self.endpoint, self.take_messages)

    def stop(self, deadline_s: float = 5.0, grace_s: float | None = None) -> bool:
        """As `FlightTransport.stop`; streams of peers break."""
        self._network.leave(self.endpoint)
        return super().stop(deadline_s, grace_s)
