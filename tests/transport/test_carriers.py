"""What every carrier must promise, asked of each: Flight, and the one within a process."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.flight as fl
import pytest

from marble._core import entry_batch
from marble._core.entry_batch import ENTRY_SCHEMA, Proposal
from marble.errors import ProtocolError
from marble.raft.messages import Message, MessageKind
from marble.transport.carrier import STREAM_ERRORS, Arrival, Carrier, FlightArrival, FlightCarrier, Stream
from marble.transport.codec import Envelope
from marble.transport.faults import from_flight_error, to_flight_error
from marble.transport.flight import FlightTransport
from marble.transport.inprocess import BUFFER_BYTES, InProcessNetwork, InProcessTransport
from marble.transport.options import TransportOptions
from marble.types import EntryKind

DEADLINE_S = 30.0
Take = Callable[[Arrival], None]


class Place:
    """Somewhere to open streams to, over some carrier; `take` is what happens there."""

    def __init__(self, carrier: Carrier, address: str, set_take: Callable[[Take], None]) -> None:
        self.carrier = carrier
        self.address = address
        self.set_take = set_take

    def open(self) -> Stream:
        return self.carrier.open(self.address, ENTRY_SCHEMA, connect_timeout_s=5.0, silent_peer_s=5.0)


class FlightPlace(fl.FlightServerBase):
    """Flight's server, which hands streams on as a node does."""

    take: Take

    def do_exchange(self, context: object, descriptor: object, reader: object, writer: object) -> None:
        try:
            self.take(FlightArrival(reader, writer))
        except fl.FlightError:
            raise
        except Exception as error:
            raise to_flight_error(error) from None


