"""Streams over each carrier, and over a Unix socket, which Flight offers beside TCP; and over a long line.

    pytest bench/test_carriers.py --benchmark-enable --benchmark-group-by=group --benchmark-columns=median,ops

Both ends share this process, and so its GIL: read the ratios within a group.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl
import pytest

from marble._core import entry_batch
from marble._core.entry_batch import ENTRY_SCHEMA, Proposal
from marble.testing.relay import Line, RelayProcess
from marble.transport.carrier import RAFT_COMMAND, Arrival, FlightArrival, FlightCarrier, FlightStream, Stream
from marble.transport.flight import FlightTransport
from marble.transport.inprocess import InProcessNetwork
from marble.types import EntryKind

CARRIERS = ("tcp", "unix", "in process")
BURST = 64
ROUND_TRIPS = 100
LINE = Line(delay_s=0.05, bytes_per_s=40e6)


def echo(arrival: Arrival) -> None:
    for metadata, batch in arrival:
        if batch is None and metadata is not None:
            arrival.answer(metadata.to_pybytes())


class Echo(fl.FlightServerBase):
    """A node's end of streams over Flight, without the node."""

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        echo(FlightArrival(reader, writer))


@pytest.fixture(params=CARRIERS)
def stream(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stream]:
    if request.param == "in process":
        network = InProcessNetwork()
        network.listen("there", echo)
        opened: Stream = network.open("there", ENTRY_SCHEMA, connect_timeout_s=5.0, silent_peer_s=5.0)
        yield opened
        opened.finish()
        return
    location = "grpc://127.0.0.1:0" if request.param == "tcp" else f"grpc+unix://{tmp_path}/s"
    with Echo(location) as server:
        if request.param == "tcp":
            opened = FlightCarrier().open(
                f"127.0.0.1:{server.port}", ENTRY_SCHEMA, connect_timeout_s=5.0, silent_peer_s=5.0
            )
        else:
            client = fl.FlightClient(location)
            writer, reader = client.do_exchange(fl.FlightDescriptor.for_command(RAFT_COMMAND))
            opened = FlightStream(client, writer, reader, ENTRY_SCHEMA)
        yield opened
        opened.finish()
        opened.close()


@pytest.mark.benchmark(group="100 answers, one after the other")
def test_round_trips(benchmark: Any, stream: Stream) -> None:
    metadata = bytes(96)

    def ask() -> None:
        for _ in range(ROUND_TRIPS):
            stream.write(metadata, None)
            assert stream.answer() == metadata

    benchmark(ask)


@pytest.mark.benchmark(group="64 MiB in chunks of 1 MiB")
def test_bulk(benchmark: Any, stream: Stream) -> None:
    payload = entry_batch.encode_payload(pa.record_batch({"a": np.arange(131072, dtype=np.int64)}))
    batch = entry_batch.build(0, 1, 1, [Proposal(EntryKind.WRITE, 1, payload)])

    def send() -> None:
        for _ in range(BURST):
            stream.write(b"x", batch)
        stream.write(b"end", None)
        assert stream.answer() == b"end"

    benchmark(send)


@pytest.fixture
def far() -> Iterator[Callable[[int], None]]:
    """Sends so many messages of 1 MiB over a line of 100 ms and 40 MB/s, and waits until they have come."""
    two = FlightTransport("127.0.0.1:0", "c", 2)
    one = FlightTransport("127.0.0.1:0", "c", 1)
    with RelayProcess(two.endpoint, there=LINE, back=LINE) as relay:
        two.set_peers({1: one.endpoint})
        two.start()
        one.set_peers({2: relay.endpoint})
        one.start()
        message = np.random.default_rng(1).bytes(1 << 20)

        def send(count: int) -> None:
            sender = threading.Thread(
                target=lambda: [one.send_message(2, message, timeout_s=30.0) for _ in range(count)]
            )
            sender.start()
            for _ in range(count):
                assert two.receive_message(30.0) is not None
            sender.join()

        yield send
        one.stop()
        two.stop()


@pytest.mark.benchmark(group="64 MiB over 100 ms and 40 MB/s: at best 1.68 s")
def test_long_line(benchmark: Any, far: Callable[[int], None]) -> None:
    benchmark.pedantic(far, args=(BURST,), rounds=3, warmup_rounds=1)
