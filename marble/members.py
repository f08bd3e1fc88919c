"""Who the members are and where they are reached, as the payload of a MEMBERSHIP entry or of a snapshot's description.

The payload holds one row, of `MEMBERS_SCHEMA`: the whole membership, not what changed.

Rule 1: a membership decides which majorities count, so nothing of it is taken that breaks a rule of `Members`; what a
peer or a disk gives is refused before anything of it is used.

Invariants:
- ``decode_members(encode_members(members, endpoints)) == (members, dict(endpoints))``.
- Equal arguments give equal bytes, in whatever order the endpoints are given: they are put in the order of their nodes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Final

import pyarrow as pa

from marble._core import entry_batch
from marble.errors import InvariantError, ProtocolError
from marble.types import MEMBERS_MAX, NODE_ID_MAX, Members

ENDPOINT_BYTES_MAX: Final = 512
"""A host name has at most 253 bytes, and a port follows it."""

_NODES: Final = pa.list_(pa.field("node", pa.uint32(), nullable=False))


def _column(name: str, type_: pa.DataType) -> pa.Field:
    return pa.field(name, type_, nullable=False)


MEMBERS_SCHEMA: Final = pa.schema(
    [
        _column("voters", _NODES),
        _column("outgoing", _NODES),
        _column("learners", _NODES),
        _column("learners_next", _NODES),
        _column("auto_leave", pa.bool_()),
        _column("nodes", _NODES),
        _column("endpoints", pa.list_(pa.field("endpoint", pa.string(), nullable=False))),
    ]
)
"""``nodes`` and ``endpoints`` belong together item by item: where each node is reached, for those that have an endpoint."""


def check_members(members: Members) -> None:
    """Raise ProtocolError, saying which rule, if `members` is no membership that a group can have.

    A group has at least one voter; the other rules are those of `Members`.
    """
    parts = {
        "voters": members.voters,
        "outgoing voters": members.outgoing,
        "learners": members.learners,
        "learners to be": members.learners_next,
    }
    for name, nodes in parts.items():
        if any(not 1 <= node <= NODE_ID_MAX for node in nodes):
            raise ProtocolError(f"{name} {nodes} are not all within 1 to {NODE_ID_MAX}")
        if any(node >= after for node, after in itertools.pairwise(nodes)):
            raise ProtocolError(f"{name} {nodes} do not ascend")
    if not members.voters:
        raise ProtocolError("a group without voters")
    if len(members.all) > MEMBERS_MAX:
        raise ProtocolError(f"a group of {len(members.all)} nodes where {MEMBERS_MAX} are allowed")
    voters, outgoing = set(members.voters), set(members.outgoing)
    if both := (voters | outgoing).intersection(members.learners):
        raise ProtocolError(f"nodes {sorted(both)} are learners and voters at once")
    if not outgoing.issuperset(members.learners_next) or voters.intersection(members.learners_next):
        raise ProtocolError(
            f"learners to be {members.learners_next} are not among those that are voters of the outgoing {members.outgoing} only"
        )
    if members.auto_leave and not members.joint:
        raise ProtocolError("a group that is not joint is to be left by itself")


def check_endpoints(members: Members, endpoints: Mapping[int, str]) -> None:
    """Raise ProtocolError if `endpoints` names a node that is no member, or has a text that can be no endpoint.

    Members may be without an endpoint: a group in one process has none at all.
    """
    if strangers := sorted(endpoints.keys() - set(members.all)):
        raise ProtocolError(f"endpoints for nodes {strangers}, which are no members")
    for node, endpoint in endpoints.items():
        size = len(endpoint.encode(errors="replace"))
        if (
            not 1 <= size <= ENDPOINT_BYTES_MAX
            or not endpoint.isascii()
            or not endpoint.isprintable()
            or " " in endpoint
        ):
            raise ProtocolError(f"the endpoint of node {node}, {endpoint[:80]!r}, is not like host:port")


def encode_members(members: Members, endpoints: Mapping[int, str]) -> pa.Buffer:
    """The payload that says who the members are.

    Parameters
    ----------
    members
        See `check_members`.
    endpoints
        ``host:port`` of members, by node.

    Raises
    ------
    InvariantError
        One of the rules is broken: who asked for such a membership should have been told before.
    """
    try:
        check_members(members)
        check_endpoints(members, endpoints)
    except ProtocolError as error:
        raise InvariantError(f"a membership that cannot be: {error}") from None
    nodes = sorted(endpoints)
    row = {
        "voters": members.voters,
        "outgoing": members.outgoing,
        "learners": members.learners,
        "learners_next": members.learners_next,
        "auto_leave": members.auto_leave,
        "nodes": nodes,
        "endpoints": [endpoints[node] for node in nodes],
    }
    arrays = [pa.array([row[field.name]], field.type) for field in MEMBERS_SCHEMA]
    return entry_batch.encode_payload(pa.record_batch(arrays, schema=MEMBERS_SCHEMA))


def decode_members(payload: pa.Buffer) -> tuple[Members, dict[int, str]]:
    """The members in a payload that `encode_members` made, and the endpoints of those that have one.

    Raises
    ------
    ProtocolError
        It is no such payload, or what it says breaks a rule.
    """
    batch = entry_batch.decode_payload(payload, MEMBERS_SCHEMA)
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ProtocolError(f"a damaged membership: {error}") from None
    if batch.num_rows != 1:
        raise ProtocolError(f"a membership of {batch.num_rows} rows")
    # A batch whose nulls contradict its schema passes for valid, so they are looked for here.
    row = batch.to_pylist()[0]
    values = [value for part in row.values() for value in (part if isinstance(part, list) else [part])]
    if None in row.values() or None in values:
        raise ProtocolError("a membership with a null")
    members = Members(
        voters=tuple(row["voters"]),
        outgoing=tuple(row["outgoing"]),
        learners=tuple(row["learners"]),
        learners_next=tuple(row["learners_next"]),
        auto_leave=row["auto_leave"],
    )
    nodes, texts = row["nodes"], row["endpoints"]
    if len(nodes) != len(texts) or any(node >= after for node, after in itertools.pairwise(nodes)):
        raise ProtocolError("endpoints that do not belong to their nodes one by one")
    endpoints = dict(zip(nodes, texts, strict=True))
    check_members(members)
    check_endpoints(members, endpoints)
    return members, endpoints
