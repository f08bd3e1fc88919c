"""Parts put together: against a plain model, whatever order they come in; and what a hostile sender can do."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marble.errors import ProtocolError, UnavailableError
from marble.metrics import Metrics
from marble.transport import assembly as under_test
from marble.transport.assembly import FLOWS_MAX, Assemblies, Assembly
from marble.transport.codec import Codec, Packet
from marble.transport.handshake import Chunk
from marble.transport.parts import HELD_BYTES_MAX, PART_BYTES, Kind, Notice, PartsCodec

PATIENCE_S = 30.0
ONE, TWO = (PartsCodec(Codec("c", node, 1 << 30)) for node in (1, 2))
SMALL_PART, SMALL_HELD = 4, 40


def content(number: int, total: int) -> bytes:
    return bytes((31 * number + at) % 256 for at in range(total))


class Model:
    """What an assembly is, as plainly as can be."""

    def __init__(self) -> None:
        self.next = 0
        self.parts: dict[int, dict[int, bytes]] = {}
        self.totals: dict[int, int] = {}

    def put(self, number: int, offset: int, total: int, part: bytes) -> bool | None:
        """None where it must be refused."""
        if number < self.next:
            return False
        if number not in self.totals:
            if self.totals and sum(self.totals.values()) + total > SMALL_HELD:
                return None
            self.totals[number], self.parts[number] = total, {}
        if self.totals[number] != total:
            return None
        if offset in self.parts[number]:
            return False
        self.parts[number][offset] = part
        return True

    def take(self) -> bytes | None:
        """None if it is not whole."""
        parts = self.parts.get(self.next, {})
        if sum(map(len, parts.values())) != self.totals.get(self.next):
            return None
        del self.parts[self.next], self.totals[self.next]
        self.next += 1
        return b"".join(part for _, part in sorted(parts.items()))


totals = st.integers(1, 24)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 6), st.integers(0, 6), totals),
        st.tuples(st.just("take"), st.just(0), st.just(0), totals),
    ),
    max_size=80,
)


@given(usual=st.lists(totals, min_size=7, max_size=7), script=operations)
@settings(max_examples=300, deadline=None)
def test_assembly_is_its_model(usual: list[int], script: list[tuple[str, int, int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(under_test, "PART_BYTES", SMALL_PART)
        patch.setattr(under_test, "HELD_BYTES_MAX", SMALL_HELD)
        real, model = Assembly(), Model()
        for what, ahead, at, odd in script:
            number = model.next + ahead - 1
            if what == "put" and number >= 0:
                # Mostly the size that its other parts have, so that packets become whole.
                total = odd if odd == 24 else usual[number % 7]
                offset = SMALL_PART * (at % -(-total // SMALL_PART))
                part = content(number, total)[offset : offset + SMALL_PART]
                expected = model.put(number, offset, total, part)
                if expected is None:
                    with pytest.raises(ProtocolError):
                        real.put(number, offset, total, pa.py_buffer(part))
                else:
                    assert real.put(number, offset, total, pa.py_buffer(part)) == expected
            elif what == "take":
                total = model.totals.get(model.next, odd)
                whole = model.take()
                if whole is None:
                    with pytest.raises(UnavailableError):
                        real.take(model.next, total, 0.0)
                else:
                    assert real.take(model.next - 1, total, 0.0).to_pybytes() == whole
            assert real.held_bytes == sum(model.totals.values()) <= max([SMALL_HELD, *model.totals.values()])


# -- streams ---------------------------------------------------------------------------------------------------------------


FLOW = 77
TOTAL = 2 * PART_BYTES + 5
DATA = content(0, TOTAL)


def chunk(packet: Packet) -> Chunk:
    return pa.py_buffer(packet.metadata), packet.batch


def opening(flow: int = FLOW) -> Chunk:
    return chunk(ONE.encode(2, Notice(Kind.OPEN, flow)))


def stub(number: int, flow: int = FLOW, total: int = TOTAL) -> Chunk:
    return chunk(ONE.encode(2, Notice(Kind.METADATA, flow, number, 0, total)))


def part(number: int, at: int, flow: int = FLOW, data: bytes = DATA) -> Chunk:
    offset = at * PART_BYTES
    body = pa.py_buffer(data[offset : offset + PART_BYTES])
    return chunk(ONE.encode(2, Notice(Kind.PART, flow, number, offset, len(data)), b"", body))


def plain(word: bytes) -> Chunk:
    return pa.py_buffer(word), None


class Ends:
    """Both ends' words on streams between node 1 and this one, 2."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self.metrics = Metrics()
        self.assemblies = Assemblies(TWO, patience_s, self.metrics)
        self.answers: list[Notice] = []

    def say(self, metadata: bytes) -> bool:
        self.answers.append(ONE.decode(2, metadata)[0])
        return True

    def ordered(self, *chunks: Chunk) -> Iterator[Chunk]:
        return self.assemblies.ordered(1, iter(chunks), self.say)

    def fill(self, *chunks: Chunk) -> None:
        self.assemblies.fill(1, iter(chunks), self.say)


