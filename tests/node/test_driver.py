"""One turn of the driver, by hand: real core, log and tables on a simulated disk; the test is the network."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

import pytest

from marble._core.entry_batch import Proposal, build
from marble._core.term_index import EntrySpan, TermIndex
from marble.driver import Driver, DurableState
from marble.logstore.log import Log, LogOptions
from marble.lsm import payload
from marble.lsm.machine import TableMachine
from marble.raft.config import RaftConfig
from marble.raft.core import Raft
from marble.raft.messages import Message, MessageKind
from marble.raft.progress import ProgressState
from marble.testing.disk import DiskCrash, SimulatedFiles
from marble.transport.codec import Envelope
from marble.types import EntryKind, HardState, Members, Role


def turn(drivers: Iterable[Driver], log: Log) -> None:
    """Run the groups of one node inline until none has anything left to do. One sync serves all of them.

    Raises whatever the log or the machine raised: the node must then stop.
    """
    drivers = list(drivers)
    busy = True
    while busy:
        begun = [(driver, driver.begin()) for driver in drivers if driver.has_ready()]
        purged = [driver for driver in drivers if driver.take_purged()]
        if purged or any(number for _, number in begun):
            log.sync()
        if purged:
            log.purge()
        for driver, number in begun:
            if number:
                driver.persisted(number)
        busy = bool(begun)
        for driver in drivers:
            while (job := driver.take_apply()) is not None:
                job.run()
                driver.finish_apply(job)
                busy = True
            while (file_job := driver.take_snapshot()) is not None:
                file_job.run()
                driver.finish_snapshot(file_job)
                busy = True


class Bench:
    """Node 1 of three."""

    def __init__(self) -> None:
        self.files = SimulatedFiles(Random(1))
        self.sent: list[Message] = []
        self.queues_full = False
        self.log = Log.open(self.files, LogOptions())
        config = RaftConfig(1, 10, 2, random=Random(1), pre_vote=False)
        raft = Raft(config, DurableState(HardState(), Members((1, 2, 3)), TermIndex()))
        self.driver = Driver(0, raft, self.log, TableMachine(), self.send)

    def send(self, to: int, envelopes: list[Envelope]) -> bool:
        self.sent.extend(envelope.message for envelope in envelopes)
        return not self.queues_full

    def turn(self) -> list[Message]:
        self.sent.clear()
        turn([self.driver], self.log)
        return list(self.sent)

    def take(self, kind: MessageKind, term: int, **fields: object) -> None:
        self.driver.receive(Envelope(0, Message(kind, 2, 1, term, **fields)))


def command(text: bytes) -> Proposal:
    return Proposal(EntryKind.COMMAND, 0, payload.encode_command(text))


def test_a_proposal_in_the_turn_of_the_election_stands_after_the_noop() -> None:
    bench = Bench()
    bench.driver.raft.campaign()
    bench.turn()
    bench.take(MessageKind.REQUEST_VOTE_RESPONSE, 1)
    assert bench.driver.raft.role is Role.LEADER
    assert bench.driver.propose([command(b"a"), command(b"b")]).index == 2
    bench.turn()
    rows = bench.log.read(0, 1, 4)
    assert rows["kind"].to_pylist() == [EntryKind.NOOP, EntryKind.COMMAND, EntryKind.COMMAND]


def test_of_several_messages_in_one_turn_only_what_the_core_kept_reaches_the_log() -> None:
    bench = Bench()

    def entries(term: int, first: int, log_term: int, *texts: bytes) -> None:
        batch = build(0, first, term, [command(text) for text in texts])
        span = EntrySpan.of(first, [term] * len(texts), [64] * len(texts))
        message = Message(MessageKind.APPEND_ENTRIES, 2, 1, term, log_index=first - 1, log_term=log_term, entries=span)
        bench.driver.receive(Envelope(0, message, batch))

    entries(1, 1, 0, b"a", b"b", b"c")
    entries(1, 1, 0, b"a", b"b", b"c")
    entries(2, 2, 1, b"x")
    entries(1, 1, 0, b"a", b"b", b"c")
    entries(2, 3, 2, b"y", b"z")
    bench.turn()
    rows = bench.log.read(0, 1, 5)
    assert rows["term"].to_pylist() == [1, 2, 2, 2]
    texts = [payload.decode_command(pa_buffer) for pa_buffer in map(_buffer, rows["payload"])]
    assert texts == [b"a", b"x", b"y", b"z"]


def _buffer(scalar: object) -> object:
    return scalar.as_buffer()


def test_an_acknowledgement_leaves_only_after_the_sync() -> None:
    bench = Bench()
    bench.take(MessageKind.REQUEST_VOTE, 1, log_index=0, log_term=0)
    # The very next sync loses the power: the vote must not have been sent.
    bench.files.lose_power_at = bench.files.operations + 2
    with pytest.raises(DiskCrash):
        bench.turn()
    assert bench.sent == []


def test_a_failed_sync_is_final() -> None:
    bench = Bench()
    bench.driver.raft.campaign()
    bench.files.fail_at = bench.files.operations + 2
    with pytest.raises(Exception, match=r"sync|log"):
        bench.turn()
    assert [message.kind for message in bench.sent] == []
    with pytest.raises(Exception, match="log"):
        bench.log.append(0, HardState(5, 1, 0), None)


def test_a_leader_probes_a_peer_whose_queue_took_nothing() -> None:
    bench = Bench()
    bench.driver.raft.campaign()
    bench.turn()
    bench.take(MessageKind.REQUEST_VOTE_RESPONSE, 1)
    bench.turn()
    bench.take(MessageKind.APPEND_ENTRIES_RESPONSE, 1, log_index=1)
    bench.turn()
    peer = bench.driver.raft.progress[2]
    assert peer.state is ProgressState.REPLICATE
    bench.queues_full = True
    bench.driver.propose([command(b"a")])
    bench.turn()
    # What was under way may be lost: no more is sent into the void, and the next answer says where to go on.
    assert peer.state is ProgressState.PROBE
    assert peer.next_index == 2


@pytest.mark.parametrize("lost", [False, True])
def test_what_was_held_back_for_a_peer_goes_only_while_it_is_in_step(lost: bool) -> None:
    """A commit index waits for the next entries. Who is asked anew what it has may lack the entries before it, and would refuse it, and
    all that was sent since would be sent again.
    """
    bench = Bench()
    bench.driver.raft.campaign()
    bench.turn()
    bench.take(MessageKind.REQUEST_VOTE_RESPONSE, 1)
    bench.turn()
    bench.take(MessageKind.APPEND_ENTRIES_RESPONSE, 1, log_index=1)
    bench.driver.propose([command(b"a"), command(b"b")])
    bench.turn()
    bench.take(MessageKind.APPEND_ENTRIES_RESPONSE, 1, log_index=2)
    assert not [message for message in bench.turn() if message.to == 2]
    if lost:
        bench.driver.raft.report_unreachable(2)
    bench.sent.clear()
    bench.driver.tick()
    told = [(message.log_index, message.commit) for message in bench.sent if message.to == 2]
    assert told == ([] if lost else [(3, 2)])
