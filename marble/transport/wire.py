"""What clients and the tables service say to each other beside Arrow batches: acks, tickets, tables, headers.

Rule 1: everything decoded here came from a stranger. It is bounded before it is parsed, every field is checked, and
whatever is wrong is one error that says what was expected; nothing is evaluated, and unknown keys are refused.

All of it is UTF-8 JSON, so that a Flight client in any language can speak it:

- an ack (``app_metadata``, one for each batch written, in order; a DoExchange may answer several
  batches by a list of them): ``{"index": i, "term": t, "value": rows}``, or
  ``{"error": code, "message": text, "leader": "host:port" or null}`` with a code of `marble.errors.ERROR_CODES`;
- a stamp (``app_metadata`` of a batch that is written, or the header `STAMP_HEADER` of an action that changes
  something): ``{"session": s, "sequence": q}``, which makes it take effect once, however often it is sent;
- a ticket (``DoGet``): see `marble.transport.tickets`;
- a table: ``{"id": i, "name": name, "key": [name, ...], "schema": base64 of the schema as an IPC message, "options": o}``,
  where each option that is as usual may be left out: ``{"compression": "lz4" or "zstd", "ttl_column": name,
  "ttl_us": n, "ttl_stamped": true, "merge": {column: operator, ...}}``.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.flight as flight

from marble.errors import ERROR_CODES, InvariantError, MarbleError, NotLeaderError, ProtocolError, UsageError
from marble.schema import COLUMN_NAME_BYTES_MAX, COLUMNS_MAX, TableInfo, check_table
from marble.table_options import DEFAULT_OPTIONS, TableOptions, check_options
from marble.transport.channel import CHANNEL_OPTIONS
from marble.transport.security import PLAIN, Credentials
from marble.types import INDEX_MAX

ACK_BYTES_MAX: Final = 64 * 1024
ACKS_MAX: Final = 256
"""Acks in one message."""
STAMP_BYTES_MAX: Final = 256
TICKET_BYTES_MAX: Final = 2 * 1024 * 1024
"""Names of `COLUMNS_MAX` columns, escaped, and two ends of a range of keys fit."""
TABLE_BYTES_MAX: Final = 8 * 1024 * 1024
"""The definition of one table as JSON: a schema of as many fields as a table may have fits."""
TABLES_BYTES_MAX: Final = 256 * 1024 * 1024
"""The whole catalog as JSON, as a client accepts it from a server."""
MESSAGE_CHARACTERS_MAX: Final = 2000
"""Longer texts of errors are cut: some quote what a caller sent."""

_OPTIONS: Final = {"compression": str, "ttl_column": str, "ttl_us": int, "ttl_stamped": bool}

CONSISTENCIES: Final = ("linearizable", "local")

FORWARD_HEADER: Final = "marble-forward"
"""gRPC header of a call. ``never``: answer NotLeaderError, do not forward. Forwarded calls carry it themselves."""
FORWARD_NEVER: Final = "never"
STAMP_HEADER: Final = "marble-stamp"
"""gRPC header of a DoAction: the stamp of what it changes."""

UPSERT: Final = "upsert"
DELETE: Final = "delete"
GET: Final = "get"
"""What a descriptor's path ``[table, verb]`` asks for. DoPut: UPSERT (or no verb) and DELETE; DoExchange: all three."""


@dataclass(frozen=True, slots=True)
class Ack:
    """The answer to one batch. Either ``error_code`` is None and the rest is set, or it is a code of `ERROR_CODES`.

    Attributes
    ----------
    index, term
        Where in the log the batch's entry stands, committed and durable.
    value
        Rows that the entry wrote or deleted.
    leader
        With ``not_leader``: endpoint of the leader as far as the answering node knows.
    """

    index: int = 0
    term: int = 0
    value: int = 0
    error_code: str | None = None
    message: str = ""
    leader: str | None = None

    @classmethod
    def of_error(cls, error: MarbleError) -> Ack:
        """The ack that makes a client raise `error`."""
        leader = error.leader if isinstance(error, NotLeaderError) else None
        return cls(error_code=error.code, message=str(error), leader=leader)

    def error(self) -> MarbleError | None:
        """The error that this ack stands for, or None."""
        if self.error_code is None:
            return None
        kind = ERROR_CODES.get(self.error_code, InvariantError)
        return NotLeaderError(self.message, self.leader) if issubclass(kind, NotLeaderError) else kind(self.message)

    def raise_for_error(self) -> Ack:
        """Return this ack, or raise the error that it stands for."""
        error = self.error()
        if error is not None:
            raise error
        return self


