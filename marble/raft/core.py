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

from marble.errors import ProtocolError
from marble.raft import candidate, follower, leader
from marble.raft.config import MemoryStorage, RaftConfig, Storage
from marble.raft.log import RaftLog
from marble.raft.messages import Message, MessageKind, Ready, RoleChanged
from marble.raft.progress import Progress
from marble.raft.state import State
from marble.types import NO_NODE, HardState, Position, Role

__all__ = ["MemoryStorage", "Raft", "RaftConfig", "Storage"]

_RESPONSES: Final = frozenset(
    {
        MessageKind.REQUEST_PRE_VOTE_RESPONSE,
        MessageKind.REQUEST_VOTE_RESPONSE,
        MessageKind.APPEND_ENTRIES_RESPONSE,
        MessageKind.HEARTBEAT_RESPONSE,
    }
)
_VOTE_REQUESTS: Final = frozenset({MessageKind.REQUEST_PRE_VOTE, MessageKind.REQUEST_VOTE})
_FROM_LEADER: Final = frozenset({MessageKind.APPEND_ENTRIES, MessageKind.HEARTBEAT})


class Raft:
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
        self._state = State(config, storage)
        self._events: list[RoleChanged] = []
        self._told = (self._state.role, self._state.term, self._state.leader)

    # What it is.

    @property
    def id(self) -> int:
        """This node."""
        return self._state.id

    @property
    def role(self) -> Role:
        """What this node is now."""
        return self._state.role

    @property
    def term(self) -> int:
        """The latest term that this node has seen."""
        return self._state.term

    @property
    def vote(self) -> int:
        """Whom it voted for in ``term``; ``NO_NODE`` if nobody."""
        return self._state.vote

    @property
    def leader(self) -> int:
        """Who leads ``term``, as far as it knows; ``NO_NODE`` if it does not."""
        return self._state.leader

    @property
    def voters(self) -> tuple[int, ...]:
        """All voters of the group, ascending."""
        return self._state.membership.voters

    @property
    def votes(self) -> dict[int, bool]:
        """Answers to the (pre-)vote under way: True is granted."""
        return dict(self._state.votes)

    @property
    def hard_state(self) -> HardState:
        """What it must remember over a crash, as it is in memory."""
        return self._state.hard_state

    @property
    def log(self) -> RaftLog:
        """Its log. To look at only."""
        return self._state.log

    @property
    def commit_index(self) -> int:
        """The last entry known to be committed."""
        return self._state.log.commit_index

    @property
    def applied_index(self) -> int:
        """The last entry that the driver reported as applied."""
        return self._state.log.applied_index

    @property
    def persisted_index(self) -> int:
        """The last entry up to which the log is durable here."""
        return self._state.log.persisted_index

    @property
    def last_index(self) -> int:
        """The last entry of the log, durable or not."""
        return self._state.log.last_index

    @property
    def progress(self) -> dict[int, Progress]:
        """What a leader knows of each member, itself included; empty unless it leads. To look at only."""
        return self._state.progress

    @property
    def election_elapsed(self) -> int:
        """Ticks since a follower heard from its leader, or since a leader last checked its quorum."""
        return self._state.election_elapsed

    @election_elapsed.setter
    def election_elapsed(self, ticks: int) -> None:
        self._state.election_elapsed = ticks

    @property
    def randomized_election_timeout(self) -> int:
        """After how many ticks without a leader this node campaigns. Drawn anew with every change of role or term; may
        be set.
        """
        return self._state.randomized_election_timeout

    @randomized_election_timeout.setter
    def randomized_election_timeout(self, ticks: int) -> None:
        self._state.randomized_election_timeout = ticks

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
        else:
            match state.role:
                case Role.LEADER:
                    leader.step(state, message)
                case Role.FOLLOWER:
                    follower.step(state, message)
                case _:  # Both kinds of candidate.
                    candidate.step(state, message)
        self._note()

    def tick(self) -> None:
        """A tick of the driver's clock has passed."""
        state = self._state
        if state.role is Role.LEADER:
            leader.tick(state)
        else:
            state.reads.tick()
            state.election_elapsed += 1
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
            More than ``uncommitted_bytes_max`` would wait to be committed. Nothing was appended.
        UsageError
            No sizes, or a negative one.
        """
        return leader.propose(self._state, sizes)

    def read_index(self, request: int) -> None:
        """Ask from which applied index on a read is linearizable; a `ReadState` with the same `request` will tell.

        A follower asks its leader. An answer of 0 means: ask again (no leader, a lost lead, a lost message).
        """
        state = self._state
        if state.role is Role.LEADER:
            leader.read_index(state, request)
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
        self._state.log.applied(index)

    def report_unreachable(self, peer: int) -> None:
        """A message to `peer` could not be sent."""
        if self._state.role is Role.LEADER:
            leader.report_unreachable(self._state, peer)

    # Outputs.

    def has_ready(self) -> bool:
        """Whether `ready` would give anything to do."""
        state = self._state
        return bool(
            state.outbox.waiting
            or state.hard_state != state.announced
            or state.log.has_unannounced
            or state.log.has_committed
            or state.reads.answers
            or state.reads.round_due
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
        hard_state = state.hard_state if state.hard_state != state.announced else None
        append = None
        events = tuple(self._current(event) for event in self._events)
        self._events.clear()
        if number:
            state.announce(number)
            append = state.log.announce(number)
        state.announced = state.hard_state
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
        )

    # Terms.

    def _check_sender(self, message: Message) -> None:
        """Refuse what cannot come from a correct member, before anything changes."""
        state = self._state
        if message.to != state.id or message.sender == state.id:
            raise ProtocolError(f"a {message.kind.name} from {message.sender} to {message.to} reached node {state.id}")
        if message.kind in _RESPONSES and not state.membership.is_member(message.sender):
            raise ProtocolError(f"node {message.sender}, which is no member, sends a {message.kind.name}")
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
        if message.kind in _VOTE_REQUESTS:
            in_lease = state.leader != NO_NODE and state.election_elapsed < state.config.election_ticks
            if state.config.check_quorum and in_lease:
                # Who hears a leader neither enters a candidate's term nor votes for it (Raft §6, thesis §4.2.3).
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