@pytest.fixture(params=["flight", "in process"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == "flight":
        with FlightPlace("grpc://127.0.0.1:0") as server:
            yield Place(FlightCarrier(), f"127.0.0.1:{server.port}", lambda take: setattr(server, "take", take))
        return
    network = InProcessNetwork()
    yield Place(network, "here", lambda take: network.listen("here", take))
    network.leave("here")


def rows(bytes_: int) -> pa.RecordBatch:
    return entry_batch.build(0, 1, 1, [Proposal(EntryKind.WRITE, 1, pa.py_buffer(bytes(bytes_)), 0, 0)])


def write_many(stream: Stream) -> None:
    for _ in range(1000):
        stream.write(b"more", None)


def test_chunks_arrive_whole_in_order_and_answers_come_back(place: Place) -> None:
    seen: queue.SimpleQueue[tuple[bytes, int]] = queue.SimpleQueue()

    def take(arrival: Arrival) -> None:
        for metadata, batch in arrival:
            assert metadata is not None
            seen.put((metadata.to_pybytes(), -1 if batch is None else batch.num_rows))
            if batch is None:
                assert arrival.answer(b"re " + metadata.to_pybytes())

    place.set_take(take)
    stream = place.open()
    for number in range(50):
        stream.write(b"%d" % number, rows(64) if number % 3 else None)
        if not number % 3:
            assert stream.answer() == b"re %d" % number
    stream.finish()
    assert [seen.get(timeout=DEADLINE_S) for _ in range(50)] == [(b"%d" % n, 1 if n % 3 else -1) for n in range(50)]
    stream.close()
    stream.close()


def test_refusal_that_was_put_into_words_arrives_in_them(place: Place) -> None:
    def take(arrival: Arrival) -> None:
        next(iter(arrival))
        raise ProtocolError("you are not who you say")

    place.set_take(take)
    stream = place.open()
    stream.write(b"hello", None)
    with pytest.raises(fl.FlightError) as caught:
        stream.answer()
    told = from_flight_error(caught.value)
    assert isinstance(told, ProtocolError)
    assert "not who you say" in str(told)
    with pytest.raises(STREAM_ERRORS):
        write_many(stream)
    stream.close()


def test_end_without_an_answer_is_none(place: Place) -> None:
    place.set_take(lambda arrival: None)
    stream = place.open()
    with contextlib.suppress(*STREAM_ERRORS):
        stream.write(b"hello", None)
    assert stream.answer() is None
    stream.close()


def test_writer_waits_for_a_reader_that_does_not_and_cancelling_ends_it(place: Place) -> None:
    release = threading.Event()
    broke: queue.SimpleQueue[str] = queue.SimpleQueue()

    def take(arrival: Arrival) -> None:
        chunks = iter(arrival)
        next(chunks)
        release.wait(DEADLINE_S)
        try:
            for _ in chunks:
                pass
            broke.put("end")
        except STREAM_ERRORS:
            broke.put("break")

    place.set_take(take)
    stream = place.open()
    written = 0
    failed: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def write() -> None:
        nonlocal written
        try:
            while True:
                stream.write(b"x", rows(1 << 20))
                written += 1
        except STREAM_ERRORS as error:
            failed.put(error)

    writer = threading.Thread(target=write)
    writer.start()
    before = -1
    while before != written:
        before = written
        writer.join(0.2)
    assert 1 <= written < 64
    stream.cancel()
    assert isinstance(failed.get(timeout=DEADLINE_S), STREAM_ERRORS)
    writer.join(DEADLINE_S)
    release.set()
    # Over Flight a reader cannot tell one from the other; it has no gap in either.
    assert broke.get(timeout=DEADLINE_S) in ("break", "end")
    stream.close()


def test_cancelling_ends_an_answer_that_waits(place: Place) -> None:
    place.set_take(lambda arrival: [None for _ in arrival] and None)
    stream = place.open()
    stream.write(b"hello", None)
    timer = threading.Timer(0.05, stream.cancel)
    timer.start()
    with pytest.raises(STREAM_ERRORS):
        stream.answer()
    timer.join(DEADLINE_S)
    stream.close()


def test_one_chunk_may_be_larger_than_the_buffer() -> None:
    network = InProcessNetwork()
    sizes: queue.SimpleQueue[int] = queue.SimpleQueue()
    network.listen(
        "here", lambda arrival: [sizes.put(batch.nbytes) for _, batch in arrival if batch is not None] and None
    )
    stream = network.open("here", ENTRY_SCHEMA, connect_timeout_s=1.0, silent_peer_s=1.0)
    for _ in range(3):
        stream.write(b"x", rows(2 * BUFFER_BYTES))
    stream.finish()
    assert all(sizes.get(timeout=DEADLINE_S) > 2 * BUFFER_BYTES for _ in range(3))


def test_nobody_there_is_an_error_of_streams() -> None:
    with pytest.raises(STREAM_ERRORS):
        InProcessNetwork().open("nowhere", ENTRY_SCHEMA, connect_timeout_s=1.0, silent_peer_s=1.0)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        threading.Event().wait(0.002)


def test_many_nodes_in_one_process_reach_each_other_and_notice_who_leaves() -> None:
    network = InProcessNetwork()
    options = TransportOptions(backoff_min_s=0.01, backoff_max_s=0.05, idle_check_s=0.05)
    inboxes: dict[int, queue.SimpleQueue[Envelope]] = {node: queue.SimpleQueue() for node in range(1, 8)}
    nodes = {node: InProcessTransport(network, "c", node, options=options) for node in inboxes}
    endpoints = {node: transport.endpoint for node, transport in nodes.items()}
    gone: queue.SimpleQueue[int] = queue.SimpleQueue()
    for node, transport in nodes.items():
        transport.set_peers(endpoints)
        inbox = inboxes[node]
        transport.start(lambda got, inbox=inbox: [inbox.put(each) for each in got] and None, unreachable=gone.put)
    wait_until(lambda: all(one.connected(other) for one in nodes.values() for other in nodes if other != one.node_id))
    for sender, transport in nodes.items():
        for to in nodes:
            if to != sender:
                assert transport.send(to, [Envelope(0, Message(MessageKind.HEARTBEAT, sender, to, sender))])
    for inbox in inboxes.values():
        assert len({inbox.get(timeout=DEADLINE_S).message.sender for _ in range(6)}) == 6
    nodes[1].send_message(2, b"of a user")
    assert bytes(nodes[2].receive_message(DEADLINE_S)) == b"of a user"
    while gone.qsize():
        gone.get()
    assert nodes.pop(7).stop(5.0)
    assert gone.get(timeout=DEADLINE_S) == 7
    wait_until(lambda: not any(one.connected(7) for one in nodes.values()))
    for transport in nodes.values():
        assert transport.stop(5.0)
    wait_until(lambda: not [each for each in threading.enumerate() if each.name.startswith("marble-inprocess-")])


def test_a_transport_over_flight_is_another_network() -> None:
    network = InProcessNetwork()
    one = InProcessTransport(network, "c", 1)
    other = FlightTransport("127.0.0.1:0", "c", 2)
    one.set_peers({2: other.endpoint})
    one.start(lambda envelopes: None)
    wait_until(lambda: "nobody is at" in one._peers.links[2].trouble)
    assert one.stop(5.0)
    assert other.stop(5.0)
