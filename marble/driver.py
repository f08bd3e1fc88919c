"""What the core decides, carried out in the order that makes it safe, in steps that several threads may share.

Rule 1, the durability rule, is kept here and nothing else decides order. Of one Ready:

1. `Driver.begin` sends ``messages`` and hands hard state and entries to the log;
2. whoever drives syncs the log, once for all groups that have begun;
3. only then `Driver.persisted` sends ``messages_after_persist`` (votes granted, append acknowledgements);
4. ``committed`` is applied by an `ApplyJob`, and `Driver.finish_apply` tells the core.

Between 1 and 3 further Readys may begin, and their writes share a later sync; 4 runs beside all of it, since the core
hands out as committed only what is durable here.

There is no thread, clock or socket here: the node and the simulator drive the same code. A step that raises has left the
disk in doubt; whoever drives stops this node (a failed sync is never retried).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble._core.term_index import TermIndex
from marble.compacting import Compactor
from marble.errors import ProtocolError, UnavailableError, UsageError, check
from marble.jobs import Applied, ApplyJob, Due, FileJob, Log, MachineJob, RebuildJob, RestoreJob, WriteJob
from marble.logstore.snapshots import SnapshotStore
from marble.machine import Pace, StateMachine
from marble.members import check_endpoints, encode_members
from marble.raft.core import Raft
from marble.raft.messages import MembershipProposed, Message, MessageKind, ReadState, RoleChanged, Span
from marble.raft.progress import ProgressState
from marble.snapshotting import SnapshotPolicy, Snapshots
from marble.transport.codec import Envelope
from marble.types import INDEX_MAX, Change, EntryKind, HardState, Members, Position, Role, SnapshotMeta, Transition

Send = Callable[[int, list[Envelope]], bool]
"""Hand messages to the transport; False if the peer's queue would not take them."""


@dataclass(frozen=True, slots=True)
class DurableState:
    """What a core starts from: a `marble.raft.config.Storage` made of what was recovered (`marble.recovery`)."""

    hard_state: HardState
    members: Members
    term_index: TermIndex
    applied_index: int = 0
    snapshot: SnapshotMeta | None = None
    changes: Sequence[int] = ()


@dataclass(slots=True)
class Outcome:
    """What was given to those who wait above: each list in the order in which it happened."""

    applied: list[Applied] = field(default_factory=list)
    reads: list[ReadState] = field(default_factory=list)
    events: list[RoleChanged] = field(default_factory=list)
    snapshots: list[int | Exception] = field(default_factory=list)
    """Where snapshots were taken, or why they could not be."""
    members_changed: bool = False
    """Whether other nodes take part, or are reached elsewhere."""
    refused: int = 0
    """Messages of peers that the core refused when their turn came."""


_OF_SNAPSHOTS: Final = frozenset({MessageKind.INSTALL_SNAPSHOT, MessageKind.SNAPSHOT_FETCH, MessageKind.SNAPSHOT_PIECE})


