"""A node's engine and what reaches it from outside, on a real directory, without a network."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import pyarrow as pa
import pytest

from marble._core.entry_batch import Proposal
from marble.database import Database
from marble.env import SystemFiles
from marble.errors import InvariantError, NotLeaderError, OutcomeUnknownError, UnavailableError, UsageError
from marble.local import LocalBackend
from marble.lsm import payload
from marble.lsm.machine import TableMachine
from marble.members import encode_members
from marble.node import Node
from marble.options import NodeOptions
from marble.promises import Committed
from marble.raft.messages import Message, MessageKind
from marble.transport.codec import Envelope
from marble.types import Change, ChangeKind, EntryKind, Members, Role

DEADLINE_S = 30.0


class Silence:
    """A network that takes everything and delivers nothing, and remembers what it took."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send(self, to: int, envelopes: list[Envelope]) -> bool:
        self.sent.extend(envelope.message for envelope in envelopes)
        return True

    def set_peers(self, endpoints: Mapping[int, str]) -> None:
        self.peers = dict(endpoints)


def make(path: Path, network: Silence | None = None, **options: object) -> Node:
    endpoints = {1: "a:1", 2: "b:1", 3: "c:1"} if network else {1: "a:1"}
    node = Node(NodeOptions("c", 1, endpoints, **options), SystemFiles(path), TableMachine(), network)
    node.start()
    return node


def command(text: bytes = b"x") -> tuple[EntryKind, int, object]:
    return EntryKind.COMMAND, 0, payload.encode_command(text)


def propose(node: Node, text: bytes = b"x", term: int | None = None) -> Future[Committed]:
    from marble._core.entry_batch import Proposal

    return node.propose(Proposal(*command(text)), term)


def wait_for_last(node: Node, index: int, position: str = "last_index") -> None:
    """Return when the core's log ends at `index`: each status takes a turn of the engine."""
    end = time.monotonic() + DEADLINE_S
    while node.status()[position] < index:
        assert time.monotonic() < end


def acknowledge(node: Node, term: int, index: int) -> None:
    """Node 2 has everything up to `index`."""
    node.receive([Envelope(0, Message(MessageKind.APPEND_ENTRIES_RESPONSE, 2, 1, term, log_index=index))])


def elect(node: Node) -> int:
    """Make node 1 of three the leader by answering for node 2; return its term."""

    def campaign(raft: object) -> int:
        raft.campaign(force=True)
        return raft.term

    term = node.call(campaign).result(DEADLINE_S)
    node.receive([Envelope(0, Message(MessageKind.REQUEST_VOTE_RESPONSE, 2, 1, term))])
    node.wait_for_leader(DEADLINE_S)
    return term


def test_a_message_that_nobody_would_send_is_dropped_and_counted(tmp_path: Path) -> None:
    node = make(tmp_path, Silence())
    try:
        impossible = Message(MessageKind.HEARTBEAT, 2, 1, 0)
        misdirected = Message(MessageKind.HEARTBEAT, 2, 3, 1)
        node.receive([Envelope(0, impossible), Envelope(0, misdirected), Envelope(7, impossible)])
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


def hold(node: Node) -> Future[None]:
    """Hold the engine until the future that comes back is given a result: what is posted can only gather."""
    held: Future[None] = Future()
    release: Future[None] = Future()

    def wait(raft: object) -> None:
        held.set_result(None)
        release.result(DEADLINE_S)

    node.call(wait)
    held.result(DEADLINE_S)
    return release


def test_too_many_waiting_proposals_are_refused(tmp_path: Path) -> None:
    node = make(tmp_path, inbox_bytes_max=1)
    try:
        release = hold(node)
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
    wait_for_last(node, 1, "persisted_index")
    node.stop(DEADLINE_S)
    (segment,) = (tmp_path / "log").glob("*.arrows")
    segment.write_bytes(segment.read_bytes()[:-64])
    for _ in range(2):
        with pytest.raises(CorruptionError, match="must not vote"):
            make(tmp_path, Silence())


