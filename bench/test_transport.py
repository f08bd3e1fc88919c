"""Messages between two transports on loopback, beside a bare Flight exchange of the same bytes.

    pytest bench/test_transport.py --benchmark-enable --benchmark-group-by=group --benchmark-columns=median,ops

Both ends share this process, and so its GIL, in the floor as well: read the ratios.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl
import pytest

from marble._core import entry_batch
from marble._core.entry_batch import ENTRY_SCHEMA, Proposal
from marble.raft.messages import Message, MessageKind
from marble.transport import _shutdown
from marble.transport.codec import Codec, Envelope
from marble.transport.flight import FlightTransport
from marble.types import EntryKind

SIZES = {"heartbeat": 0, "1KiB": 128, "1MiB": 131072}
BURST = 1000


def message(size: str, before: int = 0) -> Envelope:
    """The one of a run of appends that comes after the entry `before`, or a heartbeat."""
    if SIZES[size] == 0:
        return Envelope(0, Message(MessageKind.HEARTBEAT, 1, 2, 1))
    payload = entry_batch.encode_payload(pa.record_batch({"a": np.arange(SIZES[size], dtype=np.int64)}))
    batch = entry_batch.build(0, before + 1, 1, [Proposal(EntryKind.WRITE, 1, payload)])
    span = entry_batch.span(batch)
    return Envelope(0, Message(MessageKind.APPEND_ENTRIES, 1, 2, 1, before, min(before, 1), entries=span), batch)


ANSWER = Envelope(0, Message(MessageKind.HEARTBEAT_RESPONSE, 2, 1, 1))


class Pair:
    """Node 2 answers every message of node 1 with a small one, and every entry of a merged append."""

    def __init__(self) -> None:
        self.answers = threading.Semaphore(0)
        self.one = FlightTransport("127.0.0.1:0", "c", 1)
        self.two = FlightTransport("127.0.0.1:0", "c", 2)
        endpoints = {1: self.one.endpoint, 2: self.two.endpoint}
        for transport in (self.one, self.two):
            transport.set_peers(endpoints)
        self.one.start(self._count)
        self.two.start(self._answer)

    def _count(self, envelopes: list[Envelope]) -> None:
        self.answers.release(len(envelopes))

    def _answer(self, envelopes: list[Envelope]) -> None:
        self.two.send(1, [ANSWER] * sum(max(1, len(each.message.entries or ())) for each in envelopes))

    def round_trip(self, envelope: Envelope) -> None:
        assert self.one.send(2, [envelope])
        assert self.answers.acquire(timeout=30)

    def burst(self, envelopes: list[Envelope]) -> None:
        for envelope in envelopes:
            assert self.one.send(2, [envelope])
        for _ in range(BURST):
            assert self.answers.acquire(timeout=30)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    made.round_trip(message("heartbeat"))
    yield made
    made.one.stop()
    made.two.stop()


class Bare(fl.FlightServerBase):  # type: ignore[misc]
    """Answers every chunk with small metadata."""

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        for _ in reader:
            writer.write_metadata(bytes(96))


@pytest.fixture
def bare() -> Iterator[tuple[fl.FlightStreamWriter, fl.FlightStreamReader]]:
    server = Bare("grpc://127.0.0.1:0")
    client = fl.FlightClient(f"grpc://127.0.0.1:{server.port}")
    writer, reader = client.do_exchange(fl.FlightDescriptor.for_command(b"x"))
    writer.begin(ENTRY_SCHEMA)
    yield writer, reader
    writer.done_writing()
    writer.close()
    client.close()
    _shutdown.shut_down(server, 1.0)


@pytest.mark.parametrize("size", SIZES)
def test_floor_round_trip(benchmark: Any, bare: tuple[Any, Any], size: str) -> None:
    writer, reader = bare
    batch = message(size).batch

    def exchange() -> None:
        if batch is None:
            writer.write_metadata(bytes(96))
        else:
            writer.write_with_metadata(batch, bytes(96))
        reader.read_chunk()

    benchmark.group = f"round trip {size}"
    benchmark(exchange)


@pytest.mark.parametrize("size", SIZES)
def test_round_trip(benchmark: Any, pair: Pair, size: str) -> None:
    benchmark.group = f"round trip {size}"
    benchmark(pair.round_trip, message(size))


@pytest.mark.parametrize("size", ["heartbeat", "1KiB"])
def test_burst(benchmark: Any, pair: Pair, size: str) -> None:
    benchmark.group = f"{BURST} messages {size}"
    run = [message(size, before) for before in range(BURST)]
    benchmark.pedantic(pair.burst, args=(run,), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("size", ["heartbeat", "1KiB"])
def test_floor_burst(benchmark: Any, bare: tuple[Any, Any], size: str) -> None:
    """Unbatched chunks, read by a thread beside the writer."""
    writer, reader = bare
    batch = message(size).batch

    def exchange() -> None:
        def read() -> None:
            for _ in range(BURST):
                reader.read_chunk()

        thread = threading.Thread(target=read)
        thread.start()
        for _ in range(BURST):
            if batch is None:
                writer.write_metadata(bytes(96))
            else:
                writer.write_with_metadata(batch, bytes(96))
        thread.join()

    benchmark.group = f"{BURST} messages {size}"
    benchmark.pedantic(exchange, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", ["encode", "decode"])
def test_codec(benchmark: Any, size: str, step: str) -> None:
    one, two = Codec("c", 1, 1 << 30), Codec("c", 2, 1 << 30)
    envelope = message(size)
    packet = one.encode(2, [envelope])[0]
    benchmark.group = f"codec {size}"
    if step == "encode":
        benchmark(one.encode, 2, [envelope])
    else:
        benchmark(two.decode, 1, packet.metadata, packet.batch)