@dataclass(frozen=True, slots=True)
class Stamp:
    """Which write this is: number ``sequence`` of the session that the action "open_session" gave. Both are 1 or more.

    What carries a stamp takes effect once, however often and wherever it is sent: a repeat gets the first answer.
    """

    session: int
    sequence: int


def encode_json(value: object) -> bytes:
    """`value` as compact UTF-8 JSON."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "backslashreplace")


def decode_json(data: bytes | pa.Buffer, what: str, bytes_max: int) -> Any:
    """Parse bounded JSON from a stranger.

    Raises
    ------
    UsageError
        If it is longer than `bytes_max` or is not JSON.
    """
    size = data.size if isinstance(data, pa.Buffer) else len(data)
    if size > bytes_max:
        raise UsageError(f"{what} has {size} bytes, more than {bytes_max}")
    try:
        return json.loads(bytes(data).decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what} is not JSON in UTF-8: {str(error)[:200]}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def decode_object(
    data: bytes | pa.Buffer, what: str, bytes_max: int, required: Iterable[str], optional: Iterable[str] = ()
) -> dict[str, Any]:
    """Parse a bounded JSON object that has all `required` keys, and beside them only `optional` ones.

    Raises
    ------
    UsageError
        Naming the key that is missing or unknown.
    """
    return check_object(decode_json(data, what, bytes_max), what, required, optional)


def check_object(value: object, what: str, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Any]:
    """Return `value` if it is an object with all `required` keys and beside them only `optional` ones, else UsageError."""
    required, optional = tuple(required), tuple(optional)
    if not isinstance(value, dict):
        raise UsageError(f"{what} must be a JSON object with {_listed(required + optional)}, not a {_kind(value)}")
    for key in required:
        if key not in value:
            raise UsageError(f"{what} has no {key!r}")
    for key in value:
        if key not in required and key not in optional:
            raise UsageError(f"{what} has an unknown key {key[:80]!r}: it knows {_listed(required + optional)}")
    return value


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _kind(value: object) -> str:
    return {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")


def check_whole(value: object, what: str) -> int:
    """Return `value` if it is a whole number from 0 that fits the log, else raise UsageError."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= INDEX_MAX:
        raise UsageError(f"{what} must be a whole number from 0, not {str(value)[:80]!r}")
    return value


def check_consistency(value: object) -> str:
    """Return `value` if it names a consistency, else raise UsageError."""
    if value not in CONSISTENCIES:
        raise UsageError(f"consistency must be one of {_listed(CONSISTENCIES)}, not {str(value)[:80]!r}")
    return str(value)


def encode_ack(ack: Ack) -> bytes:
    """The ``app_metadata`` that answers one batch."""
    return encode_json(_ack_to_json(ack))


def encode_acks(acks: Sequence[Ack]) -> bytes:
    """The ``app_metadata`` that answers 1 to `ACKS_MAX` batches in a row."""
    return encode_ack(acks[0]) if len(acks) == 1 else encode_json([_ack_to_json(ack) for ack in acks])


def _ack_to_json(ack: Ack) -> dict[str, Any]:
    if ack.error_code is None:
        return {"index": ack.index, "term": ack.term, "value": ack.value}
    return {"error": ack.error_code, "message": ack.message[:MESSAGE_CHARACTERS_MAX], "leader": ack.leader}


def decode_ack(data: bytes | pa.Buffer) -> Ack:
    """The inverse of `encode_ack`.

    Raises
    ------
    ProtocolError
        If it is not one ack.
    """
    (ack,) = decode_acks(data, 1)
    return ack


def decode_acks(data: bytes | pa.Buffer, count_max: int = ACKS_MAX) -> list[Ack]:
    """The inverse of `encode_acks`.

    Raises
    ------
    ProtocolError
        If it is not an ack, or a list of 1 to `count_max`.
    """
    value = _from_server(data, "an ack", ACK_BYTES_MAX)
    if not isinstance(value, list):
        return [_ack_from_json(value)]
    if not 1 <= len(value) <= count_max:
        raise ProtocolError(f"{len(value)} acks in a message that may have 1 to {count_max}")
    return [_ack_from_json(each) for each in value]


def _ack_from_json(value: object) -> Ack:
    names = ("index", "term", "value", "error", "message", "leader")
    try:
        fields = check_object(value, "an ack", (), names)
        if "error" not in fields:
            index, term, rows = (check_whole(fields.get(name), f"{name} of an ack") for name in names[:3])
            return Ack(index, term, rows)
    except UsageError as error:
        raise ProtocolError(str(error)) from None
    code, message, leader = fields["error"], fields.get("message", ""), fields.get("leader")
    if not (isinstance(code, str) and isinstance(message, str) and isinstance(leader, str | None)):
        raise ProtocolError("an ack's error, message and leader must be strings")
    # A code that this version does not know is still an error.
    return Ack(error_code=code if code in ERROR_CODES else InvariantError.code, message=message, leader=leader)


