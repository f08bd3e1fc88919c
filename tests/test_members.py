"""Memberships as payloads: what is encoded comes back, and nothing that breaks a rule gets in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from marble._core import entry_batch
from marble.errors import InvariantError, MarbleError, ProtocolError
from marble.members import (
    ENDPOINT_BYTES_MAX,
    MEMBERS_SCHEMA,
    check_members,
    decode_members,
    encode_members,
)
from marble.types import MEMBERS_MAX, NODE_ID_MAX, Members

NODES = st.integers(1, NODE_ID_MAX) | st.integers(1, 9)


@st.composite
def memberships(draw: st.DrawFn) -> Members:
    """Any membership that follows the rules."""
    voters = draw(st.sets(NODES, min_size=1, max_size=7))
    outgoing = draw(st.sets(NODES | st.sampled_from(sorted(voters)), max_size=7))
    learners = draw(st.sets(NODES, max_size=4)) - voters - outgoing
    leaving = sorted(outgoing - voters)
    learners_next = draw(st.sets(st.sampled_from(leaving))) if leaving else set()
    auto_leave = bool(outgoing) and draw(st.booleans())
    return Members(*(tuple(sorted(part)) for part in (voters, outgoing, learners, learners_next)), auto_leave)


@st.composite
def with_endpoints(draw: st.DrawFn) -> tuple[Members, dict[int, str]]:
    members = draw(memberships())
    known = draw(st.sets(st.sampled_from(members.all)))
    text = st.text("abz09.:-[]", min_size=1, max_size=30)
    return members, {node: draw(text) for node in known}


@settings(deadline=None, max_examples=80)
@given(with_endpoints())
def test_round_trip(given: tuple[Members, dict[int, str]]) -> None:
    members, endpoints = given
    payload = encode_members(members, endpoints)
    assert payload.size % 64 == 0
    assert decode_members(payload) == (members, endpoints)
    backwards = dict(sorted(endpoints.items(), reverse=True))
    assert encode_members(members, backwards).equals(payload)


WRONG = [
    (Members(), "without voters"),
    (Members((), (1, 2)), "without voters"),
    (Members((0, 1)), "within 1 to"),
    (Members((1, NODE_ID_MAX + 1)), "within 1 to"),
    (Members((-1, 1)), "within 1 to"),
    (Members((2, 1)), "do not ascend"),
    (Members((1, 1)), "do not ascend"),
    (Members((1,), (3, 2)), "outgoing voters .* do not ascend"),
    (Members((1,), (), (3, 2)), "learners .* do not ascend"),
    (Members((1,), (2, 3), (), (3, 2)), "learners to be .* do not ascend"),
    (Members((1, 2), (), (2,)), r"\[2\] are learners and voters"),
    (Members((1, 2), (2, 3), (3,)), r"\[3\] are learners and voters"),
    (Members((1, 2), (2, 3), (), (2,)), "learners to be"),
    (Members((1, 2), (2, 3), (), (4,)), "learners to be"),
    (Members((1,), (), (), (2,)), "learners to be"),
    (Members((1,), auto_leave=True), "not joint"),
    (Members(tuple(range(1, MEMBERS_MAX + 2))), "are allowed"),
]


def row_of(members: Members, endpoints: Mapping[int, str] = {}) -> dict[str, Any]:
    return {
        "voters": members.voters,
        "outgoing": members.outgoing,
        "learners": members.learners,
        "learners_next": members.learners_next,
        "auto_leave": members.auto_leave,
        "nodes": list(endpoints),
        "endpoints": list(endpoints.values()),
    }


def forged(*rows: dict[str, Any], schema: pa.Schema = MEMBERS_SCHEMA) -> pa.Buffer:
    """A payload that says exactly `rows`, whatever the rules say."""
    return entry_batch.encode_payload(pa.RecordBatch.from_pylist(list(rows), schema=schema))


@pytest.mark.parametrize(("members", "message"), WRONG)
def test_a_membership_that_breaks_a_rule_is_refused(members: Members, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        check_members(members)
    with pytest.raises(InvariantError, match=message):
        encode_members(members, {})
    if all(0 <= node <= NODE_ID_MAX for node in members.all):
        with pytest.raises(ProtocolError, match=message):
            decode_members(forged(row_of(members)))


def test_the_largest_membership_is_taken() -> None:
    members = Members(tuple(range(NODE_ID_MAX - MEMBERS_MAX + 1, NODE_ID_MAX + 1)))
    endpoints = dict.fromkeys(members.voters, "h" * ENDPOINT_BYTES_MAX)
    assert decode_members(encode_members(members, endpoints)) == (members, endpoints)


@pytest.mark.parametrize(
    "text", ["", " ", "a b:1", "a:1\n", "a\x00:1", "h\u00f6st:1", "\udcff:1", "h" * (ENDPOINT_BYTES_MAX + 1)]
)
def test_a_text_that_can_be_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(InvariantError, match="is not like host:port"):
        encode_members(Members((1,)), {1: text})
    if text.isprintable():
        with pytest.raises(ProtocolError, match="is not like host:port"):
            decode_members(forged(row_of(Members((1,)), {1: text})))


def test_endpoints_are_of_members_one_by_one() -> None:
    with pytest.raises(InvariantError, match=r"nodes \[4\], which are no members"):
        encode_members(Members((1, 2), (3,)), {3: "c:1", 4: "d:1"})
    good = row_of(Members((1, 2)), {1: "a:1", 2: "b:1"})
    assert decode_members(forged(good))[1] == {1: "a:1", 2: "b:1"}
    for change in (
        {"nodes": [1]},
        {"endpoints": ["a:1"]},
        {"nodes": [2, 1]},
        {"nodes": [1, 1]},
        {"nodes": [1, 3]},
        {"nodes": [0, 1]},
    ):
        with pytest.raises(ProtocolError, match="endpoints"):
            decode_members(forged(good | change))


def test_other_payloads_are_refused() -> None:
    row = row_of(Members((1,)))
    loose = pa.schema([field.with_nullable(True) for field in MEMBERS_SCHEMA])
    for payload in (
        pa.py_buffer(b""),
        pa.py_buffer(bytes(64)),
        entry_batch.encode_payload(pa.record_batch({"a": [1]})),
        forged(),
        forged(row, row),
        forged(row | {"auto_leave": None}, schema=loose),
        forged(row | {"learners": None}, schema=loose),
    ):
        with pytest.raises(ProtocolError):
            decode_members(payload)
    inner = pa.schema([pa.field("voters", pa.list_(pa.uint32())), *list(loose)[1:]])
    with pytest.raises(ProtocolError):
        decode_members(forged(row | {"voters": [1, None]}, schema=inner))


GOOD = encode_members(Members((1, 2, 3), (3, 4), (5,), (4,), True), {1: "a:7001", 4: "b:7001"}).to_pybytes()


def judged(data: bytes) -> bool:
    """Whether `data` is taken as a membership, which then follows the rules; else it was refused as it should be."""
    try:
        members, endpoints = decode_members(pa.py_buffer(data))
    except ProtocolError:
        return False
    assert decode_members(encode_members(members, endpoints)) == (members, endpoints)
    return True


def test_no_damaged_membership_crashes() -> None:
    """Every byte damaged three ways: refused, or another membership that follows the rules."""
    outcomes = set()
    for at in range(len(GOOD)):
        for flip in (0x01, 0x80, 0xFF):
            bad = bytearray(GOOD)
            bad[at] ^= flip
            outcomes.add(judged(bytes(bad)))
    assert outcomes == {True, False}


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=512), st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=6))
@example(b"", [])
def test_garbage_is_refused(data: bytes, writes: list[tuple[int, int]]) -> None:
    judged(data)
    judged(data.ljust((len(data) + 63) // 64 * 64, b"\0"))
    written = bytearray(GOOD)
    for at, value in writes:
        written[at] = value
    assert judged(bytes(written)) or bytes(written) != GOOD


def test_an_error_is_of_marble_even_for_what_is_no_payload() -> None:
    with pytest.raises(MarbleError):
        decode_members(b"bytes")  # type: ignore[arg-type]
