"""Users' messages in a queue and in one run of bytes, against an obvious twin."""

from __future__ import annotations

import gc
import weakref

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marble._core.packing import CLOSED, FULL, QUEUED, WAKE, Outbox, ReceivedMessage, pack, unpack
from marble.errors import InvariantError, ProtocolError
from tests.reference import packing as reference

MESSAGES = st.lists(st.binary(max_size=40), max_size=30)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.binary(max_size=20)),
        st.tuples(st.just("take"), st.tuples(st.integers(0, 40), st.integers(1, 5))),
        st.tuples(st.just("release"), st.none()),
        st.tuples(st.just("drain"), st.none()),
        st.tuples(st.just("open"), st.booleans()),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(STEPS)
def test_a_queue_does_what_its_twin_does(steps: list[tuple[str, object]]) -> None:
    real, twin = Outbox(50, 6), reference.Outbox(50, 6)
    taken: list[list[bytes]] = []
    for step, argument in steps:
        match step, argument:
            case "put", bytes(data):
                assert (real.put(data) == QUEUED) == twin.put(data)
            case "take", (int(size), int(count)):
                got = real.take(size, count)
                assert got == twin.take(size, count)
                taken.append(got)
            case "release", _:
                if taken:
                    first = taken.pop(0)
                    assert real.release(first) == twin.release(first)
            case "drain", _:
                got = real.drain()
                assert got == twin.drain()
                taken.append(got)
            case "open", bool(accepting):
                twin.accepting = accepting
                if accepting:
                    real.open()
                else:
                    real.close()
        assert (real.nbytes, real.count, real.accepting) == (twin.nbytes, twin.count, twin.accepting)


def test_who_waits_is_woken_once() -> None:
    box = Outbox(100, 100)
    assert box.begin_wait()
    assert box.put(b"a") == WAKE
    assert box.put(b"b") == QUEUED
    # Woken while it was about to give up.
    assert not box.end_wait()
    assert not box.begin_wait()
    assert box.take(10, 10) == [b"a", b"b"]
    assert box.begin_wait()
    assert box.end_wait()
    assert box.begin_wait()
    assert box.interrupt()
    assert not box.end_wait()
    # An interrupt that comes just before the wait is not lost.
    assert not box.interrupt()
    assert not box.begin_wait()
    assert box.begin_wait()


def test_who_finds_no_room_is_told_when_there_is_some() -> None:
    box = Outbox(3, 100)
    assert box.put(b"large") == QUEUED
    assert box.put(b"") == FULL
    taken = box.take(10, 10)
    assert box.put(b"x") == FULL
    assert box.release(taken) == 5
    assert box.fed()
    assert not box.fed()
    assert box.put(b"x") == QUEUED
    box.close()
    assert box.put(b"x") == CLOSED
    assert box.put_many([b"x"], 0) == (0, False, True)


def test_many_are_queued_up_to_the_one_that_finds_no_room() -> None:
    box = Outbox(4, 100)
    assert box.begin_wait()
    messages = [b"never", b"a", b"bc", b"de", b"f"]
    assert box.put_many(messages, 1) == (2, True, True)
    assert box.put_many(messages, 4) == (1, False, False)
    assert box.put_many(messages, 5) == (0, False, False)
    assert box.take(100, 100) == [b"a", b"bc", b"f"]
    assert box.fed()


@settings(deadline=None)
@given(MESSAGES)
def test_what_was_packed_is_unpacked(items: list[bytes]) -> None:
    run, lengths = reference.pack(items)
    out = pa.allocate_buffer(len(run))
    mixed = [pa.py_buffer(item) if at % 2 else item for at, item in enumerate(items)]
    assert pack(mixed, out) == lengths
    assert out.to_pybytes() == run
    messages = unpack(out, lengths, 7)
    assert [bytes(message) for message in messages] == reference.unpack(run, lengths) == items
    assert [bytes(message) for message in unpack(out, lengths, 7, skip=3)] == items[3:]
    assert [message.sender for message in messages] == [7] * len(items)
    assert [len(message) for message in messages] == list(map(len, items))


@settings(deadline=None)
@given(st.binary(max_size=30), st.binary(max_size=12))
def test_lengths_that_do_not_fit_are_refused(run: bytes, lengths: bytes) -> None:
    try:
        expected = reference.unpack(run, lengths)
    except ProtocolError:
        with pytest.raises(ProtocolError):
            unpack(run, lengths, 1)
    else:
        assert [bytes(message) for message in unpack(run, lengths, 1)] == expected


@pytest.mark.parametrize("size", [2, 4])
def test_messages_fill_their_run_exactly(size: int) -> None:
    with pytest.raises(InvariantError):
        pack([b"abc"], bytearray(size))
    with pytest.raises(BufferError):
        pack([b"abc"], b"abc")


def test_messages_share_the_memory_of_their_run_and_keep_it() -> None:
    class Memory(bytearray):
        """One that can be watched."""

    run = Memory(b"onetwo")
    gone = weakref.ref(run)
    first, second = unpack(run, reference.pack([b"one", b"two"])[1], 1)
    run[0] = ord("0")
    del run
    assert (bytes(first), second.data.tobytes()) == (b"0ne", b"two")
    assert second.data.readonly
    view = memoryview(second)
    del first, second
    gc.collect()
    assert gone() is not None
    assert view == b"two"
    del view
    assert gone() is None
    with pytest.raises(TypeError):
        ReceivedMessage()
