"""Compression: when it pays, what peers without it get, and what unpacks to more than it says."""

from __future__ import annotations

import contextlib
import itertools
import queue
import struct
from collections.abc import Iterator

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.errors import ProtocolError, UsageError
from marble.metrics import Metrics
from marble.raft.messages import Message, MessageKind
from marble.transport.codec import Codec, Envelope, Packet
from marble.transport.compression import (
    _BYTES_MIN,
    ALL_FEATURES,
    FEATURES,
    Compression,
    Squeezer,
    unsqueeze,
    unwrap,
    wrap,
)
from marble.transport.flight import FlightTransport
from marble.transport.messages import MessageCodec
from marble.transport.options import TransportOptions
from marble.types import EntryKind
from tests.reference.noise import noise

DEADLINE_S = 30.0
SIZE = 128 << 10
TEXT = pa.py_buffer(b"what is said again and again " * (SIZE // 29))
NOISE = pa.py_buffer(noise(SIZE))
ONE, TWO = Codec("c", 1, 1 << 20), Codec("c", 2, 1 << 20)


class Ticking:
    """A clock that goes on by as much each time that it is read: so long a codec takes."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self.now_s = 0.0

    def monotonic(self) -> float:
        self.now_s += self.step_s
        return self.now_s

    def time_us(self) -> int:
        return 0


def squeezer(mode: str = "auto", *, link_mib_s: float = 0.0, codec_s: float = 0.0005) -> Squeezer:
    made = Squeezer(mode, Ticking(codec_s), Metrics())
    if link_mib_s:
        made.wrote(1 << 20, 1 / link_mib_s)
    return made


def test_what_pays_is_compressed_and_what_does_not_is_not() -> None:
    def chosen(made: Squeezer, body: pa.Buffer = TEXT, features: int = ALL_FEATURES) -> Compression:
        codec, squeezed = made.squeeze(body, features)
        assert (squeezed is body) == (codec is Compression.NONE)
        return codec

    # As long as nobody knows how fast the link is, and on one that is faster than any codec.
    assert chosen(squeezer()) is Compression.NONE
    assert chosen(squeezer(link_mib_s=2000)) is Compression.NONE
    # 64 KiB in half a millisecond are 125 MiB/s.
    assert chosen(squeezer(link_mib_s=500)) is Compression.NONE
    assert chosen(squeezer(link_mib_s=10)) is not Compression.NONE
    assert chosen(squeezer(link_mib_s=10), NOISE) is Compression.NONE
    assert chosen(squeezer(link_mib_s=10), TEXT.slice(0, 1000)) is Compression.NONE
    assert chosen(squeezer(link_mib_s=10), features=0) is Compression.NONE
    assert chosen(squeezer("off", link_mib_s=10)) is Compression.NONE
    for codec in FEATURES:
        assert chosen(squeezer(link_mib_s=10), features=FEATURES[codec]) is codec
        assert chosen(squeezer(codec.name.lower())) is codec
        assert chosen(squeezer(codec.name.lower()), NOISE) is Compression.NONE
        assert chosen(squeezer(codec.name.lower()), features=ALL_FEATURES & ~FEATURES[codec]) is Compression.NONE


@pytest.mark.parametrize("size", [_BYTES_MIN, (64 << 10) - 1, 64 << 10, (64 << 10) + 1])
def test_payloads_of_any_size_are_looked_at(size: int) -> None:
    body = TEXT.slice(0, size)
    codec, squeezed = squeezer(link_mib_s=1.0).squeeze(body, ALL_FEATURES)
    assert codec is not Compression.NONE
    assert unsqueeze(codec, squeezed, size, size).equals(body)


def test_what_does_not_shrink_is_tried_ever_less_often() -> None:
    clock = Ticking(0.0001)
    made = Squeezer("auto", clock, Metrics())
    made.wrote(1 << 20, 0.1)
    tries = []
    for number in range(400):
        before = clock.now_s
        made.squeeze(NOISE, ALL_FEATURES)
        if clock.now_s > before:
            tries.append(number)
    assert [second - first for first, second in itertools.pairwise(tries)][:8] == [2, 3, 5, 9, 17, 33, 65, 65]
    # When payloads shrink again it is found out, and then each of them is compressed.
    codecs = [made.squeeze(TEXT, ALL_FEATURES)[0] for _ in range(200)]
    first = next(at for at, codec in enumerate(codecs) if codec is not Compression.NONE)
    assert first <= 64
    assert Compression.NONE not in codecs[first:]


def test_a_link_that_becomes_slow_is_noticed() -> None:
    made = squeezer(link_mib_s=2000)
    for _ in range(20):
        made.wrote(1 << 20, 0.1)
    assert made.squeeze(TEXT, ALL_FEATURES)[0] is not Compression.NONE


def test_what_was_saved_does_not_count_as_written() -> None:
    """Else a slow link would look as fast as if it took what it was spared, and nothing would be compressed any more."""
    made = squeezer(link_mib_s=10)
    for _ in range(1000):
        codec, squeezed = made.squeeze(TEXT, ALL_FEATURES)
        assert codec is not Compression.NONE
        made.wrote(TEXT.size, squeezed.size / (10 << 20))


@pytest.mark.parametrize("codec", list(FEATURES))
def test_nothing_is_unpacked_to_more_than_it_says_and_may(codec: Compression) -> None:
    _, squeezed = squeezer(codec.name.lower()).squeeze(TEXT, ALL_FEATURES)
    assert unsqueeze(codec, squeezed, TEXT.size, TEXT.size).equals(TEXT)
    with pytest.raises(ProtocolError, match=f"unpacks to {TEXT.size} bytes, {TEXT.size - 1} are the most"):
        unsqueeze(codec, squeezed, TEXT.size, TEXT.size - 1)
    with pytest.raises(ProtocolError, match="damaged"):
        unsqueeze(codec, squeezed, TEXT.size - 1, TEXT.size)
    with pytest.raises(ProtocolError, match="damaged"):
        unsqueeze(codec, NOISE, TEXT.size, TEXT.size)
    for unknown in (0, 3, 2**32 - 1):
        with pytest.raises(ProtocolError, match="unknown way"):
            unsqueeze(unknown, squeezed, TEXT.size, TEXT.size)


def append(payload: bytes) -> Envelope:
    batch = entry_batch.build(0, 1, 1, [Proposal(EntryKind.WRITE, 1, pa.py_buffer(payload))])
    return Envelope(0, Message(MessageKind.APPEND_ENTRIES, 1, 2, 1, entries=entry_batch.span(batch)), batch)


def wrapped(mode: str = "lz4") -> tuple[Envelope, Packet]:
    sent = append(TEXT.to_pybytes()[: TEXT.size // 64 * 64])
    (packet,) = ONE.encode(2, [sent])
    return sent, wrap(packet, squeezer(mode), ALL_FEATURES)


@pytest.mark.parametrize("mode", ["lz4", "zstd"])
def test_entries_are_the_same_after_it(mode: str) -> None:
    sent, packet = wrapped(mode)
    assert packet.batch is None
    assert len(packet.metadata) < SIZE / 10
    plain = unwrap(packet.metadata, None, 1 << 20)
    (got,) = TWO.decode(1, plain.metadata, plain.batch)
    assert got.message == sent.message
    assert got.batch is not None
    assert got.batch.equals(sent.batch)
    with pytest.raises(ProtocolError, match="are the most"):
        unwrap(packet.metadata, None, 1)
    with pytest.raises(ProtocolError, match="not a compressed packet"):
        unwrap(packet.metadata, sent.batch, 1 << 20)


def test_small_and_incompressible_entries_stay_as_they_are() -> None:
    for payload in (bytes(64), NOISE.to_pybytes()):
        (packet,) = ONE.encode(2, [append(payload)])
        assert wrap(packet, squeezer("lz4"), ALL_FEATURES) is packet
        assert unwrap(*packet, 1 << 20) == packet


def decode(metadata: bytes) -> list[Envelope]:
    return TWO.decode(1, *unwrap(metadata, None, 1 << 20))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_flipped_bit_goes_unnoticed(data: st.DataObject) -> None:
    sent, packet = wrapped()
    metadata = bytearray(packet.metadata)
    at = data.draw(st.integers(0, 8 * len(metadata) - 1))
    metadata[at // 8] ^= 1 << at % 8
    try:
        (got,) = decode(bytes(metadata))
    except ProtocolError:
        return
    # LZ4 has more than one way to say a thing; what arrives is what was sent in any case.
    assert got.message == sent.message
    assert got.batch is not None
    assert got.batch.equals(sent.batch)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_garbage_is_refused(garbage: bytes) -> None:
    for start in (b"", b"MBLZ", struct.pack("<4sHHQII", b"MBLZ", 1, 1, 1000, 100, 0)):
        with pytest.raises(ProtocolError):
            decode(start + garbage)


def test_messages_are_the_same_after_it() -> None:
    one, two = MessageCodec(ONE, 1 << 30), MessageCodec(TWO, 1 << 30)
    messages = [TEXT.to_pybytes(), b"short", TEXT.to_pybytes()]
    (packet,) = one.encode(2, 1, 0, list(messages), squeezer("zstd"), ALL_FEATURES)
    assert packet.batch is not None
    assert packet.batch.nbytes < SIZE / 10
    header, body = two.decode(1, packet.metadata, packet.batch)
    assert header.messages == 3
    assert body.to_pybytes() == b"".join(messages)
    # Lengths that add up to more than a packet may hold are refused before anything is unpacked.
    bomb = bytearray(packet.metadata)
    struct.pack_into("<I", bomb, 72, 1 << 30)
    with pytest.raises(ProtocolError, match="are the most"):
        two.decode(1, bytes(bomb), packet.batch)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


@pytest.mark.parametrize("mode", ["lz4", "zstd", "off"])
@pytest.mark.parametrize("able", [True, False])
def test_peers_get_what_they_can_unpack(stack: contextlib.ExitStack, mode: str, able: bool) -> None:
    got: queue.SimpleQueue[list[Envelope]] = queue.SimpleQueue()
    one = FlightTransport("127.0.0.1:0", "c", 1, options=TransportOptions(compression=mode))
    two = FlightTransport("127.0.0.1:0", "c", 2)
    two._handshake.features &= ALL_FEATURES if able else 0
    for transport in (one, two):
        stack.callback(transport.stop, 5.0)
        transport.start(got.put)
    one.connect_to_peer(2, two.endpoint, timeout_s=DEADLINE_S)
    sent = append(TEXT.to_pybytes()[: TEXT.size // 64 * 64])
    assert one.send(2, [sent])
    batch = got.get(timeout=DEADLINE_S)[0].batch
    assert batch is not None
    assert batch.equals(sent.batch)
    one.send_message(2, TEXT)
    message = two.receive_message(DEADLINE_S)
    assert message is not None
    assert bytes(message) == TEXT.to_pybytes()
    counter = one.get_metrics_collector().get_counter
    assert (counter("bytes_before_compression") > 0) == (able and mode != "off")
    assert counter("bytes_after_compression") <= counter("bytes_before_compression") / 10


def test_modes_are_checked() -> None:
    with pytest.raises(UsageError, match="compression must be one of auto, off, lz4, zstd, not 'zip'"):
        TransportOptions(compression="zip")
