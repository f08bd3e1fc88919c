"""The core: one node's part in one group, as pure decisions.

Rule 1: all decisions come in through the methods of `Raft`, all effects go out through `ready`. No clock, thread, file,
socket or unseeded chance: the same inputs give the same outputs for ever.

How to drive one::

    raft = Raft(config, storage)
    ... raft.step(message) / raft.tick() / raft.propose([...]) / raft.read_index(7) ...
    while raft.has_ready():
        ready = raft.ready()
        send(ready.messages)
        persist(ready.hard_state, ready.append, sync=ready.must_sync)
        if ready.number:
            raft.persisted(ready.number)      # may come later, and after further Readys, but in order
        send(ready.messages_after_persist)
        apply(ready.committed); raft.applied(ready.committed.end - 1)

The protocol on the outside is etcd/raft's (v3.6). ``docs/raft.md`` lists every departure and its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from marble.errors import NotLeaderError, ProtocolError, UnavailableError, UsageError, check
from marble.raft import candidate, follower, leader
from marble.raft.config import MemoryStorage, RaftConfig, Storage
from marble.raft.membership import Membership, change
from marble.raft.messages import TRANSFER_CAMPAIGN, Message, MessageKind, Ready, RoleChanged
from marble.raft.state import State
from marble.raft.view import View
from marble.types import NO_NODE, Change, Members, Position, Role, SnapshotMeta, Transition

__all__ = ["MemoryStorage", "Raft", "RaftConfig", "Storage"]

_RESPONSES: Final = frozenset(
    {
        MessageKind.REQUEST_PRE_VOTE_RESPONSE,
        MessageKind.REQUEST_VOTE_RESPONSE,
        MessageKind.APPEND_ENTRIES_RESPONSE,
        MessageKind.HEARTBEAT_RESPONSE,
        MessageKind.INSTALL_SNAPSHOT_RESPONSE,
    }
)
_VOTE_REQUESTS: Final = frozenset({MessageKind.REQUEST_PRE_VOTE, MessageKind.REQUEST_VOTE})
_FROM_LEADER: Final = frozenset(
    {MessageKind.APPEND_ENTRIES, MessageKind.HEARTBEAT, MessageKind.INSTALL_SNAPSHOT, MessageKind.QUIESCE}
)
_BETWEEN_DRIVERS: Final = frozenset({MessageKind.SNAPSHOT_FETCH, MessageKind.SNAPSHOT_PIECE, MessageKind.NODE_BEAT})


class Raft(View):
    """One node of one group. Not thread-safe: one driver calls it.

    After an exception other than those that a method names, the node must stop: its state is no longer to be trusted.

    Parameters
    ----------
    config
        How it behaves.
    storage
        What it remembers. Its ``term_index`` belongs to the core from now on.

    Raises
    ------
    UsageError
        The voters or the hard state are out of bounds.
    CorruptionError
        What storage remembers cannot all be true: a log that ends after the stored term, or before the applied index.
    """

    def __init__(self, config: RaftConfig, storage: Storage) -> None:
        super().__init__(State(config, storage))
        self._events: list[RoleChanged] = []
        self._told = (self._state.role, self._state.term, self._state.leader)

    # Inputs.

    def step(self, message: Message) -> None:
        """Take in one message of another node. Old, repeated and reordered ones do no harm.

        Raises
        ------
        ProtocolError
            The message cannot come from a correct member of the group. It changed nothing: drop it and count it.
        InvariantError
            It proves that this node or the group has lost what it had promised to keep: stop the node.
        """
        state = self._state
        self._check_sender(message)
        if message.kind in _RESPONSES and not state.membership.is_member(message.sender):
            return  # It was removed, or is to be added and knows more than this node. Its answers count for nothing.
        if message.kind is not MessageKind.QUIESCE:
            state.wake()
        if message.kind is MessageKind.READ_INDEX and message.term <= state.term:
            # A request, not a claim: whichever leader it reaches may answer it (etcd gives it no term at all).
            pass
        elif message.term < state.term:
            self._step_past(message)
            return
        elif message.term > state.term and not self._step_future(message):
            return
        if message.kind in _VOTE_REQUESTS:
            candidate.answer_request(state, message)
        elif message.kind is MessageKind.TIMEOUT_NOW:
            # No pre-vote, and nobody's lease stands against it: the leader itself wishes it (thesis §3.10).
            if state.role is Role.FOLLOWER:
                state.summoned = True
                candidate.answer_summons(state)
        else:
            match state.role:
                case Role.LEADER:
                    leader.step(state, message)
                case Role.FOLLOWER:
                    follower.step(state, message)
                case _:  # Both kinds of candidate.
                    candidate.step(state, message)
        self._note()

    def tick(self, now_us: int = 0) -> None:
        """A tick of the driver's clock has passed, at least ``tick_us`` after the one before.

        Parameters
        ----------
        now_us
            The driver's monotonic clock, in microseconds: leases are measured by it. 0 where there are none.
        """
        state = self._state
        state.clock_us = max(state.clock_us, now_us)
        if state.quiesced:
            return
        if state.role is Role.LEADER:
            leader.tick(state)
        else:
            state.reads.tick()
            state.election_elapsed += 1
            state.since_leader += 1
            voter = state.membership.is_voter(state.id)
            if voter and state.election_elapsed >= state.randomized_election_timeout:
                state.election_elapsed = 0
                candidate.campaign(state, state.config.pre_vote)
        self._note()

    def campaign(self, force: bool = False) -> None:
        """Try to become leader now. A leader does nothing.

        Parameters
        ----------
        force
            Go straight for the vote, although the configuration says to ask around first. Peers that hear a leader
            still refuse.
        """
        self._state.wake()
        candidate.campaign(self._state, self._state.config.pre_vote and not force)
        self._note()

    def propose(self, sizes: Sequence[int]) -> Position:
        """Append one entry for each of `sizes` (in bytes) to the log, as leader.

        Returns
        -------
        Position
            Where the first of them stands; the others follow it. They are in the ``append`` of the next Ready, if the
            node still leads.

        Raises
        ------
        NotLeaderError
            This node does not lead. Nothing was appended.
        UnavailableError
            More than ``uncommitted_bytes_max`` would wait to be committed, or the leadership is being handed over.
            Nothing was appended.
        UsageError
            No sizes, or a negative one.
        """
        self._state.wake()
        return leader.propose(self._state, sizes)

    def propose_membership(self, changes: Sequence[Change], transition: Transition = Transition.AUTO) -> Position:
        """Append an entry that changes who takes part, as leader; by no changes at all, leave the joint group.

        It takes effect at each node when that has applied it. What the driver has to write comes as
        ``Ready.memberships``.

        Raises
        ------
        NotLeaderError
            This node does not lead. Nothing was appended.
        UnavailableError
            Another change, or this leader's own no-op, is not applied yet, or the leadership is being handed over.
            Nothing was appended.
        UsageError
            The changes make no sense for the members that there are. Nothing was appended.
        """
        state = self._state
        state.wake()
        if state.role is not Role.LEADER:
            raise NotLeaderError(f"node {state.id} does not lead term {state.term}")
        if state.transferee != NO_NODE:
            raise UnavailableError(
                f"the leadership is being handed to node {state.transferee}: retry at the new leader"
            )
        if state.log.applied_index < state.pending_change_index:
            raise UnavailableError(
                "another change of the membership, or the start of this leadership, is under way: retry"
            )
        members = change(state.membership.members, changes, transition)
        return leader.propose_membership(state, members)

    def apply_membership(self, members: Members) -> None:
        """An entry that makes the group consist of `members` is being applied; `applied` of its index follows.

        A leader that is no voter any more steps down. While a snapshot is being installed or restored this says nothing:
        what is still applied then is older than the members in the snapshot.
        """
        state = self._state
        if state.log.restoring:
            return
        if state.role is Role.LEADER:
            leader.apply_membership(state, members)
        else:
            state.membership = Membership(members)
            if state.role is not Role.FOLLOWER and not state.membership.is_voter(state.id):
                state.become_follower(state.term, NO_NODE)
        self._note()

    def transfer_leadership(self, target: int) -> None:
        """Hand the leadership to `target` when it has the whole log. Until then, for an election timeout, nothing is
        proposed; ``transferee`` tells whether it is still being tried. Another target replaces the one before; this
        node itself ends it.

        Raises
        ------
        NotLeaderError
            This node does not lead.
        UsageError
            `target` is not a voter.
        """
        state = self._state
        state.wake()
        if state.role is not Role.LEADER:
            raise NotLeaderError(f"node {state.id} does not lead term {state.term}")
        if not state.membership.is_voter(target):
            raise UsageError(f"node {target} cannot lead: the voters are {list(self.voters)}")
        leader.transfer(state, target)

    def forget_leader(self) -> None:
        """Be free to vote for another at once, as a follower that knows better than its timer that the leader is gone.

        Raises
        ------
        UsageError
            With ``lease_reads`` the leader's leases rest on this node's patience.
        """
        self._state.wake()
        if self._state.role is Role.FOLLOWER:
            follower.forget_leader(self._state)
            self._note()

    def read_index(self, request: int, now_us: int = 0, lease: bool = False) -> None:
        """Ask from which applied index on a read is linearizable; a `ReadState` with the same `request` will tell.

        A follower asks its leader. An answer of 0 means: ask again (no leader, a lost lead, a lost message).

        Parameters
        ----------
        request
            The caller's number for it.
        now_us
            The driver's monotonic clock, read after the request came.
        lease
            Be content with a lease, if this node leads and has one: no message is needed then.
        """
        state = self._state
        state.clock_us = max(state.clock_us, now_us)
        state.wake()
        if state.role is Role.LEADER:
            leader.read_index(state, request, lease and now_us > 0)
        else:
            follower.read_index(state, request)

    def persisted(self, number: int) -> None:
        """The Ready `number`, and all before it, are durable. 0 says nothing.

        Raises
        ------
        InvariantError
            No Ready had this number yet.
        """
        state = self._state
        state.persisted(number)
        if state.role is Role.LEADER:
            leader.on_persisted(state)
        else:
            candidate.on_persisted(state)
        self._note()

    def applied(self, index: int) -> None:
        """Everything up to `index` is applied.

        Raises
        ------
        InvariantError
            No Ready has handed out `index` as committed.
        """
        state = self._state
        state.log.applied(index)
        if state.role is Role.LEADER:
            leader.leave_if_due(state)
        elif state.summoned:
            candidate.answer_summons(state)
            self._note()

    def snapshot_taken(self, meta: SnapshotMeta) -> None:
        """A durable snapshot of what is applied up to ``meta.index`` exists here: peers that lag may get it."""
        state = self._state
        check(meta.index <= state.log.applied_index, f"a snapshot at {meta.index}, which is not applied")
        if state.snapshot is None or meta.index > state.snapshot.index:
            state.snapshot = meta

    def purge(self, index: int) -> None:
        """Forget the log up to `index`, which a snapshot covers."""
        state = self._state
        snapshot = state.snapshot
        check(snapshot is not None and index <= snapshot.index, f"entry {index} purged, which no snapshot covers")
        state.log.purge(index)
        for peer in state.outbox.drop_appends(index + 1):
            self.report_unreachable(peer)

    def report_snapshot(self, peer: int, ok: bool) -> None:
        """The snapshot for `peer` has arrived there, or will not."""
        if self._state.role is Role.LEADER:
            leader.report_snapshot(self._state, peer, ok)

    def wake(self) -> None:
        """Count time again: the node of this group's leader may be gone."""
        self._state.wake()

    def report_unreachable(self, peer: int) -> None:
        """A message to `peer` could not be sent."""
        if self._state.role is Role.LEADER:
            leader.report_unreachable(self._state, peer)

    def report_way_lost(self, peer: int) -> None:
        """Messages to `peer` were lost, and it is reached on another way than theirs."""
        if self._state.role is Role.LEADER:
            leader.report_way_lost(self._state, peer)

    # Outputs.

    def has_ready(self) -> bool:
        """Whether `ready` would give anything to do."""
        state = self._state
        return bool(
            state.outbox.waiting
            or state.hard_state is not state.announced
            or state.log.has_unannounced
            or state.log.has_committed
            or state.reads.answers
            or state.reads.round_due
            or state.proposed
            or self._events
        )

    def ready(self) -> Ready:
        """Hand out all effects since the last Ready. Each is handed out once.

        ``number`` is not 0 exactly if ``must_sync``: then, and only then, the driver owes a call of `persisted`. A
        Ready without a number may still have a ``hard_state`` whose commit index is new: worth writing, not worth a
        sync.
        """
        state = self._state
        leader.send_read_round(state)
        unfinished = state.unfinished_write
        must_sync = state.must_sync
        number = state.last_write + 1 if must_sync else 0
        current = state.hard_state
        hard_state = current if current is not state.announced else None
        append = None
        snapshot = state.log.installing
        memberships = tuple(
            each
            for each in state.proposed
            # Unless it was replaced before any Ready could carry it.
            if each.index > state.log.announced_index and state.log.matches(each.index, each.term)
        )
        state.proposed.clear()
        events = tuple(self._current(event) for event in self._events)
        self._events.clear()
        if number:
            state.announce(number)
            append = state.log.announce(number)
        state.announced = current
        messages, messages_after_persist = state.outbox.take(number, unfinished)
        return Ready(
            number=number,
            hard_state=hard_state,
            append=append,
            must_sync=must_sync,
            messages=messages,
            messages_after_persist=messages_after_persist,
            committed=state.log.take_committed(),
            reads=state.reads.take_answers(),
            events=events,
            snapshot=snapshot,
            memberships=memberships,
        )

    # Terms.

    def _check_sender(self, message: Message) -> None:
        """Refuse what cannot come from a correct member, before anything changes."""
        state = self._state
        if message.to != state.id or message.sender == state.id:
            raise ProtocolError(f"a {message.kind.name} from {message.sender} to {message.to} reached node {state.id}")
        if message.kind in _BETWEEN_DRIVERS:
            raise ProtocolError(f"a {message.kind.name} is not for the core")
        if message.term == 0 and (message.kind in _FROM_LEADER or message.kind in _VOTE_REQUESTS):
            raise ProtocolError(
                f"node {message.sender} sends a {message.kind.name} of term 0, which nobody leads or wins"
            )
        rival = message.term == state.term and state.leader not in (NO_NODE, message.sender)
        if message.kind in _FROM_LEADER and rival:
            # At most one leader in a term (Raft §5.2): its entries and another's must not mix under one term.
            raise ProtocolError(
                f"node {message.sender} claims to lead term {message.term}, which node {state.leader} leads"
            )

    def _step_past(self, message: Message) -> None:
        """A message of an older term. Most are dropped."""
        state = self._state
        if message.kind in _FROM_LEADER and (state.config.check_quorum or state.config.pre_vote):
            # Nobody here may be allowed to raise the leader's term by asking for votes, so a node that came back with a
            # greater term would be stuck: it hears only what it must ignore. Telling the leader frees it (etcd#8501).
            state.send(MessageKind.APPEND_ENTRIES_RESPONSE, message.sender)
        elif message.kind is MessageKind.REQUEST_PRE_VOTE:
            # Without an answer a group of which some do pre-votes and some do not could fall silent.
            state.send(MessageKind.REQUEST_PRE_VOTE_RESPONSE, message.sender, reject=True)

    def _step_future(self, message: Message) -> bool:
        """A message of a later term. Returns whether it is to be handled further."""
        state = self._state
        if message.kind in _VOTE_REQUESTS and state.in_lease and message.context != TRANSFER_CAMPAIGN:
            # Who hears a leader neither enters a candidate's term nor votes for it (Raft §6, thesis §4.2.3), unless that
            # leader itself wishes it (thesis §3.10).
            return False
        if message.kind is MessageKind.REQUEST_PRE_VOTE:
            return True
        if message.kind is MessageKind.REQUEST_PRE_VOTE_RESPONSE and not message.reject:
            # It carries the term that was asked for, which nobody has entered.
            return True
        state.become_follower(message.term, message.sender if message.kind in _FROM_LEADER else NO_NODE)
        return True

    # Events.

    def _note(self) -> None:
        """Remember for the next Ready that role, term or leader changed."""
        state = self._state
        now = (state.role, state.term, state.leader)
        if now != self._told:
            self._events.append(RoleChanged(*now, noop_index=state.noop_index))
            self._told = now

    def _current(self, event: RoleChanged) -> RoleChanged:
        """`event`, without its no-op if that was replaced before any Ready could carry it."""
        log = self._state.log
        if event.noop_index and not (
            event.noop_index > log.announced_index and log.matches(event.noop_index, event.term)
        ):
            return replace(event, noop_index=0)
        return event
