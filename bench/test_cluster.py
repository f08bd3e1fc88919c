"""Three durable nodes on loopback: one client, and 64 writes in flight; entries of 1 KiB and of 1 MiB.

Floors, in the same run: a sync of the same bytes on this disk, and a bare Flight exchange of the same bytes and back. A durable write
on three nodes cannot cost less than one of each.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as fl
import pytest

import marble
from marble.database import Database, Table

SCHEMA = pa.schema([pa.field("id", pa.int64()), pa.field("value", pa.binary())])
SIZES = [1024, 1024 * 1024]
IN_FLIGHT = 64


def make_batch(size: int, key: int = 0) -> pa.RecordBatch:
    return pa.record_batch({"id": [key], "value": [os.urandom(size)]}, schema=SCHEMA)


def rounds(size: int) -> int:
    return 300 if size < 65536 else 30


@pytest.fixture(scope="module")
def database(cluster_url: str) -> Iterator[Database]:
    with marble.connect(cluster_url) as database:
        yield database


@pytest.fixture(scope="module")
def table(database: Database) -> Table:
    return database.create_table("bench", SCHEMA, key=["id"], exist_ok=True)


@pytest.mark.parametrize("size", SIZES)
def test_one_client(benchmark: Any, table: Table, size: int) -> None:
    benchmark.group = f"one durable write at a time, {size} bytes"
    batch = make_batch(size)
    benchmark.pedantic(table.write, args=(batch,), rounds=rounds(size), warmup_rounds=5)


@pytest.mark.parametrize("size", SIZES)
def test_64_in_flight(benchmark: Any, table: Table, size: int) -> None:
    benchmark.group = f"{rounds(size)} durable writes, {IN_FLIGHT} in flight, {size} bytes"
    batches = [make_batch(size, key) for key in range(rounds(size))]

    def write() -> None:
        flying: deque[Any] = deque()
        for batch in batches:
            if len(flying) >= IN_FLIGHT:
                flying.popleft().result()
            flying.append(table.write_async(batch))
        while flying:
            flying.popleft().result()

    benchmark.extra_info["writes_a_round"] = len(batches)
    benchmark.pedantic(write, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("size", SIZES)
def test_floor_sync(benchmark: Any, disk: Path, size: int) -> None:
    benchmark.group = f"one durable write at a time, {size} bytes"
    data = os.urandom(size)
    descriptor = os.open(disk / f"floor-{size}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write() -> None:
        os.write(descriptor, data)
        os.fdatasync(descriptor)

    benchmark.pedantic(write, rounds=rounds(size), warmup_rounds=5)
    os.close(descriptor)


@pytest.mark.parametrize("size", SIZES)
def test_floor_sync_of_all(benchmark: Any, disk: Path, size: int) -> None:
    """What 64 in flight would cost if one disk took the bytes of all three replicas with a sync for each 64 writes."""
    benchmark.group = f"{rounds(size)} durable writes, {IN_FLIGHT} in flight, {size} bytes"
    data = os.urandom(size * IN_FLIGHT)
    descriptor = os.open(disk / f"floor-all-{size}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write() -> None:
        for _ in range(3 * -(-rounds(size) // IN_FLIGHT)):
            os.write(descriptor, data)
            os.fdatasync(descriptor)

    benchmark.pedantic(write, rounds=5, warmup_rounds=1)
    os.close(descriptor)


class Echo(fl.FlightServerBase):  # type: ignore[misc]
    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        for _ in reader:
            writer.write_metadata(b"ack")


@pytest.mark.parametrize("size", SIZES)
def test_floor_flight(benchmark: Any, size: int) -> None:
    benchmark.group = f"one durable write at a time, {size} bytes"
    batch = make_batch(size)
    with Echo("grpc://127.0.0.1:0") as server:
        client = fl.connect(f"grpc://127.0.0.1:{server.port}")
        writer, reader = client.do_exchange(fl.FlightDescriptor.for_path("echo"))
        writer.begin(SCHEMA)

        def exchange() -> None:
            writer.write_batch(batch)
            reader.read_chunk()

        benchmark.pedantic(exchange, rounds=rounds(size), warmup_rounds=5)
        writer.done_writing()
        writer.close()
        client.close()