def encode_stamp(stamp: Stamp) -> bytes:
    """`stamp` as JSON."""
    return b'{"session":%d,"sequence":%d}' % (stamp.session, stamp.sequence)


def decode_stamp(data: bytes | pa.Buffer) -> Stamp:
    """The inverse of `encode_stamp`.

    Raises
    ------
    UsageError
        If it is not that.
    """
    value = decode_object(data, "a stamp", STAMP_BYTES_MAX, ("session", "sequence"))
    return Stamp(*(check_number(value[name], f"{name} of a stamp") for name in ("session", "sequence")))


def check_number(value: object, what: str) -> int:
    """Return `value` if it is a whole number from 1 that fits the log, else raise UsageError."""
    if not check_whole(value, what):
        raise UsageError(f"{what} must be 1 or more")
    return int(value)  # type: ignore[call-overload, no-any-return]


def check_names(value: object, what: str) -> tuple[str, ...]:
    """Return `value` as a tuple of names of columns (which need not exist), else raise UsageError."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UsageError(f"{what} must be a list of names, not a {_kind(value)}")
    if not 1 <= len(value) <= COLUMNS_MAX:
        raise UsageError(f"{what} must be 1 to {COLUMNS_MAX} names, not {len(value)}")
    for name in value:
        if len(name) > COLUMN_NAME_BYTES_MAX:
            raise UsageError(f"{what}: {name[:80]!r}... is longer than {COLUMN_NAME_BYTES_MAX} bytes")
    return tuple(value)


def encode_schema(schema: pa.Schema) -> str:
    """`schema` as base64 of an IPC message, as it stands in JSON."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode("ascii")


