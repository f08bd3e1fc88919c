"""A client's stream of writes against a server that we hold in hand."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.flight as fl
import pytest

from marble.errors import (
    MarbleError,
    NotLeaderError,
    OutcomeUnknownError,
    SessionExpiredError,
    UnavailableError,
    UsageError,
)
from marble.transport import patience
from marble.transport.put import PutStream
from marble.transport.wire import Ack, Stamp, decode_stamp, encode_ack

SCHEMA = pa.schema([("k", pa.int64())])
DEADLINE_S = 30.0


def batch(key: int) -> pa.RecordBatch:
    return pa.record_batch({"k": [key]}, schema=SCHEMA)


class Server(fl.FlightServerBase):
    """Hands what arrives to the test, and answers what the test says. An answer of None ends the stream with an error."""

    def __init__(self) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self.got: queue.Queue[int] = queue.Queue()
        self.stamps: queue.Queue[Stamp | None] = queue.Queue()
        self.answers: queue.Queue[Ack | None] = queue.Queue()
        self.refusing = 0
        """How many streams, from the next on, refuse everything."""
        self.streams = 0
        self._open = threading.Event()
        self._open.set()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Take what comes, and answer it only after this."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def do_exchange(self, context, descriptor, reader, writer):
        self.streams += 1
        refusing = self.streams <= self.refusing
        for chunk in reader:
            self.got.put(chunk.data.column("k")[0].as_py())
            self.stamps.put(None if chunk.app_metadata is None else decode_stamp(chunk.app_metadata))
            assert self._open.wait(DEADLINE_S)
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


# -- with a session ----------------------------------------------------------------------------------------------------


class Sessions:
    """Opens sessions as the test says, and counts them."""

    def __init__(self, *errors: MarbleError) -> None:
        self.errors = list(errors)
        self.opened = 0

    def open(self, client: fl.FlightClient, deadline: float) -> int:
        if self.errors:
            raise self.errors.pop(0)
        self.opened += 1
        return 100 * self.opened


@pytest.fixture
def sessions() -> Sessions:
    return Sessions()


@pytest.fixture
def numbered(server: Server, sessions: Sessions) -> Iterator[PutStream]:
    client = fl.connect(f"grpc://127.0.0.1:{server.port}")
    stream = PutStream(("t", "upsert"), SCHEMA, lambda deadline, failed: client, DEADLINE_S, open_session=sessions.open)
    yield stream
    stream.close(DEADLINE_S)
    client.close()


def stamps(server: Server, count: int) -> list[tuple[int, int, int]]:
    """The next `count` arrivals: session, sequence and key of each."""
    found = []
    for _ in range(count):
        key = server.got.get(timeout=DEADLINE_S)
        stamp = server.stamps.get(timeout=DEADLINE_S)
        assert stamp is not None
        found.append((stamp.session, stamp.sequence, key))
    return found


def test_a_stream_without_a_session_sends_no_stamps(server: Server, stream: PutStream) -> None:
    server.answers.put(Ack(1, 1, 1))
    stream.write(batch(7)).result(DEADLINE_S)
    assert server.stamps.get(timeout=DEADLINE_S) is None


def test_every_write_has_its_number_in_the_session(server: Server, numbered: PutStream, sessions: Sessions) -> None:
    for key in range(5):
        server.answers.put(Ack(key + 1, 1, 1))
        numbered.write(batch(key)).result(DEADLINE_S)
    assert stamps(server, 5) == [(100, key + 1, key) for key in range(5)]
    assert sessions.opened == 1
    assert numbered.session == 100


def test_a_lost_answer_is_asked_for_again_under_the_same_numbers_and_in_order(
    server: Server, numbered: PutStream
) -> None:
    server.answers.put(Ack(1, 1, 1))
    numbered.write(batch(0)).result(DEADLINE_S)
    futures = [numbered.write(batch(key)) for key in (1, 2, 3)]
    server.answers.put(None)
    for index in (5, 6, 7):
        server.answers.put(Ack(index, 2, 1))
    assert [future.result(DEADLINE_S).index for future in futures] == [5, 6, 7]
    arrived = stamps(server, server.got.qsize())
    assert arrived[:2] == [(100, 1, 0), (100, 2, 1)]
    assert arrived[-3:] == [(100, 2, 1), (100, 3, 2), (100, 4, 3)]


def test_an_outcome_that_the_server_does_not_know_is_asked_for_again(server: Server, numbered: PutStream) -> None:
    server.answers.put(Ack.of_error(OutcomeUnknownError("the node stops")))
    server.answers.put(Ack.of_error(UnavailableError("the node stops")))
    with server.held():  # Until both are under way: one that came while the first is refused would leave it behind.
        first, second = numbered.write(batch(0)), numbered.write(batch(1))
    server.answers.put(Ack(4, 2, 1))
    server.answers.put(Ack(5, 2, 1))
    assert (first.result(DEADLINE_S).index, second.result(DEADLINE_S).index) == (4, 5)
    assert stamps(server, server.got.qsize())[-2:] == [(100, 1, 0), (100, 2, 1)]


def test_what_was_refused_is_given_up_when_a_later_write_took_effect(server: Server, numbered: PutStream) -> None:
    server.answers.put(Ack(1, 1, 1))
    numbered.write(batch(9)).result(DEADLINE_S)
    server.answers.put(Ack.of_error(UnavailableError("full")))
    server.answers.put(Ack(5, 1, 1))
    with server.held():  # Until both are under way, so that they share a stream.
        first, second = numbered.write(batch(0)), numbered.write(batch(1))
    assert second.result(DEADLINE_S).index == 5
    with pytest.raises(UnavailableError, match="full"):
        first.result(DEADLINE_S)


def test_what_has_no_answer_is_asked_for_again_although_a_later_write_took_effect(
    server: Server, numbered: PutStream
) -> None:
    server.answers.put(Ack(1, 1, 1))
    numbered.write(batch(9)).result(DEADLINE_S)
    server.answers.put(Ack.of_error(OutcomeUnknownError("not decided in time")))
    server.answers.put(Ack(5, 1, 1))
    server.answers.put(Ack(4, 1, 1))
    with server.held():
        first, second = numbered.write(batch(0)), numbered.write(batch(1))
    assert second.result(DEADLINE_S).index == 5
    assert first.result(DEADLINE_S).index == 4
    assert stamps(server, 4)[-1] == (100, 2, 0)


def test_a_session_that_expired_is_replaced_without_a_word(
    server: Server, numbered: PutStream, sessions: Sessions
) -> None:
    server.answers.put(Ack(1, 1, 1))
    numbered.write(batch(0)).result(DEADLINE_S)
    for _ in range(2):
        server.answers.put(Ack.of_error(SessionExpiredError("not used for 60 minutes")))
    for index in (8, 9):
        server.answers.put(Ack(index, 1, 1))
    with server.held():
        futures = [numbered.write(batch(key)) for key in (1, 2)]
    assert [future.result(DEADLINE_S).index for future in futures] == [8, 9]
    assert stamps(server, 5) == [(100, 1, 0), (100, 2, 1), (100, 3, 2), (200, 1, 1), (200, 2, 2)]
    assert sessions.opened == 2


@pytest.mark.parametrize("answer", [None, Ack.of_error(OutcomeUnknownError("not decided in time"))])
def test_a_session_that_expired_over_an_open_outcome_leaves_that_outcome_unknown(
    server: Server, numbered: PutStream, answer: Ack | None
) -> None:
    server.answers.put(answer)
    server.answers.put(Ack.of_error(SessionExpiredError("not known")))
    with pytest.raises(SessionExpiredError, match="not known"):
        numbered.write(batch(0)).result(DEADLINE_S)
    server.answers.put(Ack(3, 1, 1))
    assert numbered.write(batch(1)).result(DEADLINE_S).index == 3
    assert stamps(server, 3) == [(100, 1, 0), (100, 1, 0), (200, 1, 1)]


def test_opening_a_session_is_tried_until_it_succeeds(server: Server, numbered: PutStream, sessions: Sessions) -> None:
    sessions.errors = [UnavailableError("no leader"), NotLeaderError("moved", None)]
    server.answers.put(Ack(3, 1, 1))
    assert numbered.write(batch(0)).result(DEADLINE_S).index == 3


def test_a_session_that_cannot_be_opened_at_all_fails_what_waits(
    server: Server, numbered: PutStream, sessions: Sessions
) -> None:
    sessions.errors = [UsageError("there is no action 'open_session'")]
    with pytest.raises(UsageError, match="no action"):
        numbered.write(batch(0)).result(DEADLINE_S)


def test_a_wrong_batch_is_answered_once(server: Server, numbered: PutStream) -> None:
    server.answers.put(Ack.of_error(UsageError("no such column")))
    with pytest.raises(UsageError, match="no such column"):
        numbered.write(batch(0)).result(DEADLINE_S)
    server.answers.put(Ack(3, 1, 1))
    assert numbered.write(batch(1)).result(DEADLINE_S).index == 3
    assert stamps(server, 2) == [(100, 1, 0), (100, 2, 1)]


def test_without_an_answer_until_its_deadline_a_write_has_an_unknown_outcome(
    server: Server, numbered: PutStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    future = numbered.write(batch(0))
    assert server.got.get(timeout=DEADLINE_S) == 0
    (item,) = numbered._sent
    item.deadline = time.monotonic()
    numbered.expire(item.deadline)
    with pytest.raises(OutcomeUnknownError, match="its answer was lost"):
        future.result(DEADLINE_S)
    server.answers.put(None)


def test_a_server_that_says_nothing_is_left_for_another_try(
    server: Server, numbered: PutStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "SILENCE_MAX_S", 0.0)
    future = numbered.write(batch(0))
    assert server.got.get(timeout=DEADLINE_S) == 0
    numbered.expire(time.monotonic())
    assert server.got.get(timeout=DEADLINE_S) == 0  # In another stream, while the first still says nothing.
    server.answers.put(None)
    server.answers.put(Ack(6, 1, 1))
    # Whichever of the two streams gets the answer that ends it: the write is sent until one answers.
    server.answers.put(Ack(6, 1, 1))
    assert future.result(DEADLINE_S).index == 6


def test_who_owes_an_answer_for_long_is_under_suspicion_once_in_a_while(server: Server, numbered: PutStream) -> None:
    now = time.monotonic()
    assert numbered.suspect(now + 3600.0) is None
    future = numbered.write(batch(0))
    assert server.got.get(timeout=DEADLINE_S) == 0
    later = time.monotonic() + patience.PROBE_AFTER_S + 1.0
    assert numbered.suspect(now) is None
    assert isinstance(numbered.suspect(later), fl.FlightClient)
    # It was asked about just now.
    assert numbered.suspect(later + patience.PROBE_AFTER_S / 2) is None
    assert numbered.suspect(later + patience.PROBE_AFTER_S + 1.0) is not None
    # Whoever gave an answer since then is not given up, who did not is: the write goes out again.
    assert not numbered.give_up_silent(now - 1.0)
    assert numbered.give_up_silent(later)
    assert server.got.get(timeout=DEADLINE_S) == 0
    for _ in range(2):
        server.answers.put(Ack(6, 1, 1))
    assert future.result(DEADLINE_S).index == 6


def test_more_writes_than_may_be_in_flight_wait_for_the_first_stream_to_open(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "IN_FLIGHT_BATCHES_MAX", 2)
    located = threading.Event()
    client = fl.connect(f"grpc://127.0.0.1:{server.port}")

    def locate(deadline: float, failed: bool) -> fl.FlightClient:
        assert located.wait(DEADLINE_S)
        return client

    stream = PutStream(("t", "upsert"), SCHEMA, locate, DEADLINE_S)
    for index in (1, 2, 3):
        server.answers.put(Ack(index, 1, 1))
    futures = [stream.write(batch(0)), stream.write(batch(1))]
    third: queue.Queue[int] = queue.Queue()
    thread = threading.Thread(target=lambda: third.put(stream.write(batch(2)).result(DEADLINE_S).index))
    thread.start()
    located.set()
    assert [future.result(DEADLINE_S).index for future in futures] == [1, 2]
    assert third.get(timeout=DEADLINE_S) == 3
    thread.join(DEADLINE_S)
    stream.close(DEADLINE_S)
    client.close()


# -- with somebody else's stamps ---------------------------------------------------------------------------------------


def test_stamps_of_others_pass_through_and_are_not_repeated(server: Server, stream: PutStream) -> None:
    server.answers.put(Ack(1, 1, 1))
    assert stream.write(batch(0), Stamp(7, 3)).result(DEADLINE_S).index == 1
    assert stamps(server, 1) == [(7, 3, 0)]
    server.answers.put(None)
    with pytest.raises(OutcomeUnknownError):
        stream.write(batch(1), Stamp(7, 4)).result(DEADLINE_S)


@pytest.mark.parametrize("answer", [None, Ack.of_error(OutcomeUnknownError("not decided"))])
def test_after_an_outcome_that_it_cannot_tell_a_stream_of_others_stamps_takes_no_more(
    server: Server, stream: PutStream, answer: Ack | None
) -> None:
    server.answers.put(answer)
    with pytest.raises(OutcomeUnknownError):
        stream.write(batch(0), Stamp(7, 1)).result(DEADLINE_S)
    # Whoever has the stamps sends both again, in order; here the second would be first.
    with pytest.raises(UnavailableError, match="outcome of an earlier write"):
        stream.write(batch(1), Stamp(7, 2)).result(DEADLINE_S)
    assert server.got.qsize() == 1