@pytest.fixture
def ends() -> Ends:
    return Ends()


def words(chunks: list[Chunk]) -> list[bytes]:
    return [b"" if metadata is None else metadata.to_pybytes() for metadata, _ in chunks]


def test_what_is_not_in_parts_goes_through_as_it_is(ends: Ends) -> None:
    chunks = [plain(b"a"), plain(b""), (None, None), plain(b"MBLP")]
    assert list(ends.ordered(*chunks)) == chunks
    assert ends.answers == []


def test_packets_come_in_the_order_of_their_stubs(ends: Ends) -> None:
    stream = ends.ordered(opening(), plain(b"a"), stub(0), plain(b"b"), stub(1), plain(b"c"))
    assert words([next(stream)]) == [b"a"]
    assert ends.answers == [Notice(Kind.OPEN, FLOW, 0, 0, HELD_BYTES_MAX)]
    other = content(1, TOTAL)
    # The second one is there before the first, and its last part before its first.
    ends.fill(
        part(1, 2, data=other), part(1, 0, data=other), part(1, 1, data=other), part(0, 1), part(0, 2), part(0, 0)
    )
    assert words(list(stream)) == [DATA, b"b", other, b"c"]
    assert [answer.number for answer in ends.answers if answer.kind is Kind.TAKEN] == [1, 2]
    assert sum(answer.kind is Kind.ARRIVED for answer in ends.answers) == 6
    # Nothing is kept of a stream that has ended.
    assert ends.assemblies._open == {}


def test_packet_is_taken_when_the_next_one_is_asked_for(ends: Ends) -> None:
    stream = ends.ordered(opening(), stub(0), plain(b"b"))
    filling = threading.Thread(target=lambda: words([next(stream)]))
    filling.start()
    while not ends.answers:
        threading.Event().wait(0.001)
    ends.fill(part(0, 0), part(0, 1), part(0, 2))
    filling.join(PATIENCE_S)
    assert ends.answers[-1].kind is Kind.ARRIVED
    assert words([next(stream)]) == [b"b"]
    assert ends.answers[-1] == Notice(Kind.TAKEN, FLOW, 1)


def test_parts_of_nobody_are_dropped_and_answered(ends: Ends) -> None:
    ends.fill(part(0, 0), chunk(ONE.encode(2, Notice(Kind.PART, 0))))
    assert [answer.kind for answer in ends.answers] == [Kind.ARRIVED]
    assert ends.metrics.total("transport_parts_dropped") == 1


def test_part_that_comes_twice_is_dropped(ends: Ends) -> None:
    stream = ends.ordered(opening(), plain(b"a"), stub(0))
    next(stream)
    ends.fill(part(0, 0), part(0, 0, data=content(9, TOTAL)), part(0, 1), part(0, 2))
    assert words(list(stream)) == [DATA]
    assert ends.metrics.total("transport_parts_dropped") == 1
    assert ends.metrics.total("transport_parts_received") == 3


def test_stream_whose_packet_does_not_come_ends() -> None:
    ends = Ends(patience_s=0.01)
    with pytest.raises(UnavailableError, match="no part has come"):
        list(ends.ordered(opening(), stub(0)))
    assert ends.assemblies._open == {}


