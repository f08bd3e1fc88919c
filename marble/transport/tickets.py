"""Tickets: what a DoGet asks for.

A ticket is the bare name of a table, for all of it, or JSON with these keys, of which only the first must be there::

    {"table": name, "columns": [name, ...], "consistency": "linearizable" or "local",
     "lower": base64, "upper": base64, "reverse": true or false, "limit": n, "at_index": i}

``lower`` and ``upper`` bound the keys, ``lower <= key < upper``, as `marble._core.key_codec.KeyCodec` encodes them; null, like
no key at all, is no bound, no limit, the present state.

Rule 1: as in `marble.transport.wire`: bounded before it is parsed, every field checked, unknown keys refused.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from marble.errors import UsageError
from marble.requests import ScanRequest
from marble.schema import check_table_name
from marble.transport.wire import (
    TICKET_BYTES_MAX,
    check_consistency,
    check_names,
    check_whole,
    decode_object,
    encode_json,
)

BOUND_BYTES_MAX: Final = 256 * 1024
"""Of one end of a range of keys."""


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """Which rows of which table; ``request`` has no filter, which is the client's own business."""

    table: str
    request: ScanRequest


def encode_ticket(table: str, request: ScanRequest | None = None) -> bytes:
    """The ticket of a scan, for ``pyarrow.flight.Ticket``. The filter of `request` stays behind, and so must its limit then.

    Raises
    ------
    UsageError
        If a bound of the keys is too long.
    """
    request = request or ScanRequest()
    asked = {
        "table": table,
        "columns": None if request.columns is None else list(request.columns),
        "consistency": request.consistency,
        "lower": _encode_bound(request.lower),
        "upper": _encode_bound(request.upper),
        "reverse": request.reverse,
        "limit": None if request.filter is not None else request.limit,
        "at_index": request.at_index,
    }
    return encode_json({key: value for key, value in asked.items() if value is not None and value is not False})


def decode_ticket(data: bytes | pa.Buffer) -> Ticket:
    """The inverse of `encode_ticket`; the bare name of a table stands for all of it, linearizable.

    Raises
    ------
    UsageError
        If it is neither. Whether the table and the columns exist is for the caller to see.
    """
    data = bytes(data) if len(data) <= TICKET_BYTES_MAX else data
    if isinstance(data, bytes) and not data.lstrip().startswith(b"{"):
        return Ticket(check_table_name(data.decode("utf-8", "backslashreplace")), ScanRequest())
    optional = ("columns", "consistency", "lower", "upper", "reverse", "limit", "at_index")
    value = decode_object(data, "a ticket", TICKET_BYTES_MAX, ("table",), optional)
    columns, limit, at_index = value.get("columns"), value.get("limit"), value.get("at_index")
    reverse = value.get("reverse") or False
    if not isinstance(reverse, bool):
        raise UsageError("reverse of a ticket must be true or false")
    return Ticket(
        check_table_name(value["table"]),
        ScanRequest(
            columns=None if columns is None else check_names(columns, "columns of a ticket"),
            lower=_decode_bound(value.get("lower"), "lower of a ticket"),
            upper=_decode_bound(value.get("upper"), "upper of a ticket"),
            reverse=reverse,
            limit=None if limit is None else check_whole(limit, "limit of a ticket"),
            at_index=None if at_index is None else check_whole(at_index, "at_index of a ticket"),
            consistency=check_consistency(value.get("consistency", "linearizable")),
        ),
    )


def _encode_bound(bound: bytes | None) -> str | None:
    if bound is None:
        return None
    if len(bound) > BOUND_BYTES_MAX:
        raise UsageError(f"an end of a range of keys takes more than {BOUND_BYTES_MAX:,} bytes: use a shorter one")
    return base64.b64encode(bound).decode("ascii")


def _decode_bound(text: object, what: str) -> bytes | None:
    if text is None:
        return None
    wrong = UsageError(f"{what} must be base64 of at most {BOUND_BYTES_MAX:,} bytes")
    if not isinstance(text, str) or len(text) > 2 * BOUND_BYTES_MAX:
        raise wrong
    try:
        bound = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise wrong from None
    if len(bound) > BOUND_BYTES_MAX:
        raise wrong
    return bound
