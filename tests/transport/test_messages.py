"""Users' own messages between real transports on loopback: order, bounds, breaks, pieces, and what a stranger sends."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marble._core.packing import MESSAGE_SCHEMA, ReceivedMessage
from marble.demo.processes import find_free_ports
from marble.errors import ProtocolError, UnavailableError, UsageError
from marble.metrics import Metrics
from marble.raft.messages import Message, MessageKind
from marble.transport.arrow_flight import ArrowFlightTransport, create_arrow_flight_transport
from marble.transport.codec import Codec, Envelope, Packet
from marble.transport.flight import FlightTransport
from marble.transport.messages import PIECE_BYTES_MAX, MessageCodec, MessageIntake
from marble.transport.options import TransportOptions

DEADLINE_S = 30.0
QUICK = TransportOptions(connect_timeout_s=0.5, backoff_min_s=0.01, backoff_max_s=0.05, idle_check_s=0.05)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        threading.Event().wait(0.002)


class Pair:
    """Transports 1 and 2; 1 is connected to 2."""

    def __init__(self, stack: contextlib.ExitStack, options: TransportOptions = QUICK) -> None:
        self.options = options
        self.stack = stack
        self.one = self.make(1)
        # None that the kernel gives to somebody else while `restart_two` has let it go.
        self.two = self.make(2, f"127.0.0.1:{find_free_ports(1)[0]}")
        self.one.start()
        self.two.start()
        assert self.one.connect_to_peer(2, self.two.endpoint, timeout_s=DEADLINE_S) == 2

    def make(self, node: int, endpoint: str = "127.0.0.1:0") -> FlightTransport:
        made = FlightTransport(endpoint, "c", node, options=self.options)
        self.stack.callback(made.stop, 5.0)
        return made

    def restart_two(self) -> None:
        self.two = self.make(2, self.two.endpoint)
        self.two.start()

    def take(self) -> bytes:
        message = self.two.receive_message(DEADLINE_S)
        assert message is not None
        return bytes(message)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


@pytest.fixture
def pair(stack: contextlib.ExitStack) -> Pair:
    return Pair(stack)


def count(transport: FlightTransport | ArrowFlightTransport, name: str) -> int:
    return transport.get_metrics_collector().get_counter(name)


def test_messages_arrive_whole_and_in_order(pair: Pair) -> None:
    large = bytes(range(256)) * (3 * PIECE_BYTES_MAX // 256) + b"end"
    sent: list[bytes | bytearray | memoryview | pa.Buffer] = [
        b"",
        b"one",
        bytearray(b"two"),
        memoryview(b"three"),
        pa.py_buffer(b"four"),
        bytes(PIECE_BYTES_MAX),
        large,
        *(str(number).encode() for number in range(1000)),
    ]
    for message in sent:
        pair.one.send_message(2, message, timeout_s=DEADLINE_S)
    got = [pair.take() for _ in sent]
    assert got == [bytes(memoryview(message)) for message in sent]
    # What has left is counted when the stream has taken it, which the sender may learn after the receiver.
    wait_until(lambda: count(pair.one, "messages_sent") == len(sent))
    assert count(pair.two, "messages_received") == len(sent)
    assert count(pair.one, "user_bytes_sent") == count(pair.two, "user_bytes_received") == sum(map(len, got))
    assert count(pair.two, "user_messages_missed") == 0
    assert pair.two.receive_message(0) is None


def test_what_can_be_changed_is_copied_and_what_cannot_is_not_kept_from_others(pair: Pair) -> None:
    changing = bytearray(b"before")
    pair.one.send_message(2, changing)
    changing[:] = b"behind"
    assert pair.take() == b"before"
    with pytest.raises(UsageError, match="must be bytes or a RecordBatch, not a str"):
        pair.one.send_message(2, "text")  # type: ignore[arg-type]


def test_batches_travel_as_streams_that_arrow_reads(pair: Pair) -> None:
    batch = pa.record_batch({"key": [1, 2, 3], "value": ["a", None, "c"]})
    pair.one.send_message(2, batch)
    message = pair.two.receive_message(DEADLINE_S)
    assert message is not None
    assert pa.ipc.open_stream(message.data).read_next_batch().equals(batch)


def test_the_other_side_answers_without_connecting(pair: Pair) -> None:
    pair.one.send_message(2, b"ping")
    message = pair.two.receive_message(DEADLINE_S)
    assert message is not None
    pair.two.send_message(message.sender, b"pong", timeout_s=DEADLINE_S)
    answer = pair.one.receive_message(DEADLINE_S)
    assert answer is not None
    assert (answer.sender, bytes(answer)) == (2, b"pong")
    assert pair.two.get_health_status() == {"transport": True, "server": True, "peer:1": True}


def test_a_peer_is_known_by_its_endpoint_alone(stack: contextlib.ExitStack) -> None:
    one, two = create_arrow_flight_transport("127.0.0.1:0", node_id=1), create_arrow_flight_transport("127.0.0.1:0")
    with one, two:
        assert one.get_health_status() == {"transport": False, "server": False}
        with pytest.raises(UsageError, match="not started"):
            one.connect_to_peer(2, "127.0.0.1:1")
        one.start()
        two.start()
        assert one.connect_to_peer(two.endpoint, timeout_s=DEADLINE_S) == two.node_id
        assert one.connect_to_peer(two.endpoint, timeout_s=DEADLINE_S) == two.node_id
        one.send_message(two.endpoint, b"hello")
        assert [bytes(message) for message in two.receive_messages(timeout_s=DEADLINE_S)] == [b"hello"]
        with pytest.raises(UsageError, match="is this node itself"):
            one.connect_to_peer(1, one.endpoint)
    assert one.get_health_status()["transport"] is False
    with pytest.raises(UnavailableError, match="has stopped"):
        one.send_message(two.endpoint, b"late")


def test_a_peer_that_is_not_there_is_an_error_that_says_so(stack: contextlib.ExitStack) -> None:
    # A busy machine takes its time also to say no.
    options = replace(QUICK, connect_timeout_s=DEADLINE_S)
    one = stack.enter_context(create_arrow_flight_transport("127.0.0.1:0", node_id=1, options=options))
    one.start()
    gone, other = (f"127.0.0.1:{port}" for port in find_free_ports(2))
    with pytest.raises(UnavailableError, match=f"node 2 at {gone} was not reached in 0.2 s"):
        one.connect_to_peer(2, gone, timeout_s=0.2)
    with pytest.raises(UnavailableError, match=f"node 2 at {gone} was not reached in 0 s.*see that it runs"):
        one.send_message(2, b"x", timeout_s=0)
    with pytest.raises(UnavailableError, match=f"nobody at {other} says who it is.*refused"):
        one.connect_to_peer(other)
    with pytest.raises(UsageError, match="node 3 is not connected to: call connect_to_peer"):
        one.send_message(3, b"x")
    assert one.get_health_status() == {"transport": True, "server": True, "peer:2": False}
    # It goes on trying, and finds the peer when it comes.
    late = FlightTransport(gone, "default", 2)
    stack.callback(late.stop, 5.0)
    late.start()
    one.send_message(2, b"at last", timeout_s=DEADLINE_S)
    message = late.receive_message(DEADLINE_S)
    assert message is not None
    assert bytes(message) == b"at last"
    one.disconnect_from_peer(2)
    one.disconnect_from_peer(2)
    with pytest.raises(UsageError, match="not connected to"):
        one.send_message(2, b"x")


def test_members_of_a_cluster_stay_connected(pair: Pair) -> None:
    pair.one.set_peers({1: pair.one.endpoint, 2: pair.two.endpoint, 3: "127.0.0.1:1"})
    with pytest.raises(UsageError, match="is a member of the cluster"):
        pair.one.disconnect_from_peer(2)
    # Who was connected to by hand stays when the cluster forgets it; who was not does not.
    pair.one.set_peers({})
    assert set(pair.one.get_health_status()) == {"transport", "server", "peer:2"}
    pair.one.send_message(2, b"still here", timeout_s=DEADLINE_S)
    assert pair.take() == b"still here"


def test_a_receiver_that_takes_nothing_holds_the_sender_back_and_nobody_else(stack: contextlib.ExitStack) -> None:
    options = TransportOptions(queue_bytes_max=1 << 20, mailbox_bytes_max=1 << 20, idle_check_s=0.05, compression="off")
    beats: queue.SimpleQueue[list[Envelope]] = queue.SimpleQueue()
    one, two = (FlightTransport("127.0.0.1:0", "c", node, options=options) for node in (1, 2))
    for transport in (one, two):
        stack.callback(transport.stop, 5.0)
        transport.start(beats.put)
    one.connect_to_peer(2, two.endpoint, timeout_s=DEADLINE_S)
    sent = 0
    refused = None
    while refused is None:
        assert sent < 2000, "nothing held the sender back"
        try:
            one.send_message(2, sent.to_bytes(4, "little") + bytes(100_000), timeout_s=0.05)
            sent += 1
        except UnavailableError as error:
            refused = error
    assert "more slowly than they are sent" in str(refused)
    # Messages of Raft pass all that.
    for number in range(10):
        assert one.send(2, [Envelope(0, Message(MessageKind.HEARTBEAT, 1, 2, 1, commit=number))])
        assert beats.get(timeout=DEADLINE_S)[0].message.commit == number
    # Somebody who waits for room gets it, and nothing is out of order.
    waiting = threading.Thread(target=one.send_message, args=(2, b"last"), kwargs={"timeout_s": DEADLINE_S})
    waiting.start()
    numbers = []
    for message in two.messages():
        if bytes(message) == b"last":
            break
        numbers.append(int.from_bytes(message.data[:4], "little"))
    waiting.join()
    assert numbers == list(range(sent))


def test_many_messages_are_sent_at_once(stack: contextlib.ExitStack) -> None:
    pair = Pair(
        stack,
        TransportOptions(
            queue_bytes_max=1 << 20, mailbox_bytes_max=1 << 20, message_bytes_max=100_000, compression="off"
        ),
    )
    pair.one.send_messages(2, [b"one", bytearray(b"two"), b"three"])
    assert [pair.take() for _ in range(3)] == [b"one", b"two", b"three"]
    with pytest.raises(UsageError, match="exceeds message_bytes_max"):
        pair.one.send_messages(2, [b"not this one either", bytes(100_001)])
    messages = [number.to_bytes(4, "little") + bytes(90_000) for number in range(1000)]
    with pytest.raises(UnavailableError, match=r"of 1000 messages \d+ were queued") as caught:
        pair.one.send_messages(2, messages, timeout_s=0.5)
    queued = int(str(caught.value).split()[-3])
    assert [pair.take() for _ in range(queued)] == messages[:queued]
    assert pair.two.receive_message(0) is None
    # More than there is room for at once, to somebody who takes them.
    sending = threading.Thread(target=pair.one.send_messages, args=(2, messages), kwargs={"timeout_s": DEADLINE_S})
    sending.start()
    assert [pair.take() for _ in messages] == messages
    sending.join()


def test_messages_of_large_and_small_size_are_bounded(stack: contextlib.ExitStack) -> None:
    pair = Pair(stack, TransportOptions(message_bytes_max=10))
    with pytest.raises(UsageError, match="11 bytes exceeds message_bytes_max, 10"):
        pair.one.send_message(2, bytes(11))
    pair.one.send_message(2, bytes(10))
    assert pair.take() == bytes(10)


def test_a_restarted_peer_gets_what_was_queued_meanwhile_and_nothing_twice(pair: Pair) -> None:
    pair.one.send_message(2, b"before")
    assert pair.take() == b"before"
    assert pair.two.stop(5.0)
    wait_until(lambda: not pair.one.get_health_status()["peer:2"])
    pair.restart_two()
    pair.one.send_message(2, b"after", timeout_s=DEADLINE_S)
    assert pair.take() == b"after"
    assert pair.two.receive_message(0) is None


def test_what_was_sent_leaves_before_a_transport_stops(pair: Pair) -> None:
    for number in range(5000):
        pair.one.send_message(2, str(number).encode())
    assert pair.one.stop(DEADLINE_S)
    assert [pair.take() for _ in range(5000)] == [str(number).encode() for number in range(5000)]


def test_a_stop_waits_for_nobody_who_does_not_take(stack: contextlib.ExitStack) -> None:
    pair = Pair(stack, TransportOptions(mailbox_count_max=1, queue_bytes_max=1 << 20, compression="off"))
    with contextlib.suppress(UnavailableError):
        for _ in range(2000):
            pair.one.send_message(2, bytes(100_000), timeout_s=0.05)
    waiting = threading.Thread(target=lambda: list(pair.one.messages()))
    waiting.start()
    assert pair.one.stop(2.0)
    assert pair.two.stop(2.0)
    waiting.join(DEADLINE_S)
    assert not waiting.is_alive()
    # What had come can still be taken out.
    assert pair.take() == bytes(100_000)
    while pair.two.receive_message() is not None:
        pass


def test_messages_go_to_a_callback_if_there_is_one(stack: contextlib.ExitStack) -> None:
    got: queue.SimpleQueue[list[ReceivedMessage]] = queue.SimpleQueue()
    two = stack.enter_context(create_arrow_flight_transport("127.0.0.1:0", node_id=2))
    two.start(on_messages=got.put)
    one = stack.enter_context(create_arrow_flight_transport("127.0.0.1:0", node_id=1))
    one.start()
    one.connect_to_peer(2, two.endpoint, timeout_s=DEADLINE_S)
    for number in range(100):
        one.send_message(2, bytes([number]))
    numbers: list[int] = []
    while len(numbers) < 100:
        numbers.extend(message.data[0] for message in got.get(timeout=DEADLINE_S))
    assert numbers == list(range(100))


def test_a_transport_for_messages_alone_takes_none_of_raft(pair: Pair) -> None:
    pair.one.send(2, [Envelope(0, Message(MessageKind.HEARTBEAT, 1, 2, 1))])
    wait_until(lambda: count(pair.two, "protocol_errors") >= 1)


def test_instruments_are_found_by_their_short_and_their_whole_name(pair: Pair) -> None:
    collector = pair.one.get_metrics_collector()
    assert collector.get_counter("transport_streams_opened") == collector.get_counter("streams_opened") == 1
    assert collector.get_counters()["transport_streams_opened"] == 1
    with pytest.raises(UsageError, match="there is no instrument 'nonsense'"):
        collector.get_counter("nonsense")
    with pytest.raises(UsageError, match="is no gauge"):
        collector.get_gauge("streams_opened")


# -- what a stranger sends ------------------------------------------------------------------------------------------------

ONE = MessageCodec(Codec("c", 1, 1), 5 << 20)
TWO = MessageCodec(Codec("c", 2, 1), 5 << 20)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=50), max_size=20), st.integers(0, 2**63), st.integers(0, 2**63))
def test_packets_are_read_as_they_were_written(messages: list[bytes], epoch: int, first: int) -> None:
    (packet,) = ONE.encode(2, epoch, first, list(messages))
    header, body = TWO.decode(1, packet.metadata, packet.batch)
    assert (header.epoch, header.first, header.messages, header.offset) == (epoch, first, len(messages), 0)
    assert body.to_pybytes() == b"".join(messages)
    assert header.total == body.size


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_flipped_bit_goes_unnoticed(data: st.DataObject) -> None:
    (packet,) = ONE.encode(2, 1, 0, [b"one", b"three"])
    assert packet.batch is not None
    body = bytearray(packet.batch.column(0).buffers()[1].to_pybytes()[:8])
    metadata = bytearray(packet.metadata)
    at = data.draw(st.integers(0, 8 * (len(body) + len(metadata)) - 1))
    whole = metadata + body
    whole[at // 8] ^= 1 << at % 8
    changed = pa.py_buffer(bytes(whole[len(metadata) :]))
    column = pa.Array.from_buffers(pa.uint8(), 8, [None, changed])
    with pytest.raises(ProtocolError):
        TWO.decode(1, bytes(whole[: len(metadata)]), pa.RecordBatch.from_arrays([column], schema=packet.batch.schema))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_no_packet(garbage: bytes) -> None:
    with pytest.raises(ProtocolError):
        TWO.decode(1, garbage, None)


def pieces(size: int) -> list[Packet]:
    return list(ONE.encode(2, 1, 0, [bytes(size)]))


def test_a_message_above_the_limit_is_refused_at_its_first_piece() -> None:
    packets = pieces((5 << 20) + 1)
    assert len(packets) == 3
    with pytest.raises(ProtocolError, match="exceeds 5242880 bytes"):
        TWO.decode(1, *packets[0])
    for packet in pieces(5 << 20):
        TWO.decode(1, *packet)


@pytest.mark.parametrize(
    "batch",
    [
        pa.record_batch({"bytes": pa.array([1], pa.int8())}),
        pa.record_batch({"other": pa.array([1], pa.uint8())}),
        pa.RecordBatch.from_arrays([pa.array([1, None], pa.uint8())], schema=MESSAGE_SCHEMA),
    ],
)
def test_batches_of_another_form_are_refused(batch: pa.RecordBatch) -> None:
    (packet,) = ONE.encode(2, 1, 0, [b"x"])
    with pytest.raises(ProtocolError):
        TWO.decode(1, packet.metadata, batch)


class Script:
    """An intake that is given packets by hand, and what it hands on."""

    def __init__(self) -> None:

        self.got: list[bytes] = []
        self.metrics = Metrics()
        self.intake = MessageIntake(TWO, self.deliver, lambda: None, self.metrics)

    def deliver(self, messages: list[ReceivedMessage], nbytes: int, wanted: Callable[[], bool]) -> bool:
        self.got.extend(bytes(message) for message in messages)
        return wanted()

    def stream(self, *packets: Packet) -> None:
        self.intake.take(1, ((pa.py_buffer(packet.metadata), packet.batch) for packet in packets))


def numbered(epoch: int, first: int, *messages: bytes) -> Packet:
    (packet,) = ONE.encode(2, epoch, first, list(messages))
    return packet


def test_what_comes_again_after_a_break_is_dropped() -> None:
    script = Script()
    script.stream(numbered(1, 0, b"a", b"b"), numbered(1, 2, b"c"))
    script.stream(numbered(1, 1, b"b", b"c", b"d"))
    script.stream(numbered(1, 0, b"a", b"b"))
    assert script.got == [b"a", b"b", b"c", b"d"]
    assert len(script.intake._senders) == 1
    # Another queue counts anew, and gaps are counted.
    script.stream(numbered(2, 0, b"e"), numbered(2, 5, b"f"))
    assert script.got[4:] == [b"e", b"f"]
    assert script.metrics.counter("transport_user_messages_missed").value == 4


def test_pieces_that_are_not_the_next_ones_are_refused() -> None:
    first, second, third = pieces(5 << 20)
    for wrong in ([second], [first, third], [first, first], [first, numbered(1, 1, b"x")], [first, pieces(3 << 20)[1]]):
        script = Script()
        with pytest.raises(ProtocolError):
            script.stream(*wrong)
        assert script.got == []
    # A stream that breaks within a message: the next one brings it from the beginning.
    script = Script()
    script.stream(first, second)
    script.stream(first, second, third)
    assert [len(message) for message in script.got] == [5 << 20]
