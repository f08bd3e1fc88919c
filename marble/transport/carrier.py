"""What carries the chunks of a stream between two nodes: Flight over gRPC, or whatever else keeps these promises.

A chunk is metadata and, with some, a record batch. A stream goes one way, from the node that opened it; the other way come
only the answer to the hello and packets that are given back (``docs/transport.md``). All that a carrier must know of marble is
in this module: a `Carrier` opens a `Stream`, the other end sees it as an `Arrival` and hands that to
``FlightTransport.take_messages``.

Invariants of every carrier:
- Chunks arrive whole, once and in order, or the stream breaks, which is an error for who writes and an error or the end for who
  reads, never a gap.
- `Stream.write` blocks while the other end does not read and what is under way fills the carrier's bounded buffers.
- `Stream.cancel` may be called from any thread, at any time, several times, and ends a `write`, an `answer` or a `finish` that waits.
- What breaks a stream is raised as one of `STREAM_ERRORS`. A refusal that the other end has put into words is the Flight
  error that `marble.transport.faults` made of it, whatever the carrier is.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import pyarrow as pa
import pyarrow.flight as fl

from marble.errors import ProtocolError
from marble.transport.channel import dying
from marble.transport.security import PLAIN, Credentials

RAFT_COMMAND: Final = b"marble.raft/1"
"""The Flight descriptor's command that opens a stream between nodes."""

NO_HELLO: Final = "the stream does not open with a hello"
"""What a ProtocolError says of a first chunk that is none."""

STREAM_ERRORS: Final = (fl.FlightError, pa.ArrowException, OSError)
"""What a carrier raises when a stream breaks or cannot be opened."""

_log = logging.getLogger("marble.transport")


class Stream(Protocol):
    """The end of a stream that opened it and writes on it. One thread writes, another may read; `cancel` is for all."""

    def write(self, metadata: bytes, batch: pa.RecordBatch | None) -> None:
        """Send one chunk; it may not have left when this returns."""
        ...

    def answer(self) -> bytes | None:
        """Wait for the other end's next answer, the first of which is to the hello: the metadata of its chunk.

        None if it closed the stream instead.

        Raises ProtocolError if the chunk is not metadata alone.
        """
        ...

    def finish(self) -> None:
        """Say that no more comes, and wait until the other end has taken all that was written and closed the stream, too.

        Not while another thread is in `answer`.
        """
        ...

    def cancel(self) -> None:
        """End the stream at once, from any thread. What was written and has not been read may be lost."""
        ...

    def close(self) -> None:
        """Cancel, and give everything back. Raises nothing. Idempotent."""
        ...


class Carrier(Protocol):
    """Opens streams. Thread-safe."""

    def open(self, address: str, schema: pa.Schema, *, connect_timeout_s: float, silent_peer_s: float) -> Stream:
        """A stream to the node at `address`, nothing written on it yet.

        Parameters
        ----------
        address
            As the carrier understands it: ``host:port`` for Flight.
        schema
            Of all record batches that will be written.
        connect_timeout_s
            How long this call may take, in seconds: it cannot be cancelled.
        silent_peer_s
            After so long without a sign of the other machine the stream is to break, where the carrier can tell.
        """
        ...


class Arrival(Protocol):
    """The end of a stream that was called. One thread uses it.

    Iterating gives each chunk as (metadata, batch), where what is missing is None, and ends when the caller closed the
    stream; a break raises one of `STREAM_ERRORS`.
    """

    def __iter__(self) -> Iterator[tuple[pa.Buffer | None, pa.RecordBatch | None]]: ...

    def answer(self, metadata: bytes) -> bool:
        """Answer the hello, or give back a packet. False if the caller has gone, who has done nothing wrong."""
        ...


class FlightStream:
    """A `Stream` over a ``DoExchange``, with a connection of its own."""

    def __init__(
        self, client: fl.FlightClient, writer: fl.FlightStreamWriter, reader: fl.FlightStreamReader, schema: pa.Schema
    ) -> None:
        self._client = client
        self._writer = writer
        self._reader = reader
        # Sent with the first chunk: until `open` has returned nobody could cancel a write that waits.
        self._schema: pa.Schema | None = schema

    def write(self, metadata: bytes, batch: pa.RecordBatch | None) -> None:
        if self._schema is not None:
            self._writer.begin(self._schema)
            self._schema = None
        if batch is None:
            self._writer.write_metadata(metadata)
        else:
            self._writer.write_with_metadata(batch, metadata)

    def answer(self) -> bytes | None:
        try:
            chunk = self._reader.read_chunk()
        except StopIteration:
            return None
        if chunk.app_metadata is None or chunk.data is not None:
            raise ProtocolError(NO_HELLO)
        return bytes(chunk.app_metadata.to_pybytes())

    def finish(self) -> None:
        self._writer.done_writing()
        with contextlib.suppress(StopIteration):
            # It answers nothing after its hello: this waits for its end.
            self._reader.read_chunk()

    def cancel(self) -> None:
        self._reader.cancel()

    def close(self) -> None:
        self._reader.cancel()
        try:
            self._writer.close()
        except STREAM_ERRORS as error:
            # A cancelled stream ends with the error that it was cancelled, or that it had broken before.
            _log.debug("closed a stream: %s", error)
        self._client.close()


class FlightCarrier:
    """Arrow Flight over gRPC: each stream is a ``DoExchange`` of `RAFT_COMMAND`.

    Parameters
    ----------
    credentials
        Gives what counts when a stream is opened: certificates, and the proof that a node calls.
    """

    def __init__(self, credentials: Callable[[], Credentials] = lambda: PLAIN) -> None:
        self._credentials = credentials

    def open(self, address: str, schema: pa.Schema, *, connect_timeout_s: float, silent_peer_s: float) -> FlightStream:
        client = self._credentials().client(
            address,
            [
                # Without its own pool a channel shares the connection, and the reconnect pauses, of an earlier one.
                ("grpc.use_local_subchannel_pool", 1),
                # gRPC's name for the time that one attempt to connect may take.
                ("grpc.min_reconnect_backoff_ms", max(1, round(connect_timeout_s * 1000))),
                # A machine that has vanished is noticed.
                *dying(max(1, round(silent_peer_s * 1000))),
            ],
        )
        try:
            writer, reader = client.do_exchange(fl.FlightDescriptor.for_command(RAFT_COMMAND))
        except BaseException:
            client.close()
            raise
        return FlightStream(client, writer, reader, schema)


class FlightArrival:
    """An `Arrival` over a ``DoExchange``, valid until its handler returns."""

    def __init__(self, reader: fl.MetadataRecordBatchReader, writer: fl.MetadataRecordBatchWriter) -> None:
        self._reader = reader
        self._writer = writer

    def __iter__(self) -> Iterator[tuple[pa.Buffer | None, pa.RecordBatch | None]]:
        for chunk in self._reader:
            yield chunk.app_metadata, chunk.data

    def answer(self, metadata: bytes) -> bool:
        try:
            self._writer.write_metadata(metadata)
        except STREAM_ERRORS:
            return False
        return True
