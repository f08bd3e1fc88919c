"""A node's engine and what reaches it from outside, on a real directory, without a network."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest

from marble.env import SystemFiles
from marble.errors import NotLeaderError, OutcomeUnknownError, UnavailableError, UsageError
from marble.lsm import payload
from marble.lsm.machine import TableMachine
from marble.node import Node, NodeOptions
from marble.promises import Committed
from marble.raft.messages import Message, MessageKind
from marble.transport.codec import Envelope
from marble.types import EntryKind, Role

DEADLINE_S = 20.0


class Silence:
    """A network that takes everything and delivers nothing, and remembers what it took."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send(self, to: int, envelopes: list[Envelope]) -> bool:
        self.sent.extend(envelope.message for envelope in envelopes)
        return True


def make(path: Path, network: Silence | None = None, **options: object) -> Node:
    endpoints = {1: "a:1", 2: "b:1", 3: "c:1"} if network else {1: "a:1"}
    node = Node(NodeOptions("c", 1, endpoints, **options), SystemFiles(path), TableMachine(), network)
    node.start()
    return node


def command(text: bytes = b"x") -> tuple[EntryKind, int, object]:
    return EntryKind.COMMAND, 0, payload.encode_command(text)


def propose(node: Node, text: bytes = b"x") -> Future[Committed]:
    from marble._core.entry_batch import Proposal

    return node.propose(Proposal(*command(text)))


def elect(node: Node) -> int:
    """Make node 1 of three the leader by answering for node 2; return its term."""

    def campaign(raft: object) -> int:
        raft.campaign(force=True)
        return raft.term

    term = node.call(campaign).result(DEADLINE_S)
    node.receive([Envelope(0, Message(MessageKind.REQUEST_VOTE_RESPONSE, 2, 1, term))])
    node.wait_for_leader(DEADLINE_S)
    return term


def test_a_message_that_no_member_would_send_is_dropped_and_counted(tmp_path: Path) -> None:
    node = make(tmp_path, Silence())
    try:
        stranger = Message(MessageKind.REQUEST_VOTE_RESPONSE, 9, 1, 1)
        misdirected = Message(MessageKind.HEARTBEAT, 2, 3, 1)
        node.receive([Envelope(0, stranger), Envelope(0, misdirected), Envelope(7, stranger)])
        counters = node.status()["metrics"]
        assert counters["messages_refused"] == 1
        assert counters["messages_misdirected"] == 2
        assert node.is_running
    finally:
        node.stop(DEADLINE_S)


def test_a_follower_refuses_a_proposal_and_says_who_leads(tmp_path: Path) -> None:
    node = make(tmp_path, Silence())
    try:
        with pytest.raises(NotLeaderError) as caught:
            propose(node).result(DEADLINE_S)
        assert caught.value.leader is None
        node.receive([Envelope(0, Message(MessageKind.HEARTBEAT, 2, 1, 5))])
        assert node.wait_for_leader(DEADLINE_S) == 2
        with pytest.raises(NotLeaderError) as caught:
            propose(node).result(DEADLINE_S)
        assert caught.value.leader == "b:1"
    finally:
        node.stop(DEADLINE_S)


def test_a_proposal_that_no_majority_answers_ends_as_unknown(tmp_path: Path) -> None:
    node = make(tmp_path, Silence(), propose_timeout_s=0.2, tick_ms=20.0, check_quorum=False)
    try:
        elect(node)
        with pytest.raises(OutcomeUnknownError, match="may still be committed"):
            propose(node).result(DEADLINE_S)
    finally:
        node.stop(DEADLINE_S)


def test_a_read_that_nobody_confirms_ends_as_unavailable(tmp_path: Path) -> None:
    node = make(tmp_path, Silence(), read_timeout_s=0.2, tick_ms=20.0)
    try:
        with pytest.raises(UnavailableError, match="no leader confirmed"):
            node.read_index().result(DEADLINE_S)
    finally:
        node.stop(DEADLINE_S)


def test_what_waits_at_a_stop_is_answered(tmp_path: Path) -> None:
    node = make(tmp_path, Silence(), check_quorum=False)
    elect(node)
    write, read = propose(node), node.read_index()
    # The status comes after both in the inbox, so the core has them.
    assert node.status()["role"] == "leader"
    node.stop(DEADLINE_S)
    with pytest.raises(OutcomeUnknownError):
        write.result(DEADLINE_S)
    with pytest.raises(UnavailableError, match="stopped"):
        read.result(DEADLINE_S)
    with pytest.raises(UnavailableError, match="stopped"):
        propose(node)
    node.stop(DEADLINE_S)


def test_too_many_waiting_proposals_are_refused(tmp_path: Path) -> None:
    node = make(tmp_path, inbox_bytes_max=1)
    try:
        # While the engine is held, proposals can only gather.
        held, release = Future(), Future()

        def hold(raft: object) -> None:
            held.set_result(None)
            release.result(DEADLINE_S)

        node.call(hold)
        held.result(DEADLINE_S)
        first = propose(node)
        with pytest.raises(UnavailableError, match="too many proposals"):
            propose(node)
        release.set_result(None)
        assert first.result(DEADLINE_S).index > 0
        assert propose(node).result(DEADLINE_S).index > 0
    finally:
        node.stop(DEADLINE_S)


def test_a_failure_stops_the_engine_and_everyone_hears_of_it(tmp_path: Path) -> None:
    node = make(tmp_path)
    node.fail(RuntimeError("the sky fell"))
    assert node.stopped.wait(DEADLINE_S)
    assert not node.is_running
    assert node.role is Role.FOLLOWER
    for call in (lambda: propose(node).result(0), lambda: node.read_index().result(0)):
        with pytest.raises(Exception, match="the sky fell"):
            call()
    node.stop(DEADLINE_S)


def test_a_node_must_be_one_of_its_cluster(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not among"):
        Node(NodeOptions("c", 4, {1: "a:1"}), SystemFiles(tmp_path), TableMachine())


def test_a_node_with_peers_does_not_run_on_a_log_that_lost_durable_bytes(tmp_path: Path) -> None:
    from marble.errors import CorruptionError

    node = make(tmp_path, Silence(), check_quorum=False)
    elect(node)
    assert node.status()["persisted_index"] > 0
    node.stop(DEADLINE_S)
    (segment,) = (tmp_path / "log").glob("*.arrows")
    segment.write_bytes(segment.read_bytes()[:-64])
    for _ in range(2):
        with pytest.raises(CorruptionError, match="must not vote"):
            make(tmp_path, Silence())