def test_a_node_alone_goes_on_with_what_its_log_has_left_and_says_what_it_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = make(tmp_path)
    last = propose(node).result(DEADLINE_S).index
    node.stop(DEADLINE_S)
    (segment,) = (tmp_path / "log").glob("*.arrows")
    segment.write_bytes(segment.read_bytes()[:-64])
    node = make(tmp_path)
    try:
        assert "durable bytes are lost" in caplog.text
        assert propose(node).result(DEADLINE_S).index > 0
        assert node.status()["last_index"] <= last + 2
    finally:
        node.stop(DEADLINE_S)


def test_an_entry_limit_that_no_frame_of_the_log_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the most that fits the log"):
        make(tmp_path, entry_bytes_max=1 << 40)


def test_a_node_starts_once(tmp_path: Path) -> None:
    node = make(tmp_path)
    try:
        with pytest.raises(UsageError, match="starts once"):
            node.start()
        assert propose(node).result(DEADLINE_S).index > 0
    finally:
        node.stop(DEADLINE_S)


def test_a_node_that_never_started_gives_its_directory_back(tmp_path: Path) -> None:
    options = NodeOptions("c", 1, {1: "a:1"})
    node = Node(options, SystemFiles(tmp_path), TableMachine())
    with pytest.raises(UnavailableError, match="in use"):
        make(tmp_path)
    node.stop(DEADLINE_S)
    make(tmp_path).stop(DEADLINE_S)


def test_an_engine_that_hangs_keeps_the_directory_and_is_reported(tmp_path: Path) -> None:
    node = make(tmp_path, read_timeout_s=0.01)
    release = hold(node)
    with pytest.raises(UnavailableError, match="does not answer"):
        node.status()
    with pytest.raises(UnavailableError, match="did not end within"):
        node.stop(timeout_s=0)
    # The hanging engine may still write.
    with pytest.raises(UnavailableError, match="in use"):
        make(tmp_path)
    release.set_result(None)
    node.stop(DEADLINE_S)
    make(tmp_path).stop(DEADLINE_S)


def test_messages_beyond_a_full_inbox_are_dropped_and_counted(tmp_path: Path) -> None:
    node = make(tmp_path, Silence(), inbox_messages_max=1)
    dropped = node.metrics.counter("messages_dropped_inbox_full")
    heartbeats = [Envelope(0, Message(MessageKind.HEARTBEAT, leader, 1, 5)) for leader in (2, 3)]
    try:
        release = hold(node)
        node.receive(heartbeats[:1])
        node.receive(heartbeats[1:])
        assert dropped.value == 1
        release.set_result(None)
        assert node.wait_for_leader(DEADLINE_S) == 2
    finally:
        node.stop(DEADLINE_S)
    # A node that has stopped is not one with too much to do.
    node.receive(heartbeats)
    node.receive(heartbeats)
    assert dropped.value == 1


def test_a_leader_probes_a_peer_whose_link_is_lost(tmp_path: Path) -> None:
    node = make(tmp_path, Silence(), check_quorum=False)
    try:
        term = elect(node)
        node.receive([Envelope(0, Message(MessageKind.APPEND_ENTRIES_RESPONSE, 2, 1, term, log_index=1))])
        assert node.status()["peers"]["2"]["state"] == "replicate"
        node.unreachable(2)
        assert node.status()["peers"]["2"]["state"] == "probe"
    finally:
        node.stop(DEADLINE_S)


def test_a_campaign_asks_the_peers_before_it_raises_the_term(tmp_path: Path) -> None:
    network = Silence()
    node = make(tmp_path, network)
    try:
        node.campaign()
        status = node.status()
        assert (status["role"], status["term"]) == ("pre-candidate", 0)
        assert {(message.kind, message.to) for message in network.sent} == {
            (MessageKind.REQUEST_PRE_VOTE, 2),
            (MessageKind.REQUEST_PRE_VOTE, 3),
        }
    finally:
        node.stop(DEADLINE_S)


