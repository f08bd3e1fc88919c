"""A client's stream of writes against a server that we hold in hand."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.flight as fl
import pytest

from marble.errors import NotLeaderError, OutcomeUnknownError, UnavailableError, UsageError
from marble.transport.put import PutStream
from marble.transport.wire import Ack, encode_ack

SCHEMA = pa.schema([("k", pa.int64())])
DEADLINE_S = 20.0


def batch(key: int) -> pa.RecordBatch:
    return pa.record_batch({"k": [key]}, schema=SCHEMA)


class Server(fl.FlightServerBase):
    """Hands what arrives to the test, and answers what the test says. An answer of None ends the stream with an error."""

    def __init__(self) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self.got: queue.Queue[int] = queue.Queue()
        self.answers: queue.Queue[Ack | None] = queue.Queue()
        self.refusing = 0
        """How many streams, from the next on, refuse everything."""
        self.streams = 0

    def do_exchange(self, context, descriptor, reader, writer):
        self.streams += 1
        refusing = self.streams <= self.refusing
        for chunk in reader:
            self.got.put(chunk.data.column("k")[0].as_py())
            answer = Ack.of_error(NotLeaderError("not me", None)) if refusing else self.answers.get(timeout=DEADLINE_S)
            if answer is None:
                raise fl.FlightServerError("gone")
            writer.write_metadata(encode_ack(answer))


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def stream(server: Server) -> Iterator[PutStream]:
    client = fl.connect(f"grpc://127.0.0.1:{server.port}")
    stream = PutStream(("t", "upsert"), SCHEMA, lambda deadline, failed: client, DEADLINE_S)
    yield stream
    stream.close(DEADLINE_S)
    client.close()


def test_writes_are_sent_and_answered_in_order(server: Server, stream: PutStream) -> None:
    futures = [stream.write(batch(key)) for key in range(20)]
    for key in range(20):
        server.answers.put(Ack(index=key + 7, term=3, value=1))
    assert [future.result(DEADLINE_S).index for future in futures] == list(range(7, 27))
    assert [server.got.get() for _ in range(20)] == list(range(20))
    assert server.streams == 1


def test_a_refused_write_is_sent_again_with_those_after_it_in_order(server: Server, stream: PutStream) -> None:
    server.refusing = 2
    for index in (1, 2, 3):
        server.answers.put(Ack(index, 1, 1))
    futures = [stream.write(batch(key)) for key in range(3)]
    assert [future.result(DEADLINE_S).index for future in futures] == [1, 2, 3]
    got = [server.got.get() for _ in range(server.got.qsize())]
    assert got[-3:] == [0, 1, 2]


def test_a_refused_write_does_not_overtake_a_later_one_that_took_effect(server: Server, stream: PutStream) -> None:
    server.answers.put(Ack(1, 1, 1))
    stream.write(batch(9)).result(DEADLINE_S)
    assert server.got.get(timeout=DEADLINE_S) == 9
    # The stream is open, so both are on the wire before the first is answered.
    first, second = stream.write(batch(0)), stream.write(batch(1))
    assert server.got.get(timeout=DEADLINE_S) == 0
    server.answers.put(Ack.of_error(UnavailableError("full")))
    server.answers.put(Ack(5, 1, 1))
    assert second.result(DEADLINE_S).index == 5
    with pytest.raises(UnavailableError, match="full"):
        first.result(DEADLINE_S)
    assert server.streams == 1


def test_an_answer_that_never_comes_is_an_unknown_outcome_and_the_stream_mends_itself(
    server: Server, stream: PutStream
) -> None:
    server.answers.put(None)
    with pytest.raises(OutcomeUnknownError):
        stream.write(batch(1)).result(DEADLINE_S)
    server.answers.put(Ack(9, 1, 1))
    assert stream.write(batch(2)).result(DEADLINE_S).index == 9


def test_a_silent_server_is_given_up_at_the_deadline(server: Server) -> None:
    client = fl.connect(f"grpc://127.0.0.1:{server.port}")
    stream = PutStream(("t", "upsert"), SCHEMA, lambda deadline, failed: client, DEADLINE_S)
    future = stream.write(batch(1))
    assert server.got.get(timeout=DEADLINE_S) == 1
    assert stream.expire(time.monotonic()) > time.monotonic()
    assert not future.done()
    stream.expire(time.monotonic() + 2 * DEADLINE_S)
    with pytest.raises(OutcomeUnknownError):
        future.result(DEADLINE_S)
    server.answers.put(None)
    stream.close(DEADLINE_S)
    client.close()


def test_a_wrong_batch_fails_alone(server: Server, stream: PutStream) -> None:
    server.answers.put(Ack.of_error(UsageError("no such column")))
    server.answers.put(Ack(4, 1, 1))
    bad, good = stream.write(batch(0)), stream.write(batch(1))
    with pytest.raises(UsageError, match="no such column"):
        bad.result(DEADLINE_S)
    assert good.result(DEADLINE_S).index == 4


def test_when_no_node_can_be_found_nothing_was_sent() -> None:
    def locate(deadline: float, failed: bool) -> fl.FlightClient:
        raise UnavailableError("nobody leads")

    stream = PutStream(("t", "upsert"), SCHEMA, locate, DEADLINE_S)
    with pytest.raises(UnavailableError, match="nobody leads"):
        stream.write(batch(0)).result(DEADLINE_S)
    stream.close(DEADLINE_S)


def test_close_ends_the_thread_and_refuses_more(server: Server) -> None:
    client = fl.connect(f"grpc://127.0.0.1:{server.port}")
    stream = PutStream(("t", "upsert"), SCHEMA, lambda deadline, failed: client, DEADLINE_S)
    server.answers.put(Ack(1, 1, 1))
    assert stream.write(batch(0)).result(DEADLINE_S).index == 1
    stream.close(DEADLINE_S)
    assert not [thread for thread in threading.enumerate() if thread.name == "marble-put-t/upsert"]
    with pytest.raises(UsageError):
        stream.write(batch(1))
    client.close()