def decode_schema(text: object) -> pa.Schema:
    """The inverse of `encode_schema`.

    Raises
    ------
    UsageError
        If it is not that.
    """
    if not isinstance(text, str) or len(text) > TABLE_BYTES_MAX:
        raise UsageError("a schema must be base64 of an IPC message: base64.b64encode(schema.serialize())")
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text, validate=True)))
    except (binascii.Error, pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(f"a schema must be base64 of an IPC message: {str(error)[:200]}") from None
    return check_texts(schema)


def check_texts(schema: pa.Schema) -> pa.Schema:
    """Return `schema`, which a stranger sent, if all names in it are texts. Arrow takes any bytes, and raises at the first look at them.

    Raises
    ------
    UsageError
        If a name of a column or of a nested field, or a time zone, is not UTF-8, or not fit to be shown.
    """
    try:
        _look_at(schema)
    except UnicodeDecodeError as error:
        raise UsageError(f"names in a schema must be UTF-8: {error}") from None
    return schema


def _look_at(fields: Iterable[pa.Field]) -> None:
    for field in fields:
        type_ = field.type
        for text in (field.name, getattr(type_, "tz", None) or ""):
            if not text.isprintable():
                raise UsageError(f"a name in a schema has characters that cannot be shown: {text[:80]!a}")
        if isinstance(type_, pa.DictionaryType):
            type_ = type_.value_type
        _look_at(type_.field(i) for i in range(type_.num_fields))


def options_to_json(options: TableOptions) -> dict[str, Any]:
    """`options` as an object of JSON, without what is as usual."""
    values = {
        name: getattr(options, name) for name in _OPTIONS if getattr(options, name) != getattr(DEFAULT_OPTIONS, name)
    }
    return {**values, "merge": dict(options.merge)} if options.merge else values


def options_from_json(value: object, schema: pa.Schema) -> TableOptions:
    """The inverse of `options_to_json`, for a table of `schema`; `marble.table_options.check_options` is still to come.

    Raises
    ------
    UsageError
        If it is not that.
    """
    given = dict(check_object(value, "options of a table", (), (*_OPTIONS, "merge")))
    merge = check_object(given.pop("merge", {}), "merge operators", (), schema.names)
    for name, type_ in _OPTIONS.items():
        if type(given.get(name, getattr(DEFAULT_OPTIONS, name))) not in (type_, type(getattr(DEFAULT_OPTIONS, name))):
            raise UsageError(f"option {name} of a table must be a {type_.__name__}")
    if not all(isinstance(operator, str) for operator in merge.values()):
        raise UsageError("a merge operator must be a str")
    return TableOptions(**given, merge=tuple((column, merge[column]) for column in schema.names if column in merge))


def table_to_json(table: TableInfo) -> dict[str, Any]:
    """`table` as an object of JSON."""
    return {
        "id": table.id,
        "name": table.name,
        "key": list(table.key),
        "schema": encode_schema(table.schema),
        "options": options_to_json(table.options),
    }


def table_from_json(value: object) -> TableInfo:
    """The inverse of `table_to_json`.

    Raises
    ------
    ProtocolError
        If it is not the description of a table that can exist.
    """
    if not isinstance(value, Mapping) or not value.keys() >= {"id", "name", "key", "schema", "options"}:
        raise ProtocolError("a table must have id, name, key, schema and options")
    try:
        schema, key = check_table(value["name"], decode_schema(value["schema"]), value["key"])
        options = options_from_json(value["options"], schema)
        check_options(value["name"], schema, key, options)
        return TableInfo(check_whole(value["id"], "id of a table"), value["name"], schema, key, options)
    except UsageError as error:
        raise ProtocolError(f"a table that cannot exist: {error}") from None


def encode_table_info(table: TableInfo) -> bytes:
    """`table` as JSON."""
    return encode_json(table_to_json(table))


def decode_table_info(data: bytes | pa.Buffer) -> TableInfo:
    """The inverse of `encode_table_info`; raises ProtocolError."""
    return table_from_json(_from_server(data, "a table", TABLE_BYTES_MAX))


def encode_tables(tables: Iterable[TableInfo]) -> bytes:
    """A catalog as JSON: a list of tables."""
    return encode_json([table_to_json(table) for table in tables])


def decode_tables(data: bytes | pa.Buffer) -> list[TableInfo]:
    """The inverse of `encode_tables`; raises ProtocolError."""
    value = _from_server(data, "a list of tables", TABLES_BYTES_MAX)
    if not isinstance(value, list):
        raise ProtocolError("a list of tables must be a list")
    return [table_from_json(each) for each in value]


def _from_server(data: bytes | pa.Buffer, what: str, bytes_max: int) -> Any:
    try:
        return decode_json(data, what, bytes_max)
    except UsageError as error:
        raise ProtocolError(str(error)) from None


def connect(endpoint: str, credentials: Credentials = PLAIN) -> flight.FlightClient:
    """A Flight client of the node at `endpoint` (``host:port``). Connects with its first call, and again if it must."""
    return credentials.client(endpoint, CHANNEL_OPTIONS)


def call_options(
    timeout_s: float | None,
    *,
    forward: bool = True,
    stamp: Stamp | None = None,
    authority: Sequence[tuple[bytes, bytes]] = (),
) -> flight.FlightCallOptions:
    """Options of one call.

    Parameters
    ----------
    timeout_s
        Deadline of the whole call, streams included, in seconds; None: no deadline.
    forward
        False: a node that does not lead answers NotLeaderError instead of forwarding the call.
    stamp
        Of what an action changes.
    authority
        Headers of the client on whose behalf a node calls (`marble.transport.admission.authority`).
    """
    headers = [*authority] if forward else [*authority, (FORWARD_HEADER.encode(), FORWARD_NEVER.encode())]
    if stamp is not None:
        headers.append((STAMP_HEADER.encode(), encode_stamp(stamp)))
    return flight.FlightCallOptions(timeout=timeout_s, headers=headers)


class CallHeaders(flight.ServerMiddleware):  # type: ignore[misc]
    """What the headers of one call ask for.

    Attributes
    ----------
    forward
        Whether this node may forward the call to the leader.
    stamps
        What came in the header `STAMP_HEADER`, unread.
    """

    KEY: Final = "marble-call"
    """Under which the server registers `CallHeadersFactory`, and a handler finds this in its context."""

    def __init__(self, forward: bool, stamps: Sequence[str] = ()) -> None:
        self.forward = forward
        self.stamps = tuple(stamps)

    def stamp(self) -> Stamp | None:
        """The stamp of the call, if it has one. Raises UsageError if it is none, or there are several."""
        if len(self.stamps) > 1:
            raise UsageError(f"the header {STAMP_HEADER} stands {len(self.stamps)} times in one call")
        return decode_stamp(self.stamps[0].encode("utf-8", "backslashreplace")) if self.stamps else None


class CallHeadersFactory(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Reads the headers of every call that a server takes."""

    def start_call(self, info: Any, headers: Mapping[str, Sequence[str]]) -> CallHeaders:
        def named(wanted: str) -> list[str]:
            return [value for name, values in headers.items() if name.lower() == wanted for value in values]

        return CallHeaders(FORWARD_NEVER not in named(FORWARD_HEADER), named(STAMP_HEADER))