def test_waiting_for_a_leader_ends_with_its_time_or_with_the_node(tmp_path: Path) -> None:
    node = make(tmp_path, Silence())
    try:
        with pytest.raises(UnavailableError, match="no leader was known to node 1"):
            node.wait_for_leader(0.0)
    finally:
        node.stop(DEADLINE_S)
    with pytest.raises(UnavailableError, match="has stopped"):
        node.wait_for_leader(DEADLINE_S)


@pytest.mark.parametrize("kind", [EntryKind.NOOP, EntryKind.MEMBERSHIP])
def test_entries_that_only_the_node_makes_cannot_be_proposed(tmp_path: Path, kind: EntryKind) -> None:
    node = make(tmp_path)
    try:
        members = encode_members(Members((9,)), {9: "h:1"}) if kind is EntryKind.MEMBERSHIP else None
        with pytest.raises(UsageError, match="made by the node alone"):
            node.propose(Proposal(kind, 0, members))
        assert node.members() == Members((1,))
    finally:
        node.stop(DEADLINE_S)


def test_a_call_that_is_refused_is_the_caller_s_and_does_no_harm(tmp_path: Path) -> None:
    node = make(tmp_path)
    try:
        with pytest.raises(UsageError):
            node.call(lambda raft: raft.propose([])).result(DEADLINE_S)
        assert propose(node).result(DEADLINE_S).index > 0
    finally:
        node.stop(DEADLINE_S)


def test_a_second_failure_does_not_keep_anyone_from_an_answer(tmp_path: Path) -> None:
    node = make(tmp_path)
    release = hold(node)
    before = propose(node)
    node.fail(RuntimeError("the sky fell"))
    node.fail(RuntimeError("and then the ground"))
    after, read = propose(node), node.read_index()
    release.set_result(None)
    for future in (before, after, read):
        with pytest.raises(InvariantError, match="the sky fell"):
            future.result(DEADLINE_S)
    assert node.stopped.is_set()
    node.stop(DEADLINE_S)


def test_messages_that_prove_a_loss_stop_the_node_and_everyone_is_answered(tmp_path: Path) -> None:
    node = make(tmp_path, Silence())
    # A leader sends no commit index that this node has not acknowledged: its log must have had these entries.
    proof = [Envelope(0, Message(MessageKind.HEARTBEAT, 2, 1, 5, commit=99))]
    release = hold(node)
    before = propose(node)
    node.receive(proof)
    node.receive(proof)
    after, read = propose(node), node.read_index()
    release.set_result(None)
    for future in (before, after, read):
        with pytest.raises(InvariantError, match="entry 99 is committed"):
            future.result(DEADLINE_S)
    assert node.stopped.is_set()
    node.stop(DEADLINE_S)


@pytest.mark.parametrize("error", [InvariantError("two leaders"), ZeroDivisionError("by zero")])
def test_a_call_that_breaks_the_core_stops_the_node_and_tells_every_caller(tmp_path: Path, error: Exception) -> None:
    def break_it(raft: object) -> None:
        raise error

    node = make(tmp_path)
    release = hold(node)
    first, second, write = node.call(break_it), node.call(break_it), propose(node)
    release.set_result(None)
    assert first.exception(DEADLINE_S) is error
    assert second.exception(DEADLINE_S) is error
    with pytest.raises(InvariantError, match=str(error)):
        write.result(DEADLINE_S)
    assert node.stopped.is_set()
    assert node.failure is error
    node.stop(DEADLINE_S)


