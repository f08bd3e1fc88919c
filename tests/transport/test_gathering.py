"""Small writes that are gathered while a stream owes answers."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

import pyarrow as pa
import pyarrow.flight as fl
import pytest

from marble.errors import MarbleError, OutcomeUnknownError, UnavailableError, UsageError
from marble.transport import gathering, patience
from marble.transport.gathering import Item, gather
from marble.transport.patience import GATHER_AFTER
from marble.transport.put import PutStream
from marble.transport.wire import Ack, Stamp, decode_stamp, encode_ack

SCHEMA = pa.schema([("k", pa.int64())])
DEADLINE_S = 30.0
BYTES_MAX = 1 << 20


def batch(*keys: int) -> pa.RecordBatch:
    return pa.record_batch({"k": list(keys)}, schema=SCHEMA)


def item(*keys: int, stamp: Stamp | None = None, size: int | None = None, deadline: float = 0.0) -> Item:
    rows = batch(*keys)
    return Item(rows, rows.nbytes if size is None else size, (Future(),), deadline, stamp)


def taken(waiting: deque[Item], bytes_max: int = BYTES_MAX) -> list[list[int]]:
    """The keys of the batches into which all of `waiting` goes."""
    batches = []
    while waiting:
        batches.append(gather(waiting, bytes_max).batch.column("k").to_pylist())
    return batches


def test_what_waits_becomes_one_batch_in_its_order() -> None:
    items = [item(3, deadline=5.0), item(1, 2, deadline=4.0), item(3, deadline=6.0)]
    waiting = deque(items)
    one = gather(waiting, BYTES_MAX)
    assert not waiting
    assert one.batch.column("k").to_pylist() == [3, 1, 2, 3]
    assert one.futures == tuple(future for each in items for future in each.futures)
    assert (one.deadline, one.size, one.stamp) == (4.0, sum(each.size for each in items), None)


def test_what_was_sent_before_stays_as_it_was() -> None:
    refused = item(4)
    refused.refusal = UnavailableError("full")
    waiting = deque([item(1, stamp=Stamp(7, 1)), item(2, stamp=Stamp(7, 2)), item(3), refused, item(5), item(6)])
    assert taken(waiting) == [[1], [2], [3], [4], [5, 6]]


def test_large_batches_travel_alone() -> None:
    large = gathering.GATHER_BATCH_BYTES_MAX + 1
    assert taken(deque([item(1), item(2, size=large), item(3), item(4)])) == [[1], [2], [3, 4]]


def test_a_gathered_batch_is_bounded() -> None:
    half = gathering.GATHER_BATCH_BYTES_MAX
    count = 3 * gathering.GATHERED_BYTES_MAX // half
    assert [len(keys) for keys in taken(deque(item(key, size=half) for key in range(count)), 1 << 30)] == [16, 16, 16]


def test_nothing_is_gathered_that_would_be_too_large_for_an_entry() -> None:
    # Of a row of eight bytes the message takes much more, and so does the entry.
    assert taken(deque(item(key) for key in range(4)), 64) == [[0], [1], [2], [3]]
    assert taken(deque(item(key) for key in range(3)), 0) == [[0], [1], [2]]


class Server(fl.FlightServerBase):
    """Hands the test what arrives, and answers what the test says. An answer of None ends the stream with an error."""

    def __init__(self) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self.got: queue.Queue[tuple[int, list[int]]] = queue.Queue()
        self.answers: queue.Queue[Ack | None] = queue.Queue()
        self.reading = threading.Event()
        self.reading.set()

    def do_exchange(self, context, descriptor, reader, writer):
        assert self.reading.wait(DEADLINE_S)
        for chunk in reader:
            stamp = decode_stamp(chunk.app_metadata)
            self.got.put((stamp.sequence, chunk.data.column("k").to_pylist()))
            answer = self.answers.get(timeout=DEADLINE_S)
            if answer is None:
                raise fl.FlightServerError("gone")
            writer.write_metadata(encode_ack(answer))

    def take(self) -> tuple[int, list[int]]:
        return self.got.get(timeout=DEADLINE_S)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[fl.FlightClient]:
    with fl.connect(f"grpc://127.0.0.1:{server.port}") as client:
        yield client


@pytest.fixture
def stream(server: Server, client: fl.FlightClient) -> Iterator[PutStream]:
    made = make(client)
    yield made
    made.close(DEADLINE_S)


def make(client: fl.FlightClient, timeout_s: float = DEADLINE_S) -> PutStream:
    return PutStream(
        ("t", "upsert"),
        SCHEMA,
        lambda deadline, failed: client,
        timeout_s,
        open_session=lambda client, deadline: 100,
        gather_bytes_max=lambda: BYTES_MAX,
    )


def open_up(server: Server, stream: PutStream) -> None:
    """Open the stream with a first write, of key -1."""
    server.answers.put(Ack(1, 1, 1))
    stream.write(batch(-1)).result(DEADLINE_S)
    assert server.take() == (1, [-1])


def owed(server: Server, stream: PutStream, count: int) -> list[Future[Ack]]:
    """Write keys 0, 1, … one by one, of which the server has taken the first and answered none."""
    open_up(server, stream)
    futures = [stream.write(batch(key)) for key in range(count)]
    assert server.take() == (2, [0])
    return futures


def test_what_is_written_while_answers_are_owed_shares_one_batch_and_its_answer(
    server: Server, stream: PutStream
) -> None:
    futures = owed(server, stream, 10)
    for index in range(2, 2 + GATHER_AFTER + 1):
        server.answers.put(Ack(index, 1, 1))
    assert [future.result(DEADLINE_S).index for future in futures] == [2, 3, 4, 5, 5, 5, 5, 5, 5, 5]
    assert [server.take() for _ in range(3)] == [(3, [1]), (4, [2]), (5, [3, 4, 5, 6, 7, 8, 9])]


def test_a_gathered_batch_whose_answer_was_lost_is_sent_again_as_it_was(server: Server, stream: PutStream) -> None:
    futures = owed(server, stream, 6)
    for index in (2, 3, 4):
        server.answers.put(Ack(index, 1, 1))
    server.answers.put(None)
    assert [server.take() for _ in range(3)] == [(3, [1]), (4, [2]), (5, [3, 4, 5])]
    server.answers.put(Ack(5, 1, 3))
    assert server.take() == (5, [3, 4, 5])
    assert [future.result(DEADLINE_S).index for future in futures] == [2, 3, 4, 5, 5, 5]


def test_a_refused_write_goes_out_again_before_what_was_gathered(server: Server, stream: PutStream) -> None:
    futures = owed(server, stream, 6)
    for _ in range(GATHER_AFTER):
        server.answers.put(Ack.of_error(UnavailableError("full")))
    for index in range(2, 6):
        server.answers.put(Ack(index, 2, 1))
    assert [future.result(DEADLINE_S).index for future in futures] == [2, 3, 4, 5, 5, 5]
    assert [server.take() for _ in range(6)] == [(3, [1]), (4, [2]), (2, [0]), (3, [1]), (4, [2]), (5, [3, 4, 5])]


def test_an_error_is_that_of_every_write_in_the_batch(server: Server, stream: PutStream) -> None:
    futures = owed(server, stream, 6)
    for index in (2, 3, 4):
        server.answers.put(Ack(index, 1, 1))
    server.answers.put(Ack.of_error(UsageError("no such table")))
    for future in futures[GATHER_AFTER:]:
        with pytest.raises(UsageError, match="no such table"):
            future.result(DEADLINE_S)
    assert futures[2].result(DEADLINE_S).index == 4


def test_close_sends_what_was_gathered_and_waits_for_its_answer(server: Server, client: fl.FlightClient) -> None:
    stream = make(client)
    futures = owed(server, stream, 8)
    closing = threading.Thread(target=stream.close, args=(DEADLINE_S,))
    closing.start()
    for index in range(2, 6):
        server.answers.put(Ack(index, 1, 1))
    assert [future.result(DEADLINE_S).index for future in futures] == [2, 3, 4, 5, 5, 5, 5, 5]
    closing.join(DEADLINE_S)
    assert not closing.is_alive()
    names = {thread.name for thread in threading.enumerate()}
    assert names.isdisjoint({"marble-gather-t/upsert", "marble-put-t/upsert"})


def test_when_its_time_is_up_the_outcome_is_unknown_for_what_was_sent_only(
    server: Server, client: fl.FlightClient
) -> None:
    stream = make(client)
    futures = owed(server, stream, 6)
    stream.abort()
    ends: list[MarbleError | None] = [future.exception(DEADLINE_S) for future in futures]
    assert [type(end) for end in ends] == [OutcomeUnknownError] * GATHER_AFTER + [UnavailableError] * 3
    server.answers.put(None)
    stream.close(DEADLINE_S)


def test_closing_does_not_wait_for_a_server_that_does_not_read(
    server: Server, client: fl.FlightClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "GATHER_AFTER", 10**6)
    server.reading.clear()
    stream = make(client)
    rows = pa.record_batch({"k": list(range(1 << 17))}, schema=SCHEMA)
    futures: list[Future[Ack]] = []
    failures: list[BaseException] = []
    under_way = threading.Event()

    def write() -> None:
        try:
            while True:
                futures.append(stream.write(rows))
                under_way.set()
        except MarbleError as error:
            failures.append(error)

    writing = threading.Thread(target=write)
    writing.start()
    assert under_way.wait(DEADLINE_S)
    stream.close(0.5)
    writing.join(DEADLINE_S)
    assert not writing.is_alive()
    assert all(isinstance(future.exception(DEADLINE_S), OutcomeUnknownError | UnavailableError) for future in futures)
    assert isinstance(failures[0], UsageError | UnavailableError)
    server.answers.put(None)
    server.reading.set()
