"""What comes back from the wire is what was sent, or one error that says what was wrong."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.flight as flight
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marble.errors import (
    ERROR_CODES,
    InvariantError,
    MarbleError,
    NotLeaderError,
    ProtocolError,
    UnavailableError,
    UsageError,
)
from marble.requests import ScanRequest
from marble.schema import TableInfo
from marble.table_options import TableOptions
from marble.transport import tickets, wire
from marble.types import INDEX_MAX

TABLE = TableInfo(7, "t", pa.schema([("a", pa.int64()), ("b", pa.list_(pa.string()))]), ("a",))
KEPT = TableOptions("zstd", "a", 5, False, (("b", "append"),))


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**31))
def test_ack_comes_back(index: int, term: int, value: int) -> None:
    ack = wire.Ack(index, term, value)
    assert wire.decode_ack(wire.encode_ack(ack)) == ack
    assert ack.raise_for_error() is ack


@pytest.mark.parametrize("kind", ERROR_CODES.values())
@given(message=st.text(max_size=100))
def test_ack_of_error_raises_the_same_error(kind: type[MarbleError], message: str) -> None:
    ack = wire.decode_ack(pa.py_buffer(wire.encode_ack(wire.Ack.of_error(kind(message)))))
    with pytest.raises(kind) as caught:
        ack.raise_for_error()
    assert type(caught.value) is kind
    assert str(caught.value) == message


def test_ack_of_not_leader_names_the_leader() -> None:
    ack = wire.decode_ack(wire.encode_ack(wire.Ack.of_error(NotLeaderError("not me", "h:1"))))
    with pytest.raises(NotLeaderError) as caught:
        ack.raise_for_error()
    assert caught.value.leader == "h:1"


def test_ack_is_bounded_whatever_the_message() -> None:
    encoded = wire.encode_ack(wire.Ack.of_error(UnavailableError("\U0001f600" * 100_000)))
    assert len(encoded) < wire.ACK_BYTES_MAX
    assert wire.decode_ack(encoded).error_code == "unavailable"


def test_ack_with_unknown_code_is_still_an_error() -> None:
    ack = wire.decode_ack(b'{"error":"of a later version","message":"m"}')
    with pytest.raises(InvariantError, match="m"):
        ack.raise_for_error()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"index":1,"term":1}',
        b'{"index":-1,"term":1,"value":1}',
        b'{"index":1.5,"term":1,"value":1}',
        b'{"index":true,"term":1,"value":1}',
        b'{"index":1e400,"term":1,"value":1}',
        b'{"index":NaN,"term":1,"value":1}',
        b'{"index":9223372036854775808,"term":1,"value":1}',
        b'{"error":1}',
        b'{"error":"usage","leader":{}}',
        b'{"index":1,"term":1,"value":1,"more":1}',
        b"[" * 100_000,
        b"9" * 60_000,
        b" " * (wire.ACK_BYTES_MAX + 1),
    ],
)
def test_ack_that_is_none_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_ack(data)


def told(ticket: tickets.Ticket) -> tuple[Any, ...]:
    return ticket.table, *(getattr(ticket.request, name) for name in ticket.request.__slots__)


@given(
    st.lists(st.text(min_size=1, max_size=20), min_size=1) | st.none(),
    st.sampled_from(wire.CONSISTENCIES),
    st.tuples(st.binary() | st.none(), st.binary() | st.none()),
    st.booleans(),
    st.integers(0, INDEX_MAX) | st.none(),
    st.integers(0, INDEX_MAX) | st.none(),
)
def test_ticket_comes_back(
    columns: list[str] | None,
    consistency: str,
    bounds: tuple[bytes | None, bytes | None],
    reverse: bool,
    limit: int | None,
    at_index: int | None,
) -> None:
    names = None if columns is None else tuple(columns)
    request = ScanRequest(names, None, *bounds, reverse, limit, at_index, consistency)
    ticket = tickets.decode_ticket(tickets.encode_ticket("t", request))
    assert told(ticket) == told(tickets.Ticket("t", request))


def test_a_limit_stays_behind_with_its_filter() -> None:
    request = ScanRequest(filter=pc.field("a") > 1, limit=3)
    assert tickets.decode_ticket(tickets.encode_ticket("t", request)).request.limit is None


def test_a_bound_that_is_too_long_is_not_sent() -> None:
    fits = ScanRequest(lower=bytes(tickets.BOUND_BYTES_MAX), upper=bytes(tickets.BOUND_BYTES_MAX))
    assert told(tickets.decode_ticket(tickets.encode_ticket("t", fits))) == told(tickets.Ticket("t", fits))
    with pytest.raises(UsageError, match="more than 262,144 bytes"):
        tickets.encode_ticket("t", ScanRequest(upper=bytes(tickets.BOUND_BYTES_MAX + 1)))


def test_ticket_may_be_a_bare_name() -> None:
    assert told(tickets.decode_ticket(b"flights")) == told(tickets.Ticket("flights", ScanRequest()))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "name of a table"),
        (b"../x", "name of a table"),
        (b"\xff\xfe", "name of a table"),
        (b"{", "not JSON"),
        (b'{"table":"../x"}', "name of a table"),
        (b'{"table":1}', "name of a table"),
        (b'{"tabel":"t"}', "no 'table'"),
        (b'{"table":"t","column":["a"]}', "unknown key 'column'"),
        (b'{"table":"t","columns":"a"}', "list of names"),
        (b'{"table":"t","columns":[]}', "1 to 1024"),
        (b'{"table":"t","columns":[1]}', "list of names"),
        (b'{"table":"t","columns":["' + b"x" * 300 + b'"]}', "longer than 256"),
        (b'{"table":"t","consistency":"eventual"}', "'linearizable', 'local'"),
        (b'{"table":"t","consistency":[]}', "'linearizable', 'local'"),
        (b'{"table":"t","lower":1}', "lower of a ticket must be base64"),
        (b'{"table":"t","upper":"?"}', "upper of a ticket must be base64"),
        (b'{"table":"t","upper":"' + b"AAAA" * 90_000 + b'"}', "at most 262,144 bytes"),
        (b'{"table":"t","reverse":1}', "true or false"),
        (b'{"table":"t","limit":-1}', "whole number from 0"),
        (b'{"table":"t","limit":true}', "whole number from 0"),
        (b'{"table":"t","at_index":1.5}', "whole number from 0"),
        (b"{" + b" " * wire.TICKET_BYTES_MAX, "more than"),
    ],
)
def test_ticket_that_is_none_is_a_usage_error(data: bytes, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        tickets.decode_ticket(data)


def test_tables_come_back() -> None:
    for table in (TABLE, dataclasses.replace(TABLE, options=KEPT)):
        assert wire.decode_table_info(wire.encode_table_info(table)) == table
    assert wire.decode_tables(pa.py_buffer(wire.encode_tables([TABLE, TABLE]))) == [TABLE, TABLE]


def _broken_tables() -> Iterator[bytes]:
    good = json.loads(wire.encode_table_info(TABLE))
    for key in good:
        yield json.dumps({name: value for name, value in good.items() if name != key}).encode()
        yield json.dumps(good | {key: None}).encode()
    schema = bytearray(base64.b64decode(good["schema"]))
    yield json.dumps(good | {"schema": base64.b64encode(schema[:-20]).decode()}).encode()
    yield json.dumps(good | {"schema": "$$"}).encode()
    yield json.dumps(good | {"key": ["b"]}).encode()
    for options in (
        {"x": 1},
        [],
        {"ttl_us": "5", "ttl_column": "a"},
        {"ttl_us": True, "ttl_column": "a"},
        {"ttl_us": 5},
        {"compression": 1},
        {"compression": "zip"},
        {"merge": {"b": 1}},
        {"merge": {"b": "sum"}},
        {"merge": {"c": "sum"}},
        {"merge": ["b"]},
    ):
        yield json.dumps(good | {"options": options}).encode()
    yield b"[]"
    yield b"{"


@pytest.mark.parametrize("data", list(_broken_tables()))
def test_table_that_cannot_exist_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_table_info(data)


def test_schema_with_any_byte_changed_gives_a_schema_or_a_usage_error() -> None:
    encoded = TABLE.schema.serialize().to_pybytes()
    for position in range(len(encoded)):
        damaged = bytearray(encoded)
        damaged[position] ^= 0x55
        try:
            found = wire.decode_schema(base64.b64encode(damaged).decode())
        except UsageError:
            continue
        assert isinstance(found, pa.Schema)


@pytest.mark.parametrize(
    ("headers", "forward"),
    [({}, True), ({"marble-forward": ["never"]}, False), ({"marble-forward": ["yes"]}, True), ({"x": ["never"]}, True)],
)
def test_header_decides_whether_a_call_is_forwarded(headers: dict[str, list[str]], forward: bool) -> None:
    assert wire.CallHeadersFactory().start_call(None, headers).forward is forward


def test_call_options_carry_the_header() -> None:
    assert wire.call_options(1.0, forward=False).headers == [(b"marble-forward", b"never")]
    assert isinstance(wire.call_options(None), flight.FlightCallOptions)


@given(st.integers(1, 2**63 - 1), st.integers(1, 2**63 - 1))
def test_stamp_comes_back(session: int, sequence: int) -> None:
    stamp = wire.Stamp(session, sequence)
    assert wire.decode_stamp(wire.encode_stamp(stamp)) == stamp
    assert wire.decode_stamp(pa.py_buffer(wire.encode_stamp(stamp))) == stamp


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not JSON"),
        (b"?", "not JSON"),
        (b"[1, 2]", "must be a JSON object"),
        (b'{"session":1}', "no 'sequence'"),
        (b'{"session":1,"sequence":1,"client":2}', "unknown key 'client'"),
        (b'{"session":0,"sequence":1}', "session of a stamp must be 1 or more"),
        (b'{"session":1,"sequence":0}', "sequence of a stamp must be 1 or more"),
        (b'{"session":1,"sequence":1.0}', "whole number"),
        (b'{"session":true,"sequence":1}', "whole number"),
        (b'{"session":9223372036854775808,"sequence":1}', "whole number"),
        (b'{"session":-1,"sequence":1}', "whole number"),
        (b'{"session":1,"sequence":' + b"1" * 300 + b"}", "more than 256"),
    ],
)
def test_stamp_that_is_none_is_a_usage_error(data: bytes, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        wire.decode_stamp(data)


def test_a_call_carries_its_stamp_in_a_header() -> None:
    stamp = wire.Stamp(7, 3)
    assert wire.call_options(1.0, stamp=stamp).headers == [(b"marble-stamp", b'{"session":7,"sequence":3}')]
    headers = {"Marble-Stamp": ['{"session":7,"sequence":3}']}
    assert wire.CallHeadersFactory().start_call(None, headers).stamp() == stamp
    assert wire.CallHeadersFactory().start_call(None, {}).stamp() is None


@pytest.mark.parametrize("values", [["x"], ['{"session":7,"sequence":3}'] * 2, ["\ud800"]])
def test_a_header_that_is_no_stamp_is_a_usage_error(values: list[str]) -> None:
    with pytest.raises(UsageError):
        wire.CallHeadersFactory().start_call(None, {"marble-stamp": values}).stamp()