def test_what_does_not_fit_waits_in_order_instead_of_leaving_a_gap(tmp_path: Path) -> None:
    node = make(tmp_path, Silence(), check_quorum=False, uncommitted_bytes_max=1)
    try:
        term = elect(node)
        acknowledge(node, term, 1)
        futures = []
        for number in range(4):
            futures.append(propose(node, b"%d" % number, term))
            # The first is in the log, and fills it, before the others come.
            wait_for_last(node, 2)
        assert node.status()["last_index"] == 2
        assert not any(future.done() for future in futures)
        acknowledge(node, term, 2)
        # The core is empty now, so all that waited goes in as one.
        wait_for_last(node, 5)
        acknowledge(node, term, 5)
        assert [future.result(DEADLINE_S).index for future in futures] == [2, 3, 4, 5]
    finally:
        node.stop(DEADLINE_S)


def test_what_never_fits_is_refused_in_the_end(tmp_path: Path) -> None:
    node = make(tmp_path, Silence(), check_quorum=False, uncommitted_bytes_max=1, propose_timeout_s=0.3, tick_ms=20.0)
    try:
        term = elect(node)
        first = propose(node)
        wait_for_last(node, 2)
        second = propose(node)
        with pytest.raises(UnavailableError, match="wait to be committed"):
            second.result(DEADLINE_S)
        with pytest.raises(OutcomeUnknownError):
            first.result(DEADLINE_S)
        assert node.leading_term == term
    finally:
        node.stop(DEADLINE_S)


def test_what_was_meant_for_one_leadership_is_not_taken_by_another(tmp_path: Path) -> None:
    node = make(tmp_path, Silence(), check_quorum=False)
    try:
        first = elect(node)
        assert node.leading_term == first
        node.receive([Envelope(0, Message(MessageKind.HEARTBEAT, 2, 1, first + 1))])
        with pytest.raises(NotLeaderError):
            propose(node, term=first).result(DEADLINE_S)
        second = elect(node)
        assert second > first
        with pytest.raises(NotLeaderError, match="over"):
            propose(node, term=first).result(DEADLINE_S)
        acknowledge(node, second, 2)
        mine = propose(node, term=second)
        wait_for_last(node, 3)
        acknowledge(node, second, 3)
        assert mine.result(DEADLINE_S).term == second
    finally:
        node.stop(DEADLINE_S)


def test_callers_do_not_wait_for_ever_on_an_engine_that_hangs(tmp_path: Path) -> None:
    node = make(tmp_path, Silence(), read_timeout_s=0.2)
    release: Future[None] = Future()
    try:
        backend = LocalBackend(node, node.machine)
        node.call(lambda raft: release.result(DEADLINE_S))
        for call in (node.status, node.campaign, backend.tables):
            with pytest.raises(UnavailableError, match="does not answer"):
                call()
    finally:
        release.set_result(None)
        node.stop(DEADLINE_S)


def test_a_node_alone_answers_reads_without_its_engine(tmp_path: Path) -> None:
    """What it has applied is all that was ever acknowledged: a read needs to ask nobody, not even a disk that hangs."""
    node = make(tmp_path, read_timeout_s=0.2)
    release: Future[None] = Future()
    try:
        table = Database(LocalBackend(node, node.machine)).create_table("t", pa.schema([("k", pa.int8())]), ["k"])
        table.write(pa.record_batch({"k": pa.array([1], pa.int8())}))
        node.call(lambda raft: release.result(DEADLINE_S))
        assert table.get(1) == {"k": 1}
        assert table.get_many([1, 2]).column("k").to_pylist() == [1, None]
        assert table.count_rows() == 1
    finally:
        release.set_result(None)
        node.stop(DEADLINE_S)
    with pytest.raises(UnavailableError, match="has stopped"):
        table.get(1)


def test_a_node_is_alone_until_somebody_comes(tmp_path: Path) -> None:
    node = make(tmp_path / "one")
    try:
        assert node.decides_alone()
        node.change_membership([Change(ChangeKind.ADD_LEARNER, 2)], {2: "b:1"}).result(DEADLINE_S)
        node.status()  # The turn of the change is over.
        assert not node.decides_alone()
    finally:
        node.stop(DEADLINE_S)
    other = make(tmp_path / "other", Silence())
    try:
        elect(other)
        assert not other.decides_alone()
    finally:
        other.stop(DEADLINE_S)