def test_closing_lets_nobody_wait(ends: Ends) -> None:
    told: list[Exception] = []

    def read() -> None:
        try:
            list(ends.ordered(opening(), stub(0)))
        except UnavailableError as error:
            told.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    while not ends.answers:
        threading.Event().wait(0.001)
    ends.assemblies.close()
    reading.join(PATIENCE_S)
    assert "the node stops" in str(told)
    # And nothing begins any more: such a stream does without parts.
    assert words(list(ends.ordered(opening(), plain(b"a")))) == [b"a"]


@pytest.mark.parametrize(
    "chunks",
    [
        (stub(0),),
        (opening(), opening()),
        (opening(), stub(1)),
        (opening(), stub(0, flow=FLOW + 1)),
        (opening(), part(0, 0)),
        (opening(), chunk(ONE.encode(2, Notice(Kind.TAKEN, FLOW)))),
        (opening(), (pa.py_buffer(b"MBLS"), None)),
    ],
    ids=["no opening", "two openings", "wrong turn", "other flow", "part", "answer", "garbage"],
)
def test_what_has_no_place_on_a_stream_that_gives_an_order(ends: Ends, chunks: tuple[Chunk, ...]) -> None:
    with pytest.raises(ProtocolError):
        list(ends.ordered(*chunks))
    assert ends.assemblies._open == {}


@pytest.mark.parametrize(
    "bad", [stub(0), opening(), plain(b"x"), (None, None)], ids=["stub", "opening", "packet", "nothing"]
)
def test_what_has_no_place_on_a_stream_of_parts(ends: Ends, bad: Chunk) -> None:
    with pytest.raises(ProtocolError):
        ends.fill(bad)


def test_one_number_is_for_one_stream(ends: Ends) -> None:
    first = ends.ordered(opening(), plain(b"a"))
    next(first)
    with pytest.raises(ProtocolError, match="one number"):
        list(ends.ordered(opening()))
    # The first one is none the worse for it.
    assert list(first) == []
    assert ends.assemblies._open == {}


def test_there_are_only_so_many_at_once(ends: Ends) -> None:
    streams = [ends.ordered(opening(flow), plain(b"a"), plain(b"b")) for flow in range(FLOWS_MAX + 1)]
    for stream in streams:
        next(stream)
    # The last one is not told that it may send parts.
    assert [answer.flow for answer in ends.answers] == list(range(FLOWS_MAX))
    for stream in streams:
        list(stream)
    assert ends.assemblies._open == {}


def test_more_than_may_be_under_way_is_refused(ends: Ends) -> None:
    stream = ends.ordered(opening(), plain(b"a"))
    next(stream)
    large = HELD_BYTES_MAX // 2 + PART_BYTES

    def first_part(number: int) -> Chunk:
        return chunk(ONE.encode(2, Notice(Kind.PART, FLOW, number, 0, large), b"", pa.py_buffer(bytes(PART_BYTES))))

    ends.fill(first_part(0))
    with pytest.raises(ProtocolError, match="too much"):
        ends.fill(first_part(1))
    with pytest.raises(ProtocolError, match="another part"):
        ends.fill(part(0, 0))
    with pytest.raises(ProtocolError, match="too much"):
        ends.fill(part(2**63, 0))
    list(stream)


def test_stub_of_another_size_than_its_parts_is_refused(ends: Ends) -> None:
    stream = ends.ordered(opening(), plain(b"a"), stub(0, total=TOTAL + 1))
    next(stream)
    ends.fill(part(0, 0))
    with pytest.raises(ProtocolError, match="by its parts"):
        list(stream)


def test_stream_that_is_said_to_end_ends(ends: Ends) -> None:
    end = chunk(ONE.encode(2, Notice(Kind.END, 0)))
    assert words(list(ends.ordered(opening(), plain(b"a"), end, (None, None)))) == [b"a"]
    ends.fill(end, (None, None))


def test_caller_who_has_gone_ends_the_stream(ends: Ends) -> None:
    assert list(ends.assemblies.ordered(1, iter([opening(), plain(b"a")]), lambda _: False)) == []
    assert ends.assemblies._open == {}
    ends.assemblies.fill(1, iter([part(0, 0), (None, None)]), lambda _: False)
