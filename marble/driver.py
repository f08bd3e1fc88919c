"""One turn of the engine: step the core, then carry out what it decided, in the order that makes it safe.

Rule 1, the durability rule, is `turn` and nothing else decides order:

1. send ``messages``;
2. persist hard state and entries, of all groups, under one sync;
3. only then send ``messages_after_persist`` (votes granted, append acknowledgements);
4. apply ``committed``, then tell the core.

There is no thread, clock or socket here: the node and the simulator drive the same code. A `turn` that raises has left the
disk in doubt; whoever drives stops this node (a failed sync is never retried).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import pyarrow as pa

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble._core.term_index import TermIndex
from marble.errors import check
from marble.machine import Result, StateMachine
from marble.raft.core import Raft
from marble.raft.messages import Message, MessageKind, ReadState, Ready, RoleChanged, Span
from marble.raft.progress import ProgressState
from marble.transport.codec import Envelope
from marble.types import INDEX_MAX, EntryKind, HardState, Members, Position, Role, SnapshotMeta

APPLY_BYTES_MAX: Final = 16 * 1024 * 1024
"""How much of the log one call of apply gets at most: bounds the memory of a replay."""

Send = Callable[[int, list[Envelope]], bool]
"""Hand messages to the transport; False if the peer's queue would not take them."""


class Log(Protocol):
    """What the driver needs of the durable log (`marble.logstore.log.Log` offers more)."""

    def append(self, group: int, hard_state: HardState | None, entries: pa.RecordBatch | None) -> None: ...

    def sync(self) -> None: ...

    def read(self, group: int, first: int, end: int, bytes_max: int) -> pa.RecordBatch: ...


@dataclass(frozen=True, slots=True)
class DurableState:
    """What a core starts from: a `marble.raft.config.Storage` made of what the log recovered."""

    hard_state: HardState
    members: Members
    term_index: TermIndex
    applied_index: int = 0
    snapshot: SnapshotMeta | None = None
    changes: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Applied:
    """Entries that one call of apply took: ``results[i]`` belongs to ``first + i``, which was proposed in ``terms[i]``."""

    first: int
    terms: Sequence[int]
    results: Sequence[Result]


@dataclass(slots=True)
class Outcome:
    """What a turn gave to those who wait above: in the order in which it happened."""

    applied: list[Applied] = field(default_factory=list)
    reads: list[ReadState] = field(default_factory=list)
    events: list[RoleChanged] = field(default_factory=list)