class Driver:
    """Drives one Raft group of one node. Not thread-safe: one thread owns it.

    - An entry is staged from the moment the core may take it until the log has it; staging never outlives a `begin`.
    - Writes are begun and persisted in the order of their numbers.
    - ``machine.applied_index == raft.applied_index`` while no apply job is out; one at most is.

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
    store
        The group's snapshots on disk. None: none are taken, and none are taken in.
    policy
        When they are taken.
    configured, replicated
        Where nodes are reached, by their ids: as this node's configuration says, and, which counts more, as the log or a
        snapshot said.
    wall_us
        What time it is, for the entries that this node takes in as leader.
    pace
        Slows down the writing of snapshots and of the machine's files.
    scrub_ticks
        How long one round of checking all of the machine's files takes; 0: there is none.
    """

    def __init__(
        self,
        group: int,
        raft: Raft,
        log: Log,
        machine: StateMachine,
        send: Send,
        *,
        store: SnapshotStore | None = None,
        policy: SnapshotPolicy | None = None,
        configured: Mapping[int, str] | None = None,
        replicated: Mapping[int, str] | None = None,
        wall_us: Callable[[], int] = lambda: 0,
        pace: Pace | None = None,
        scrub_ticks: int = 0,
    ) -> None:
        self.group = group
        self.raft = raft
        self.machine = machine
        self.outcome = Outcome()
        self.compactor = Compactor(group, machine, pace, scrub_ticks)
        self.snapshots = (
            None
            if store is None
            else Snapshots(group, raft, log, machine, store, policy or SnapshotPolicy(), self._send_one, pace)
        )
        self._log = log
        self._send = send
        self._wall_us = wall_us
        self._configured = dict(configured or {})
        self._replicated = dict(replicated or {})
        self._offered: tuple[Position, Mapping[int, str]] | None = None
        """The membership that this leader proposed last, and where it was told that nodes of it are reached."""
        self._staged: list[pa.RecordBatch] = []
        self._late: dict[int, Message] = {}
        """Peer -> the last message to it that tells nothing but a commit index, held back (see `_may_wait`)."""
        self._waiting: deque[tuple[int, Sequence[Message]]] = deque()
        """(number of a write under way, what may be sent when it is durable), oldest first."""
        self._persisted = 0
        self._committed_end = raft.applied_index + 1
        """Index after the last entry that the core has handed out as committed."""
        self._applying: MachineJob | None = None
        self._again = 0
        """Where the entries end that the machine could not apply to the end. They come again, no fewer: some of them were done."""

    @property
    def endpoints(self) -> dict[int, str]:
        """Where the members are reached, as far as this node knows; all that it knows of while there are no members."""
        known = {**self._configured, **self._replicated}
        members = self.raft.members.all
        return {node: known[node] for node in members if node in known} if members else known

    @property
    def peers(self) -> dict[int, str]:
        """Whom this node may have to talk to, and where: the members, and while it is none of them, all that it knows of."""
        receiving = None if self.snapshots is None else self.snapshots.transfer.receiving
        others = {} if receiving is None else dict(receiving.endpoints)
        if self.raft.id not in self.raft.members.all:
            others = {**self._configured, **others}
        return {**others, **self.endpoints}

    def propose(self, proposals: Sequence[Proposal]) -> Position:
        """Offer `proposals` to the core, as consecutive entries.

        Returns the position of the first; the others follow at the next indexes of the same term. Raises NotLeaderError or
        UnavailableError, and then none of them is in the log.
        """
        first = self.raft.propose([proposal.nbytes for proposal in proposals])
        self._staged.append(entry_batch.build(self.group, first.index, first.term, proposals, self._wall_us()))
        return first

    def propose_membership(
        self,
        changes: Sequence[Change],
        endpoints: Mapping[int, str] | None = None,
        transition: Transition = Transition.AUTO,
    ) -> Position:
        """Offer a change of the membership to the core. See `Raft.propose_membership`.

        Parameters
        ----------
        endpoints
            Where nodes that come are reached, ``host:port`` by id. All members get to know it with the entry.

        Raises
        ------
        UsageError
            The changes make no sense, or an endpoint is not like one.
        NotLeaderError, UnavailableError
            As the core says. Nothing was proposed.
        """
        offered = dict(endpoints or {})
        try:
            check_endpoints(Members(tuple(sorted(offered))), offered)
        except ProtocolError as error:
            raise UsageError(str(error)) from None
        strangers = offered.keys() - {change.node for change in changes} - set(self.raft.members.all)
        if strangers:
            raise UsageError(f"endpoints of nodes {sorted(strangers)}, which neither take part nor are to")
        position = self.raft.propose_membership(changes, transition)
        self._offered = position, offered
        return position

    def request_snapshot(self) -> None:
        """Take a snapshot soon; the outcome says when. Raises UsageError if it has no place."""
        if self.snapshots is None:
            raise UsageError(f"group {self.group} keeps no snapshots")
        if not self.snapshots.want():
            self.outcome.snapshots.append(self.snapshots.index)

    def receive(self, envelope: Envelope) -> None:
        """Take a peer's message; its rows were checked by the transport. Raises ProtocolError if it is at fault."""
        message: Message | None = envelope.message
        if envelope.message.kind in _OF_SNAPSHOTS:
            if self.snapshots is None:
                raise ProtocolError(f"a {envelope.message.kind.name}, but this node keeps no snapshots")
            message = self.snapshots.receive(envelope)
            # An offer may say where nodes are reached.
            self.outcome.members_changed |= envelope.message.kind is MessageKind.INSTALL_SNAPSHOT
        elif envelope.batch is not None:
            self._staged.append(envelope.batch)
        if message is not None:
            self.raft.step(message)
            refused = message.kind is MessageKind.INSTALL_SNAPSHOT_RESPONSE and message.reject
            leads = self.raft.role is Role.LEADER and message.term == self.raft.term
            if refused and leads and self.snapshots is not None and self.snapshots.refused(message):
                self.compactor.check_all()

    def tick(self, now_us: int = 0) -> None:
        """One tick of the clock; `now_us` as in `Raft.tick`."""
        self._send_late()
        self.raft.tick(now_us)
        self.compactor.tick()
        if self.snapshots is not None:
            for peer in self.snapshots.tick():
                self.raft.report_snapshot(peer, False)

    def has_ready(self) -> bool:
        """Whether `begin` would do anything."""
        return self.raft.has_ready() or self._may_install

    @property
    def _may_install(self) -> bool:
        return self.snapshots is not None and self.snapshots.has_install and self._applying is None

    def begin(self) -> int:
        """Take one Ready of the core: hand its entries to the log, send what may go at once, queue the rest.

        Returns
        -------
        int
            The number of the write that was handed to the log: a sync must follow, and then a call of `persisted`. 0 if
            nothing needs a sync.
        """
        if self._may_install:
            self._step_install()
        ready = self.raft.ready()
        for event in ready.events:
            if event.noop_index:
                noop = Proposal(EntryKind.NOOP, 0, None)
                self._staged.append(
                    entry_batch.build(self.group, event.noop_index, event.term, [noop], self._wall_us())
                )
        for proposed in ready.memberships:
            self._staged.append(self._membership_entry(proposed))
        entries = self._take_staged(ready.append) if ready.append is not None else None
        self._staged.clear()
        if ready.snapshot is not None:
            self._install(ready.snapshot, ready.hard_state, ready.number)
            if entries is not None:
                self._log.append(self.group, None, entries)
        elif entries is not None or ready.hard_state is not None:
            self._log.append(self.group, ready.hard_state, entries)
        self._post(ready.messages)
        if ready.number:
            self._waiting.append((ready.number, ready.messages_after_persist))
        else:
            # They assert nothing that is not durable already: the core holds back what does.
            self._post(ready.messages_after_persist)
        if ready.committed is not None:
            check(ready.committed.first == self._committed_end, f"{ready.committed} leaves a gap to what was committed")
            self._committed_end = ready.committed.end
        self.outcome.events.extend(ready.events)
        self.outcome.reads.extend(ready.reads)
        return ready.number

    def persisted(self, number: int) -> None:
        """A sync has made durable all that was handed to the log up to when `begin` returned `number`: acknowledge it."""
        self.raft.persisted(number)
        self._persisted = max(self._persisted, number)
        while self._waiting and self._waiting[0][0] <= number:
            self._post(self._waiting.popleft()[1])

    def take_apply(self) -> MachineJob | None:
        """What the machine is to do next, to be run and then finished; None if there is nothing, or a job is out."""
        if self._applying is not None:
            return None
        first, end = self.raft.applied_index + 1, self._committed_end
        snapshots = self.snapshots
        if snapshots is not None:
            if snapshots.installing:
                # The log no longer has what would be applied before.
                self._applying = None if snapshots.has_install else snapshots.take_restore(self._persisted)
                return self._applying
            self._applying = snapshots.take_rebuild(end)
            if self._applying is not None:
                return self._applying
            end = first if snapshots.stalled else end
        if first < end or (snapshots is not None and snapshots.overdue):
            due = Due() if snapshots is None or first < self._again else snapshots.due()
            end = self._again if first < self._again else end
            nbytes = self.raft.log.bytes(first, end)
            self._applying = ApplyJob(self.group, self._log, self.machine, first, end, nbytes, due, bool(snapshots))
        return self._applying

    def finish_apply(self, job: MachineJob) -> None:
        """`job` has run: tell the core, and those who wait."""
        check(job is self._applying, "a job of the machine finished that is not out")
        self._applying = None
        if isinstance(job, RestoreJob):
            assert self.snapshots is not None
            self.snapshots.restored(job)
            self._replicated = dict(job.info.endpoints)
            self.outcome.members_changed = True
            self.raft.applied(job.info.index)
            return
        if isinstance(job, RebuildJob):
            assert self.snapshots is not None
            if self.snapshots.rebuilt(job):
                # As if the entries up to there had been applied, all at once.
                self._replicated = dict(job.info.endpoints)
                self.outcome.members_changed = True
                self.raft.applied(job.info.index)
            if job.error is None:
                self.snapshots.want()
            return
        self._again = job.end if job.stalled is not None else 0
        for applied in job.memberships:
            self._replicated = dict(applied.endpoints)
            self.outcome.members_changed = True
            self.raft.apply_membership(applied.members)
        if job.memberships:
            # A leader that removed itself says nothing any more after this, and who stops it now must leave behind a group
            # that knows of the removal: two nodes of which one went could not elect the other.
            self._send_late()
        if job.applied is not None:
            self.outcome.applied.append(job.applied)
            self.raft.applied(job.first + len(job.applied.results) - 1)
        if self.snapshots is not None:
            self.snapshots.applied(job, self._replicated)

    def take_snapshot(self) -> FileJob | None:
        """What is to be done with files of snapshots next, to be run and then finished; None as for `take_apply`."""
        return None if self.snapshots is None else self.snapshots.take_job()

    def finish_snapshot(self, job: FileJob) -> None:
        """`job` has run."""
        assert self.snapshots is not None
        self.snapshots.finish_job(job)
        if isinstance(job, WriteJob):
            self.outcome.snapshots.append(job.error or job.meta.index)

    def take_purged(self) -> bool:
        """Whether the log was told since the last call that entries of it are superfluous: they go with `Log.purge`, after
        the next sync.
        """
        if self.snapshots is None or not self.snapshots.purged:
            return False
        self.snapshots.purged = False
        return True

    def take_outcome(self) -> Outcome:
        """What happened since the last call."""
        outcome, self.outcome = self.outcome, Outcome()
        return outcome

    def _step_install(self) -> None:
        """Let the core see the leader's INSTALL_SNAPSHOT, of which everything is here."""
        assert self.snapshots is not None
        message = self.snapshots.take_install()
        assert message is not None
        try:
            self.raft.step(message)
        except ProtocolError:
            # What has come to be known since it was sent proves it wrong; it changed nothing.
            self.outcome.refused += 1

    def _install(self, meta: SnapshotMeta, hard_state: HardState | None, number: int) -> None:
        """Let the log go on behind a snapshot, with the sync of this write."""
        assert self.snapshots is not None
        self._log.start_after(self.group, meta.index, meta.term, hard_state)
        self.snapshots.install(meta, number)
        self._committed_end = meta.index + 1

    def _membership_entry(self, proposed: MembershipProposed) -> pa.RecordBatch:
        known = {**self._configured, **self._replicated}
        if self._offered is not None and self._offered[0] == Position(proposed.index, proposed.term):
            known.update(self._offered[1])
        members = proposed.members
        payload = encode_members(members, {node: known[node] for node in members.all if node in known})
        proposal = Proposal(EntryKind.MEMBERSHIP, 0, payload)
        return entry_batch.build(self.group, proposed.index, proposed.term, [proposal], self._wall_us())

    def _send_one(self, envelope: Envelope) -> None:
        """Send what has no part in the order of things."""
        self._send(envelope.message.to, [envelope])

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
        """Whether it is still of use: what a leader has committed stays true when it steps down. Who is asked anew might refuse it."""
        peer = self.raft.progress.get(message.to)
        in_step = peer is None or (peer.state is ProgressState.REPLICATE and message.log_index < peer.next_index)
        return in_step and message.term == self.raft.term

    def _send_late(self) -> None:
        late, self._late = self._late, {}
        self._post([message for message in late.values() if self._is_current(message)], hold=False)

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
            if message.kind is MessageKind.INSTALL_SNAPSHOT:
                self._post_offer(message)
                continue
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

    def _post_offer(self, message: Message) -> None:
        """Send an INSTALL_SNAPSHOT with what describes the snapshot."""
        assert self.snapshots is not None
        try:
            if self.snapshots.renewing:
                raise UnavailableError("the newest snapshot is being made anew")
            envelope = self.snapshots.transfer.offer(message)
        except UnavailableError:
            # A newer one has taken its place since the core chose it, or will do so.
            self.raft.report_snapshot(message.to, False)
        else:
            self._send_one(envelope)
