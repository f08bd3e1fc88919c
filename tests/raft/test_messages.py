"""What cannot be a message of a correct peer does not become one: the core never sees it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from marble._core.term_index import EntrySpan
from marble.errors import ProtocolError
from marble.raft.messages import Message, MessageKind
from marble.types import INDEX_MAX, NODE_ID_MAX

HEARTBEAT = Message(MessageKind.HEARTBEAT, 1, 2, 3)
APPEND = Message(MessageKind.APPEND_ENTRIES, 1, 2, 3, log_index=4, log_term=2, entries=EntrySpan.of(5, [2, 3]))


@pytest.mark.parametrize("node", [-1, 0, NODE_ID_MAX + 1])
@pytest.mark.parametrize("end", ["sender", "to"])
def test_node_id_out_of_range_is_refused(end: str, node: int) -> None:
    with pytest.raises(ProtocolError, match="node ids"):
        replace(HEARTBEAT, **{end: node})  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [-1, INDEX_MAX + 1])
@pytest.mark.parametrize("name", ["term", "log_index", "log_term", "commit", "reject_hint", "context"])
def test_number_out_of_range_is_refused(name: str, number: int) -> None:
    with pytest.raises(ProtocolError, match="a number of a HEARTBEAT"):
        replace(HEARTBEAT, **{name: number})  # type: ignore[arg-type]


def test_largest_numbers_are_taken() -> None:
    message = replace(HEARTBEAT, sender=NODE_ID_MAX, term=INDEX_MAX, commit=INDEX_MAX, context=INDEX_MAX)
    assert (message.sender, message.term, message.context) == (NODE_ID_MAX, INDEX_MAX, INDEX_MAX)


def test_entries_come_with_append_entries_only_and_always() -> None:
    with pytest.raises(ProtocolError, match="a HEARTBEAT with entries"):
        replace(HEARTBEAT, entries=EntrySpan.of(1, [1]))
    with pytest.raises(ProtocolError, match="APPEND_ENTRIES with no entries"):
        replace(APPEND, entries=None)


@pytest.mark.parametrize("log_index", [3, 5])
def test_entries_that_do_not_follow_log_index_are_refused(log_index: int) -> None:
    with pytest.raises(ProtocolError, match="not after log_index"):
        replace(APPEND, log_index=log_index)


@pytest.mark.parametrize(("log_term", "term"), [(3, 3), (2, 2)])
def test_terms_that_fall_or_exceed_the_sender_s_are_refused(log_term: int, term: int) -> None:
    with pytest.raises(ProtocolError, match="do not lie between"):
        replace(APPEND, log_term=log_term, term=term)


def test_probe_without_entries_says_nothing_of_their_terms() -> None:
    assert not replace(APPEND, log_term=3, entries=EntrySpan.of(5, [])).entries