class Driver:
    """Drives one Raft group of one node. Not thread-safe: one thread owns it.

    - An entry is staged from the moment the core may take it until the log has it; staging never outlives a turn's begin.
    - ``machine.applied_index == raft.applied_index`` between turns.

    Parameters
    ----------
    group
        Number of the group, stamped on every entry and message.
    raft
        The core. The driver is the only one to call it.
    log
        The node's log, shared with other groups.
    machine
        What committed entries are applied to.
    send
        Takes the messages for a peer. Losing them is allowed, blocking is not.
    """

    def __init__(self, group: int, raft: Raft, log: Log, machine: StateMachine, send: Send) -> None:
        self.group = group
        self.raft = raft
        self.machine = machine
        self.outcome = Outcome()
        self._log = log
        self._send = send
        self._staged: list[pa.RecordBatch] = []
        self._late: dict[int, Message] = {}
        """Peer -> the last message to it that tells nothing but a commit index, held back (see `_may_wait`)."""
        self._ready: Ready | None = None

    def propose(self, proposals: Sequence[Proposal]) -> Position:
        """Offer `proposals` to the core, as consecutive entries.

        Returns the position of the first; the others follow at the next indexes of the same term. Raises NotLeaderError or
        UnavailableError, and then none of them is in the log.
        """
        first = self.raft.propose([proposal.nbytes for proposal in proposals])
        self._staged.append(entry_batch.build(self.group, first.index, first.term, proposals))
        return first

    def receive(self, envelope: Envelope) -> None:
        """Step a peer's message; its entries were checked by the transport."""
        if envelope.batch is not None:
            self._staged.append(envelope.batch)
        self.raft.step(envelope.message)

    def tick(self) -> None:
        """One tick of the clock."""
        late, self._late = self._late, {}
        self._post([message for message in late.values() if self._is_current(message)], hold=False)
        self.raft.tick()

    def begin(self) -> bool:
        """Take the core's Ready, hand its entries to the log and send what may go at once. True if a sync must follow."""
        check(self._ready is None, "a turn began before the last one had finished")
        self._ready = ready = self.raft.ready()
        for event in ready.events:
            if event.noop_index:
                noop = Proposal(EntryKind.NOOP, 0, None)
                self._staged.append(entry_batch.build(self.group, event.noop_index, event.term, [noop]))
        entries = self._take_staged(ready.append) if ready.append is not None else None
        self._staged.clear()
        if entries is not None or ready.hard_state is not None:
            self._log.append(self.group, ready.hard_state, entries)
        self._post(ready.messages)
        return ready.must_sync

    def finish(self) -> None:
        """Go on after the sync: acknowledge, apply, tell the core."""
        ready, self._ready = self._ready, None
        check(ready is not None, "a turn finished that had not begun")
        assert ready is not None
        self.raft.persisted(ready.number)
        self._post(ready.messages_after_persist)
        if ready.committed is not None:
            self._apply(ready.committed)
        self.outcome.events.extend(ready.events)
        self.outcome.reads.extend(ready.reads)

    def take_outcome(self) -> Outcome:
        """What happened since the last call."""
        outcome, self.outcome = self.outcome, Outcome()
        return outcome

    def _take_staged(self, span: Span) -> pa.RecordBatch:
        """The batch of exactly the entries that the core appended.

        A staged row is the right one if and only if its index and term are those in the core's log (Log Matching, §5.3):
        what the core refused, or what a later message replaced, is left behind. The batch that brought the last of the
        entries agrees with the log before it, too, or the core would have cut that entry off again.
        """
        parts: list[pa.RecordBatch] = []
        end = span.end
        staged = [(batch, entry_batch.span(batch)) for batch in self._staged]
        while end > span.first:
            before = end
            # Newest first, which is nearly always the order of the log from its end: one pass, seldom more.
            for batch, entries in reversed(staged):
                low, high = max(entries.first, span.first), min(entries.end, end)
                if low >= high or high != end:
                    continue
                if self.raft.log.span(low, high).terms() == entries.slice(low, high).terms():
                    parts.append(batch.slice(low - entries.first, high - low))
                    end = low
            check(end < before, f"entry {end - 1} of the core's log was never staged")
        parts.reverse()
        return parts[0] if len(parts) == 1 else entry_batch.concat(parts)

    def _may_wait(self, message: Message) -> bool:
        """Whether `message` only tells a peer in step with us how far the log is committed.

        Under load the next entries say it too, so it waits for them, or for the next message of another kind, for a tick at
        most. It halves the messages of one write at a time. To the core this is a slow network.
        """
        if message.kind is not MessageKind.APPEND_ENTRIES or message.entries:
            return False
        progress = self.raft.progress.get(message.to)
        return progress is not None and progress.state is ProgressState.REPLICATE

    def _is_current(self, message: Message) -> bool:
        return message.term == self.raft.term and self.raft.role is Role.LEADER

    def _post(self, messages: Iterable[Message], *, hold: bool = True) -> None:
        """Attach batches and hand each peer its messages, peers in ascending order."""
        by_peer: dict[int, list[Envelope]] = {}
        read: dict[tuple[int, int], pa.RecordBatch] = {}
        for message in messages:
            if hold and self._may_wait(message):
                self._late[message.to] = message
                continue
            held = self._late.pop(message.to, None)
            if held is not None and message.kind is not MessageKind.APPEND_ENTRIES and self._is_current(held):
                # What follows may make the peer read: it must have heard what is committed before.
                by_peer.setdefault(message.to, []).append(Envelope(self.group, held, None))
            batch = None
            if message.kind is MessageKind.APPEND_ENTRIES and message.entries:
                key = (message.entries.first, message.entries.end)
                batch = read.get(key)
                if batch is None:
                    batch = read[key] = self._log.read(self.group, *key, INDEX_MAX)
            by_peer.setdefault(message.to, []).append(Envelope(self.group, message, batch))
        for peer in sorted(by_peer):
            if not self._send(peer, by_peer[peer]):
                self.raft.report_unreachable(peer)

    def _apply(self, span: Span) -> None:
        first = span.first
        while first < span.end:
            batch = self._log.read(self.group, first, span.end, APPLY_BYTES_MAX)
            results = self.machine.apply(batch)
            check(len(results) == batch.num_rows, "apply must answer every entry")
            self.outcome.applied.append(Applied(first, entry_batch.span(batch).terms(), results))
            first += batch.num_rows
        self.raft.applied(span.end - 1)


def turn(drivers: Iterable[Driver], log: Log) -> None:
    """Run the groups of one node until none has anything left to do. One sync serves all of them.

    Raises whatever the log or the machine raised: the node must then stop.
    """
    drivers = list(drivers)
    while busy := [driver for driver in drivers if driver.raft.has_ready()]:
        must_sync = [driver.begin() for driver in busy]
        if any(must_sync):
            log.sync()
        for driver in busy:
            driver.finish()
