"""Parsers of what else a stranger can send to a node's ports: tokens, proofs, users' messages, compressed packets, HTTP requests."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import pyarrow as pa
from fuzz.target import Finding, Target, batch_of, join, split, stream_of
from fuzz.wire_targets import ONE, TWO, _messages

from marble._core.checksum import xxh3_64
from marble._core.entry_batch import encode_payload
from marble._core.packing import MESSAGE_SCHEMA, unpack
from marble.config import HttpConfig
from marble.errors import ProtocolError, UnavailableError, UsageError
from marble.metrics import Metrics
from marble.transport.assembly import Assemblies
from marble.transport.compression import unwrap
from marble.transport.messages import PIECE_BYTES_MAX, MessageCodec
from marble.transport.parts import PART_BYTES, Kind, Notice, PartsCodec
from marble.transport.proof import CalleeProof, CallerProof, Secret
from marble.transport.tokens import parse_tokens
from marble.web.http import HttpServer, _Handler

# -- tokens --------------------------------------------------------------------------------------------------------------

_TOKENS = b"""
[tokens.etl]
token = "a token that is none"
access = "write"
tables = ["flights", "tmp_*"]
expires = 2027-01-31T00:00:00Z
[tokens.old]
sha256 = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"
access = "admin"
[certificates.reports]
name = "reports.example"
access = "read"
""".replace(b"a token that is none", b"a-token-that-opens-nothing")

# -- proofs --------------------------------------------------------------------------------------------------------------

_SECRET = Secret(b"s" * 32)


def _proofs() -> list[bytes]:
    hello = CallerProof(_SECRET).hello(ONE.hello(2, "host:5001", 77))
    callee = CalleeProof(_SECRET)
    callee.take_hello(hello)
    return [join(hello, callee.answer(TWO.hello(1)))]


def _parse_proof(data: bytes) -> None:
    """Both sides of what the other one says; that nothing false is believed is the business of `tests/transport`."""
    hello, answer = split(data, 2)
    callee = CalleeProof(_SECRET)
    plain = callee.take_hello(hello)
    callee.answer(plain)
    caller = CallerProof(_SECRET)
    caller.hello(hello)
    refused = 0
    for attempt in (lambda: caller.check_answer(answer, 2), lambda: callee.check_last_word(answer)):
        try:
            attempt()
        except ProtocolError:
            refused += 1
    if refused != 2:
        raise Finding("a proof that was made without the nonce of this stream is taken")


# -- users' messages -----------------------------------------------------------------------------------------------------

_MESSAGES_ONE, _MESSAGES_TWO = MessageCodec(ONE, 4 << 20), MessageCodec(TWO, 4 << 20)


def _user_messages() -> list[bytes]:
    packets = [
        *_MESSAGES_ONE.encode(2, 5, 0, [b"one", b"", b"three"]),
        *_MESSAGES_ONE.encode(2, 5, 3, [b"alone"]),
        *_MESSAGES_ONE.encode(2, 5, 4, []),
    ]
    return [join(each.metadata, b"" if each.batch is None else stream_of(each.batch)) for each in packets]


def _parse_user_messages(data: bytes) -> None:
    metadata, stream = split(data, 2)
    header, body = _MESSAGES_TWO.decode(1, metadata, batch_of(stream) if stream else None)
    assert body.size <= PIECE_BYTES_MAX
    if header.offset == 0 and header.total == body.size:
        messages = unpack(body, header.lengths, 1)
        assert sum(len(bytes(each)) for each in messages) == body.size


def _mend_user_messages(data: bytes) -> bytes:
    metadata, stream = split(data, 2)
    batch = batch_of(stream) if stream else None
    body = b""
    if batch is not None and batch.schema.equals(MESSAGE_SCHEMA):
        values = batch.column(0).buffers()[1]
        body = b"" if values is None else values.to_pybytes()[batch.column(0).offset :][: batch.num_rows]
    if len(metadata) >= 16:
        metadata = metadata[:8] + struct.pack("<Q", xxh3_64(metadata[16:], xxh3_64(body))) + metadata[16:]
    return join(metadata, stream)


# -- packets in parts ----------------------------------------------------------------------------------------------------

_PARTS_ONE, _PARTS_TWO = PartsCodec(ONE), PartsCodec(TWO)
_FLOW, _CHUNKS = 5, 6


def _chunks() -> list[bytes]:
    """Only last parts: the others are too large for this."""
    last = PART_BYTES, PART_BYTES + 10
    stub = Notice(Kind.BYTES, _FLOW, 0, 0, last[1]), b"metadata", b""
    parts = [
        (Notice(Kind.PART, _FLOW, 0, *last), b"", b"0123456789"),
        (Notice(Kind.PART, _FLOW, 1, *last), b"", b"abcdefghij"),
        (Notice(Kind.PART, 0), b"", b""),
        (Notice(Kind.PART, _FLOW, 0, *last), b"", b"0123456789"),
        (Notice(Kind.PART, _FLOW + 1, 0, *last), b"", b"0123456789"),
    ]
    made = [_PARTS_ONE.encode(2, notice, rest, pa.py_buffer(part)) for notice, rest, part in (stub, *parts)]
    whole = [join(each.metadata, b"" if each.batch is None else stream_of(each.batch)) for each in made]
    return [join(*whole), join(join(b"packet", b""), *whole[:0:-1])]


def _parse_chunks(data: bytes) -> None:
    """One chunk on the stream that gives the order, the others on streams of parts. Nothing is kept when it has ended."""
    assemblies = Assemblies(_PARTS_TWO, 0.0, Metrics())
    answers: list[bytes] = []
    opening = _PARTS_ONE.encode(2, Notice(Kind.OPEN, _FLOW)).metadata
    first, *others = [_chunk(chunk) for chunk in split(data, _CHUNKS)]
    order = iter([(pa.py_buffer(opening), None), (pa.py_buffer(b"packet"), None), first])
    taken = assemblies.ordered(1, order, lambda answer: answers.append(answer) is None)
    next(taken)
    refused = None
    for chunk in others:
        try:
            assemblies.fill(1, iter([chunk]), lambda answer: answers.append(answer) is None)
        except ProtocolError as error:
            refused = error
    try:
        for metadata, _ in taken:
            assert metadata is None or bytes(memoryview(metadata)[:4]) != b"MBLS"
    except UnavailableError:
        pass  # A packet did not come whole: this ends its stream, and is what it should be.
    finally:
        assert assemblies._open == {}
    for answer in answers:
        _PARTS_ONE.decode(2, answer)
    if refused is not None:
        raise refused


def _chunk(data: bytes) -> tuple[pa.Buffer, pa.RecordBatch | None]:
    metadata, stream = split(data, 2)
    return pa.py_buffer(metadata), batch_of(stream) if stream else None


def _mend_chunks(data: bytes) -> bytes:
    return join(*(_mend_user_messages(chunk) for chunk in split(data, _CHUNKS)))


# -- compressed packets --------------------------------------------------------------------------------------------------


def _compressed() -> list[bytes]:
    found = []
    for number, name in ((1, "lz4_raw"), (2, "zstd")):
        (packet,) = ONE.encode(2, [_messages()[0]])
        body = encode_payload(packet.batch)
        squeezed = pa.Codec(name).compress(body, asbytes=True)
        head = struct.pack("<4sHHQII", b"MBLZ", 1, number, body.size, len(packet.metadata), 0)
        found.append(head + packet.metadata + squeezed)
    return found


def _parse_compressed(data: bytes) -> None:
    packet = unwrap(data, None, 1 << 20)
    TWO.decode(1, packet.metadata, packet.batch)


# -- HTTP ----------------------------------------------------------------------------------------------------------------


class _Connection:
    """A socket of which everything has arrived, and that keeps what is answered."""

    def __init__(self, data: bytes) -> None:
        self.answer = b""
        self._data = data

    def makefile(self, *_: object, **__: object) -> io.BytesIO:
        return io.BytesIO(self._data)

    def sendall(self, data: bytes) -> None:
        self.answer += bytes(data)

    def settimeout(self, _: object) -> None:
        """It never waits."""


class _Nobody:
    """An observer of no node, whose health is nothing and whose metrics nobody may read."""

    node_id = 1
    metrics = Metrics()

    def health(self) -> dict[str, Any]:
        return {}


@cache
def _http() -> Any:
    return HttpServer(_Nobody(), HttpConfig("127.0.0.1:0"), lambda header: False)._listener


def _parse_request(data: bytes) -> None:
    connection = _Connection(data)
    _Handler(connection, ("127.0.0.1", 1), _http())
    status = connection.answer.partition(b" ")[2][:3]
    # To an empty line there is nothing to say.
    if data.partition(b"\n")[0].decode("latin-1").split() and not status.isdigit():
        raise Finding(f"a request has no answer: {connection.answer[:80]!a}")
    if int(status or 500) >= 400 and int(status or 500) not in (401, 404, 503):
        raise UsageError("refused")


PORT_TARGETS: Sequence[Target] = (
    Target("packets in parts", _chunks, _parse_chunks, (ProtocolError,), _mend_chunks),
    Target("tokens", lambda: [_TOKENS], lambda data: parse_tokens(data.decode(errors="replace")), (UsageError,)),
    Target("proof", _proofs, _parse_proof, (ProtocolError,)),
    Target("messages", _user_messages, _parse_user_messages, (ProtocolError,), _mend_user_messages),
    Target("compressed", _compressed, _parse_compressed, (ProtocolError,)),
    Target(
        "request",
        lambda: [
            b"GET /healthz HTTP/1.1\r\nHost: localhost:1\r\n\r\n",
            b"GET /api/status?after=3.5 HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer x\r\nAccept: */*\r\n\r\n",
            b"HEAD /metrics HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        ],
        _parse_request,
        (UsageError,),
    ),
)
